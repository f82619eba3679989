"""The rule of bands: its arithmetic against counting, and what it must find in attention whose lines are known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.kernels.sparse_attention import computed
from qwen_jax.kernels.sparse_attention.bands import bands_of, tile_distances
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import LineBudgets
from qwen_jax.sparsity.cost_aware import Piece, band_scores, computed_pairs, select_bands
from qwen_jax.sparsity.selection import select_lines

S, BAND, ROWS = 1500, 16, 8
M = tile_distances(S, BAND)
_pairs = jax.jit(functools.partial(computed_pairs, band=BAND))
_select = jax.jit(
    functools.partial(select_bands, last_queries=ROWS, band=BAND), static_argnames="most_columns"
)


@settings(max_examples=40, deadline=None)
@given(
    columns=st.sets(st.integers(0, S - 1), max_size=30), bands=st.sets(st.integers(0, M - 1), max_size=20),
    start=st.integers(0, S - 1), length=st.integers(-5, 150),
)  # fmt: skip
def test_computed_pairs_are_those_counted_key_by_key(
    columns: set[int], bands: set[int], start: int, length: int
) -> None:
    columns_S, bands_M = np.zeros(S, bool), np.zeros(M, bool)
    columns_S[list(columns)], bands_M[list(bands)] = True, True
    end = min(start + length, S)
    want = computed.computed_keys(columns_S, bands_M, np.arange(start, end), BAND).sum()
    piece = Piece(jnp.int32(start), jnp.array([end], jnp.int32))
    assert _pairs(columns_S[None, None], bands_M[None, None], piece)[0, 0] == want


def test_a_band_scores_what_it_captures_of_every_diagonal() -> None:
    rng = np.random.default_rng(0)
    diagonals = rng.random(S).astype(np.float32)
    want = np.zeros(M)
    for d in range(S):
        for i in range(BAND):  # every phase of a query in its tile
            apart = (i + 100 * BAND) // BAND - (i + 100 * BAND - d) // BAND
            if apart < M:
                want[apart] += diagonals[d] / BAND
    np.testing.assert_allclose(band_scores(jnp.asarray(diagonals), BAND), want, rtol=1e-5)


class Scores:
    """Line scores and the attention they were taken of: T queries that end at `end`, of which the last ROWS are summed."""

    def __init__(self, a_TS: np.ndarray, end: int):
        self.a_TS, self.end, self.start = a_TS / a_TS.sum(1, keepdims=True), end, end - len(a_TS)
        columns, diagonals = np.full((2, S), -np.inf, np.float32)
        columns[:end], diagonals[:end] = 0, 0
        for i in range(end - ROWS, end):
            row = self.a_TS[i - self.start]
            columns[: i + 1] += row[: i + 1]
            diagonals[: i + 1] += row[i::-1]
        columns[:2], diagonals[:3] = np.inf, np.inf  # what is forced
        self.columns, self.diagonals = (jnp.asarray(x)[None, None] for x in (columns, diagonals))
        self.piece = Piece(jnp.int32(self.start), jnp.array([end], jnp.int32))

    def published(self, vertical: int, slash: int) -> tuple[np.ndarray, np.ndarray]:
        lines = select_lines(self.columns, self.diagonals, jnp.array([vertical]), jnp.array([slash]))
        return np.asarray(lines.columns[0, 0]), np.asarray(bands_of(lines.diagonals, BAND)[0, 0])

    def bands(self, pairs: float, most: int = S) -> tuple[np.ndarray, np.ndarray]:
        chosen = _select(
            self.columns, self.diagonals, jnp.full((1, 1), pairs, jnp.float32), self.piece, most_columns=most
        )
        return np.asarray(chosen[0][0, 0]), np.asarray(chosen[1][0, 0])

    def recall(self, columns_S: np.ndarray, bands_M: np.ndarray) -> float:
        keys_TS = computed.computed_keys(columns_S, bands_M, np.arange(self.start, self.end), BAND)
        return float((self.a_TS * keys_TS).sum(1).mean())

    def pairs(self, columns_S: np.ndarray, bands_M: np.ndarray) -> int:
        return computed.computed_pairs(
            columns_S, bands_M, q_start=self.start, queries=len(self.a_TS), kv_len=self.end, band=BAND
        )


def attention(
    columns: dict[int, float], diagonals: dict[int, float], *, end: int = 1420, T: int = 96, noise: float = 0.002
) -> Scores:  # fmt: skip
    """Rows with the given mass on the given keys and distances, above uneven noise."""
    rng = np.random.default_rng(end)
    a_TS = noise * rng.random((T, S))
    i_T = np.arange(end - T, end)
    for j, mass in columns.items():
        a_TS[:, j] += mass
    for d, mass in diagonals.items():
        a_TS[np.arange(T)[i_T >= d], i_T[i_T >= d] - d] += mass
    a_TS[np.arange(S) > i_T[:, None]] = 0
    return Scores(a_TS, end)


def test_it_finds_columns_and_diagonals_among_each_other() -> None:
    found = attention({77: 0.3, 203: 0.2}, dict.fromkeys((180, 185, 190, 301), 0.1), noise=3e-4)
    columns, bands = found.bands(96 * 100)
    assert columns[[77, 203]].all()
    assert bands[
        [180 // BAND, 190 // BAND, 301 // BAND + 1]
    ].all()  # the last one lies mostly in the band behind
    assert found.recall(columns, bands) > 0.7


def test_a_column_is_no_reason_for_a_band_nor_a_diagonal_for_columns() -> None:
    column = attention({200: 0.6}, {}, noise=1e-6)
    columns, bands = column.bands(96 * 120)
    assert columns[200]
    assert not bands[1220 // BAND - 1 : 1220 // BAND + 1].any() or bands.sum() > 2
    slash = attention({}, {200: 0.6}, noise=1e-6)
    columns, bands = slash.bands(96 * 60)
    assert bands[200 // BAND]
    assert columns[:420].sum() < 20


@pytest.mark.parametrize(("vertical", "slash"), [(5, 20), (20, 40), (40, 90), (3, 200), (600, 600)])
def test_for_the_price_of_the_published_choice_it_recalls_as_much(vertical: int, slash: int) -> None:
    rng = np.random.default_rng(slash)
    columns = {int(j): 0.1 for j in rng.choice(1200, 6)}
    scattered = {int(d): 0.05 for d in rng.choice(1300, 12)}
    clustered = {230 + n: 0.03 for n in range(12)}
    found = attention(columns, scattered | clustered, noise=0.004)
    published = found.published(vertical, slash)
    price = found.pairs(*published)
    assert found.pairs(*found.bands(price)) <= price
    whole = found.bands(price + BAND * 96)  # the last band is chosen whole or not at all
    assert found.recall(*whole) >= found.recall(*published) - 1e-9
    assert 0 < found.recall(*whole) <= 1 + 1e-9


def test_recall_grows_with_the_price_up_to_everything() -> None:
    found = attention({77: 0.3, 203: 0.2}, {180: 0.2, 301: 0.1})
    everything = found.pairs(np.ones(S, bool), np.ones(M, bool))
    before = 0.0
    for share in (0, 0.1, 0.3, 0.6, 1):
        recall = found.recall(*found.bands(share * everything))
        assert recall >= before - 1e-9
        before = recall
    assert before > 0.95  # what columns in bands do not cost is spent again, but not to the end


def test_the_forced_lines_come_at_any_price_and_no_head_gets_more_columns_than_allowed() -> None:
    found = attention({77: 0.3, 203: 0.2, 320: 0.1}, {})
    columns, bands = found.bands(0)
    np.testing.assert_array_equal(np.flatnonzero(columns), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(bands), [0, 1])
    columns, _ = found.bands(1e9, most=4)
    assert columns.sum() == 4
    assert columns[[0, 1, 77, 203]].all()


def test_rows_of_a_batch_end_where_they_end() -> None:
    """Two rows and one that ended before the piece: each chosen as alone."""
    first, second = attention({50: 0.3}, {180: 0.2}), attention({50: 0.3}, {180: 0.2}, end=1400, T=76)
    dead = jnp.full_like(first.columns, -jnp.inf)
    stack = [
        jnp.concatenate([a, b, dead])
        for a, b in ((first.columns, second.columns), (first.diagonals, second.diagonals))
    ]
    piece = Piece(jnp.int32(1324), jnp.array([1420, 1400, 30], jnp.int32))
    columns, bands = _select(*stack, jnp.full((3, 1), 9000.0), piece, most_columns=S)
    for b, found in enumerate((first, second)):
        alone = found.bands(9000)
        np.testing.assert_array_equal(columns[b, 0], alone[0])
        np.testing.assert_array_equal(bands[b, 0], alone[1])
    assert not columns[2].any()
    np.testing.assert_array_equal(np.flatnonzero(bands[2, 0]), [0])


def test_the_published_choice_is_kept_where_it_is_very_small_or_nearly_everything() -> None:
    rng = np.random.default_rng(3)
    start, end = 1024, 2048
    columns = jnp.asarray(rng.random((1, 3, end)), jnp.float32).at[..., :30].set(jnp.inf)
    near = jnp.asarray(rng.random((1, 3, end)) + np.arange(end)[::-1] / 50, jnp.float32)
    diagonals = near.at[..., :100].set(jnp.inf)
    budgets = LineBudgets(jnp.array([[30, 300, 600]]), jnp.array([[100, 500, 1900]]), 600)
    piece = Piece(jnp.int32(start), jnp.array([end], jnp.int32))
    published, bands, half = (
        jax.jit(SparsePrefill(budgets, 0, 64, share).choose, static_argnames="layer")(
            columns, diagonals, layer=0, q_start=piece.start, end_B=piece.end_B
        )
        for share in (None, 1.0, 0.5)
    )
    same = [
        all(bool((a[0, n] == b[0, n]).all()) for a, b in zip(published, bands, strict=True)) for n in range(3)
    ]
    assert same == [True, False, True]
    pairs, cost, half_cost = (computed_pairs(*lines, piece)[0] for lines in (published, bands, half))
    assert (cost <= pairs).all()
    assert (half_cost[1:] <= 0.5 * pairs[1:]).all()
