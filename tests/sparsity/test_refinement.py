"""Recall against a dense oracle, the published table of raises, and what refinement and search leave behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.config import DualChunk
from qwen_jax.errors import QwenJaxError
from qwen_jax.model import Qwen2
from qwen_jax.sparsity import refinement, search
from qwen_jax.sparsity.budgets import Budget, read, write
from qwen_jax.sparsity.progress_file import ProgressFile
from qwen_jax.sparsity.recall import Sizes, measure
from tests import tiny_model
from tests.fake_recall import fake_recall  # noqa: F401

CONFIG = dataclasses.replace(
    tiny_model.CONFIG, num_layers=2, num_heads=2, num_kv_heads=1, dual_chunk=DualChunk(512, 128, 512)
)
IDS = np.random.default_rng(0).integers(1, 97, 768).astype(np.int32)
BACK = np.ascontiguousarray(IDS[::-1])
RUN = {"chunk": 384, "last_queries": 64}


@pytest.fixture(scope="module")
def model() -> Qwen2:
    return tiny_model.random_model(CONFIG, scale=16.0)


def sizes(*candidates: tuple[int, int]) -> Sizes:
    """The same (columns, diagonals) for every layer and head."""
    shape = (len(candidates), CONFIG.num_layers, CONFIG.num_heads)
    return Sizes(
        *(jnp.broadcast_to(jnp.array(x)[:, None, None], shape) for x in zip(*candidates, strict=True))
    )


def test_recall_is_in_its_range_grows_with_the_budget_and_ends_at_one(model: Qwen2) -> None:
    pieces = list(measure(model, IDS, sizes((30, 100), (60, 150), (120, 300), (768, 768)), **RUN))
    assert [(p.start, p.length) for p, _ in pieces] == [(0, 384), (384, 384)]
    for piece, found in pieces:
        recall = np.asarray(found.recall)
        assert recall.shape == (4, 2, 2)
        assert (recall > 0).all()
        assert (recall <= 1).all()
        assert (np.diff(recall, axis=0) >= -1e-5).all()
        np.testing.assert_allclose(recall[-1], 1, atol=1e-5)
        causal = piece.start + (piece.length + 1) / 2
        np.testing.assert_allclose(found.keys[-1], causal, rtol=1e-6)
        assert (np.asarray(found.keys[0]) < causal).all()
    assert (np.asarray(pieces[1][1].recall[0]) < 0.97).any()


def test_recall_of_a_bfloat16_model(model: Qwen2) -> None:
    """Its cache holds mixed keys."""
    narrow = tiny_model.random_model(dataclasses.replace(CONFIG, dtype="bfloat16"), scale=16.0)
    _, (_, want) = measure(model, IDS, sizes((30, 100)), **RUN)
    _, (_, got) = measure(narrow, IDS, sizes((30, 100)), **RUN)
    np.testing.assert_allclose(got.recall, want.recall, atol=2e-2)


def test_scaled_sizes_cost_what_was_asked(model: Qwen2) -> None:
    _, (_, last) = measure(model, IDS, sizes((30, 100), (100, 30)), keys=260.0, **RUN)
    keys = np.asarray(last.keys)
    assert (keys <= 260).all()
    assert (keys > 200).all()
    assert (np.asarray(last.vertical[1]) > np.asarray(last.vertical[0])).all()


@pytest.mark.parametrize(
    ("recall", "more"),
    [(1.0, 0), (0.9, 0), (0.8999, 2048), (0.8, 2048), (0.75, 4096), (0.7, 4096), (0.6, 8192), (0.5999, 12244), (0.0, 12244)],
)  # fmt: skip
def test_the_published_raises(recall: float, more: int) -> None:
    """algorithms.md 4.9: what turns the search's sizes into those of the released 14B file."""
    assert refinement.raise_of(np.array([recall]), 0.9)[0] == more


@given(recall=st.floats(0, 1), threshold=st.floats(0.01, 1), step=st.integers(1, 4096))
def test_a_head_is_raised_iff_it_falls_short(recall: float, threshold: float, step: int) -> None:
    more = refinement.raise_of(np.array([recall]), threshold, step)[0]
    assert (more == 0) == (recall >= threshold)
    assert more <= 6 * step


