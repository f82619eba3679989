"""Selection against a sort, over random scores, ties, budgets beyond all bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.kernels.cutoffs.ranks import Heavy
from qwen_jax.sparsity.selection import best, select_lines

_best = jax.jit(best)
_heavy = jax.jit(lambda scores, count: best(scores, count, Heavy(7, 5)))


def naive(scores_S: np.ndarray, count: int) -> set[int]:
    """The first `count` positions in descending order of score, earlier ones first, without those at -inf."""
    order = sorted(np.flatnonzero(scores_S >= 0), key=lambda j: (-scores_S[j], j))
    return {int(j) for j in order[:count]}


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), 1e-45, 3e38]),
    st.floats(0, 64, width=32),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(SCORES, min_size=12, max_size=12), min_size=3, max_size=3),
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 11, 12, 13, 1 << 24]), min_size=3, max_size=3),
)
def test_the_best_are_those_of_a_sort(rows: list[list[float]], counts: list[int]) -> None:
    scores = np.array(rows, np.float32)
    scores[(scores > 0) & (scores < np.finfo(np.float32).tiny)] = 0  # devices flush them
    chosen = np.asarray(_best(scores, np.array(counts, np.int32)))
    for row, count, got in zip(scores, counts, chosen, strict=True):
        assert set(np.flatnonzero(got)) == naive(row, count)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(SCORES, min_size=12, max_size=12), count=st.integers(0, 60),
)  # fmt: skip
def test_heavy_scores_are_chosen_until_the_weight_is_reached(row: list[float], count: int) -> None:
    scores = np.array(row, np.float32)
    scores[(scores > 0) & (scores < np.finfo(np.float32).tiny)] = 0
    order = sorted(np.flatnonzero(scores >= 0), key=lambda j: (-scores[j], j))
    weight = np.array([1 if j < 7 else 5 for j in order], int)
    want = {int(j) for j, before in zip(order, weight.cumsum() - weight, strict=True) if before < count}
    assert set(np.flatnonzero(_heavy(scores, np.int32(count)))) == want


def test_many_scores_of_probabilities() -> None:
    rng = np.random.default_rng(0)
    scores = np.exp(rng.normal(-10, 5, (2, 4, 5000))).astype(np.float32)
    scores[..., :30] = np.inf
    scores[..., 4000:] = -np.inf
    counts = np.array([30, 130, 1000, 4800], np.int32)
    chosen = np.asarray(_best(scores, counts))
    for b in range(2):
        for n, count in enumerate(counts):
            assert set(np.flatnonzero(chosen[b, n])) == naive(scores[b, n], int(count))


def test_lines_of_each_head_follow_its_own_budget_and_leave_it_as_it_was() -> None:
    rng = np.random.default_rng(1)
    columns, diagonals = (
        jnp.asarray(rng.random((1, 3, 200)), jnp.float32).at[..., 150:].set(-jnp.inf) for _ in range(2)
    )
    vertical, slash = jnp.array([0, 7, 100_000], jnp.int32), jnp.array([150, 1, 20], jnp.int32)
    lines = jax.jit(select_lines)(columns, diagonals, vertical, slash)
    np.testing.assert_array_equal(lines.columns.sum(-1)[0], [0, 7, 150])
    np.testing.assert_array_equal(lines.diagonals.sum(-1)[0], [150, 1, 20])
    np.testing.assert_array_equal(vertical, [0, 7, 100_000])
    for n in range(3):
        assert set(np.flatnonzero(lines.columns[0, n])) == naive(np.asarray(columns[0, n]), int(vertical[n]))
        assert set(np.flatnonzero(lines.diagonals[0, n])) == naive(np.asarray(diagonals[0, n]), int(slash[n]))


@pytest.mark.parametrize("count", [0, 3])
def test_a_row_without_a_finite_score_keeps_nothing(count: int) -> None:
    assert not np.asarray(best(jnp.full((2, 9), -jnp.inf), jnp.full((2,), count))).any()


def test_more_budget_keeps_what_less_kept() -> None:
    """Recall grows with the budget because the lines nest."""
    scores = jnp.asarray(np.random.default_rng(2).integers(0, 20, 300), jnp.float32)
    kept = np.zeros(300, bool)
    for count in range(0, 320, 7):
        more = np.asarray(_best(scores, jnp.int32(count)))
        assert more[kept].all()
        kept = more
