"""Our numbers against those of transformers, on checkpoints that transformers wrote.

The recorded ones lie in goldens/ (scripts/make_hf_goldens.py made them); where torch is installed the same comparison runs
on freshly drawn weights, and transformers loads what our converter exports.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_jax
from qwen_jax import LLM, SamplingParams
from qwen_jax.config import ModelConfig
from qwen_jax.convert import convert
from qwen_jax.model import Qwen2

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))
FLOAT32 = 1e-4  # most error of a logit, as a share of the largest logit; reached: some 1e-6
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Golden:
    """A checkpoint and what transformers computed from it; fields as `record` in scripts/make_hf_goldens.py returns them."""

    folder: Path
    tokens: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    bf16_logits: np.ndarray
    greedy: np.ndarray
    penalised: np.ndarray
    penalty: np.ndarray

    @property
    def rows(self) -> list[np.ndarray]:
        """The prompts without their padding."""
        return [row[:n] for row, n in zip(self.tokens, self.lengths, strict=True)]

    def real(self, x_BTV: jax.Array) -> np.ndarray:
        """The logits of real positions, row by row: [R, V], as `logits` has them."""
        return np.concatenate([np.asarray(x)[:n] for x, n in zip(x_BTV, self.lengths, strict=True)])


def read_golden(folder: Path) -> Golden:
    with np.load(folder / "golden.npz") as recorded:
        return Golden(folder, **recorded)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(GOLDENS / request.param)


@pytest.fixture(scope="module")
def model(golden: Golden) -> Qwen2:
    return qwen_jax.load(golden.folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def llm(model: Qwen2) -> LLM:
    # Pieces of 16: the longest prompt is three, the others end within one.
    return LLM(model, max_len=112, prefill_chunk=16)


def error(x: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def check_logits(model: Qwen2, golden: Golden) -> None:
    logits = model(golden.tokens, golden.lengths)
    assert logits.dtype == jnp.float32
    assert logits.shape == (*golden.tokens.shape, model.config.vocab_size)
    assert error(golden.real(logits), golden.logits) < FLOAT32


def check_greedy(llm: LLM, golden: Golden) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, greedy=True)
    batch = llm.generate(golden.rows, params)
    np.testing.assert_array_equal([answer.token_ids for answer in batch], golden.greedy)


def check_bf16(golden: Golden) -> None:
    logits = golden.real(qwen_jax.load(golden.folder, dtype=jnp.bfloat16)(golden.tokens, golden.lengths))
    ours, theirs = logits - golden.logits, golden.bf16_logits - golden.logits
    assert np.abs(ours).max() <= 2 * np.abs(theirs).max()
    assert np.sqrt(np.mean(ours**2)) <= 2 * np.sqrt(np.mean(theirs**2))


def test_the_recorded_checkpoints_cover_what_they_should() -> None:
    assert len(CASES) == 6
    configs = [ModelConfig.from_folder(GOLDENS / case) for case in CASES]
    assert {c.tie_embeddings for c in configs} == {True, False}
    assert {c.group_size for c in configs} >= {1, 5, 7}
    assert {c.head_dim for c in configs} == {64, 128}
    assert {c.dtype for c in configs} == {"float32", "bfloat16"}
    assert any(c.vocab_size % 2 for c in configs)
    raw = [json.loads((GOLDENS / case / "config.json").read_text()) for case in CASES]
    assert {"rope_parameters" in r for r in raw} == {True, False}
    assert sum(c.yarn is not None for c in configs) == 2


def test_float32_logits(model: Qwen2, golden: Golden) -> None:
    check_logits(model, golden)


def test_greedy_tokens_of_a_batch(llm: LLM, golden: Golden) -> None:
    check_greedy(llm, golden)


def test_a_row_alone_gives_the_tokens_it_gives_in_a_batch() -> None:
    golden = read_golden(GOLDENS / "yarn")
    llm = LLM(golden.folder, prefill_chunk=16)
    assert llm.max_len == 128
    answer = llm.generate(golden.rows[1], SamplingParams(max_new_tokens=NEW_TOKENS, greedy=True))
    assert answer.token_ids == golden.greedy[1].tolist()
    assert answer.finish_reason == "length"


def test_greedy_tokens_under_a_repetition_penalty(llm: LLM, golden: Golden) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, greedy=True, repetition_penalty=float(golden.penalty))
    batch = llm.generate(golden.rows, params)
    np.testing.assert_array_equal([answer.token_ids for answer in batch], golden.penalised)


def test_bf16_error_is_at_most_twice_that_of_transformers(golden: Golden) -> None:
    check_bf16(golden)


@pytest.mark.parametrize("case", ["yarn", "tied_g7_h64"])
def test_score_is_the_log_softmax_of_the_logits(case: str) -> None:
    golden = read_golden(GOLDENS / case)
    llm = LLM(golden.folder, prefill_chunk=16)
    row = golden.rows[0]
    logits = golden.logits[: len(row) - 1].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probabilities -= logits.max(-1, keepdims=True)
    expected = np.take_along_axis(log_probabilities, row[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(llm.score(row), expected, rtol=0, atol=FLOAT32 * np.abs(logits).max())


def test_padding_changes_nothing(model: Qwen2, golden: Golden) -> None:
    """The tokens that fill a row up are not seen, whatever they are."""
    other = golden.tokens.copy()
    for row, n in zip(other, golden.lengths, strict=True):
        row[n:] = model.config.vocab_size - 1
    a, b = (golden.real(model(tokens, golden.lengths)) for tokens in (golden.tokens, other))
    np.testing.assert_array_equal(a, b)


def test_a_converted_checkpoint_gives_the_same_numbers(golden: Golden, tmp_path: Path) -> None:
    convert(golden.folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "exported")
    check_logits(qwen_jax.load(tmp_path / "orbax", dtype=jnp.float32), golden)
    before, after = (_tensors(folder) for folder in (golden.folder, tmp_path / "exported"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.tobytes() == after[name].tobytes(), name


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


# Live, against the transformers and torch that are installed.


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    pytest.importorskip("torch", reason="the live comparison needs torch; the recorded one has run")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE.parent / "scripts")
        return importlib.import_module("make_hf_goldens")


@pytest.mark.filterwarnings("default")  # torch and transformers may warn about themselves
@pytest.mark.parametrize("case", CASES)
def test_live(recorder: ModuleType, case: str, tmp_path: Path) -> None:
    """Fresh weights: logits, greedy tokens and bf16; transformers reads what we export and computes the same bits."""
    recipe = next(c for c in recorder.CASES if c.name == case)
    fresh, seed = _record(recorder, recipe, tmp_path)
    print(f"seed {seed}")  # pytest shows it when something below fails
    model = qwen_jax.load(fresh.folder, dtype=jnp.float32)
    check_logits(model, fresh)
    check_greedy(LLM(model, max_len=112, prefill_chunk=16), fresh)
    check_bf16(fresh)

    convert(fresh.folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "exported")
    exported = recorder.record(tmp_path / "exported", seed)
    np.testing.assert_array_equal(exported["logits"], fresh.logits)


def _record(recorder: ModuleType, recipe: Any, parent: Path) -> tuple[Golden, int]:
    for _ in range(20):
        seed = secrets.randbelow(2**31)
        folder = parent / str(seed)
        recorder.write_checkpoint(recipe, folder, seed)
        try:
            return Golden(folder, **recorder.record(folder, seed)), seed
        except recorder.NearTieError:
            continue
    raise AssertionError("twenty networks in a row had a greedy step too near to call")