@pytest.mark.usefixtures("fake_recall")
def test_refinement_raises_what_falls_short_until_it_recalls_or_may_not_grow(
    model: Qwen2, tmp_path: Path
) -> None:
    heads = [[Budget(30, 100), Budget(768, 768)], [Budget(31, 100), Budget(64, 128)]]
    rounds: list[refinement.Round] = []
    last = refinement.refine(
        model, [IDS, BACK], heads, ProgressFile(tmp_path / "out.json", {}), threshold=0.9, cap=800, step=64,
        on_round=lambda number, found: rounds.append(found), **RUN,
    )  # fmt: skip
    assert len(rounds) > 1
    enough, full = last.recall_LN >= 0.9, (last.vertical_LN == 800) & (last.slash_LN == 800)
    assert (enough | full).all()
    assert enough.any()
    assert full.any()
    assert rounds[0].vertical_LN[0, 0] == 130  # 30 is read as 130
    for before, after in itertools.pairwise(rounds):
        more = refinement.raise_of(before.recall_LN, 0.9, 64)
        np.testing.assert_array_equal(after.vertical_LN, np.minimum(before.vertical_LN + more, 800))
        np.testing.assert_array_equal(after.slash_LN, np.minimum(before.slash_LN + more, 800))
    assert (last.lowest_LN <= last.recall_LN + 1e-9).all()
    write(tmp_path / "budgets.json", last.budgets())
    assert read(tmp_path / "budgets.json", CONFIG) == last.budgets()


@pytest.mark.usefixtures("fake_recall")
def test_a_run_that_was_broken_off_goes_on_where_it_was(model: Qwen2, tmp_path: Path) -> None:
    heads = [[Budget(31, 100)] * 2] * 2
    settings = {"threshold": 0.99}
    common = {"threshold": 0.99, "cap": 200, "step": 64, **RUN}

    def stop(number: int, at: int, piece: object) -> None:
        if (number, at) == (1, 1):
            raise KeyboardInterrupt

    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        refinement.refine(
            model,
            [IDS, BACK],
            heads,
            ProgressFile(out, settings),
            on_piece=stop,
            **common,
        )
    measured: list[tuple[int, int]] = []
    again = refinement.refine(
        model, [IDS, BACK], heads, ProgressFile(out, settings),
        on_piece=lambda number, at, piece: measured.append((number, at)), **common,
    )  # fmt: skip
    assert measured[0] == (1, 1)
    whole = refinement.refine(
        model,
        [IDS, BACK],
        heads,
        ProgressFile(tmp_path / "other.json", settings),
        **common,
    )
    for a, b in zip(dataclasses.astuple(again), dataclasses.astuple(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_progress_of_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ProgressFile(out, {"threshold": 0.9, "cap": 5}).save({"rounds": []})
    with pytest.raises(QwenJaxError, match="belongs to a run with another threshold: remove it"):
        ProgressFile(out, {"threshold": 0.8, "cap": 5})
    ProgressFile(out, {"threshold": 0.9, "cap": 5}).remove()
    assert ProgressFile(out, {"threshold": 0.8, "cap": 5}).content == {}
    out.with_name("out.json.progress").write_text("[]")
    with pytest.raises(QwenJaxError, match="is not the progress of such a run"):
        ProgressFile(out, {})
    out.write_text("{}")
    with pytest.raises(QwenJaxError, match="exists already"):
        ProgressFile(out, {})
    with pytest.raises(QwenJaxError, match="no such folder"):
        ProgressFile(tmp_path / "nowhere" / "out.json", {})


@pytest.mark.usefixtures("fake_recall")
def test_the_search_takes_what_recalls_most_at_equal_cost(model: Qwen2, tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path / "first.json", {})
    found = search.search(model, [IDS], progress, keys=256, **RUN)
    np.testing.assert_array_equal(found.choice_LN, search.GRID.index((3500, 100)))  # columns count twice
    assert len(json.loads(progress.path.read_text())["content"]["sequences"]) == 1
    for n in range(2):
        shape = search.GRID[found.choice_LN[1, n]]
        budget = found.budgets[1][n]
        assert budget.score == pytest.approx(found.recall_CLN[:, 1, n].max(), abs=1e-6)
        if budget.vertical > 31 and budget.slash > 100:
            assert budget.vertical / budget.slash == pytest.approx(shape[0] / shape[1], rel=0.1)
    with pytest.raises(QwenJaxError, match="no calibration sequence is longer than 2000 tokens"):
        search.search(model, [IDS], ProgressFile(tmp_path / "other.json", {}), keys=1000, **RUN)
