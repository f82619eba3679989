"""The lists of the Hopper kernel against the contract: walking them visits exactly the computed keys, each once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys
from qwen_jax.kernels.sparse_attention.plan import plan
from qwen_jax.rope import Rotary, Stage

S, N = 17 * BAND + 40, 5
SEGMENTS = (Stage.INTRA, Stage.SUCC, Stage.INTER, Stage.INTER, Stage.SUCC, Stage.INTRA)
DCA = DualChunk(5 * BAND, BAND)  # s = 4 bands
_plan = jax.jit(plan, static_argnames=("most_columns", "query_tiles", "dca"))


def lines(rng: np.random.Generator, B: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    columns, bands = np.zeros((B, N, S), bool), np.zeros((B, N, tile_distances(S)), bool)
    for b, n in np.ndindex(B, N):
        columns[b, n, rng.choice(S, most if n == 1 else rng.integers(0, most + 1), replace=False)] = n != 2
        bands[b, n] = rng.random(bands.shape[-1]) < (0, 0.2, 0.5, 1, 0.3)[n]
    return columns, bands


@pytest.mark.parametrize(
    ("first_tile", "dca", "most"),
    [(0, DCA, 300), (4, DCA, 300), (9, DCA, 300), (13, DCA, 3), (7, None, 300), (15, None, 300)],
)
def test_a_walk_of_the_lists_visits_the_computed_keys_once(
    first_tile: int, dca: DualChunk | None, most: int
) -> None:
    tiles = 3
    rotary = Rotary(1e4, 64, 4096, dca=dca)
    rng = np.random.default_rng(first_tile)
    kv_len = np.array([(first_tile + tiles) * BAND - 30, first_tile * BAND + 1, first_tile * BAND])
    B, M = len(kv_len), tile_distances(S)
    columns, bands = lines(rng, B, most)
    start = jnp.int32(first_tile * BAND)
    got = _plan(
        columns, bands, most_columns=most, q_start=start, query_tiles=tiles, kv_len_B=kv_len,
        stage_starts=rotary.stage_starts(start), dca=dca is not None,
    )  # fmt: skip
    items = np.asarray(got.items).reshape(-1, 9)
    near, in_band = (np.asarray(x).reshape(B * N, M) for x in (got.near, got.in_band))
    column_tile = np.asarray(got.column_tile).reshape(B * N, -1)
    stages = {stage: range(*map(int, ends)) for stage, ends in rotary.stage_ranges(start, S).items()}
    assert {(pair, tile) for pair, tile in items[:, :2]} == set(np.ndindex(B * N, tiles))
    for pair, tile, own_keys, *ends in items:
        b, n, c = pair // N, pair % N, first_tile + tile
        assert own_keys == min(max(kv_len[b] - c * BAND, 0), BAND)
        if c * BAND >= kv_len[b]:
            assert set(ends) == {1}
            continue
        visits = np.zeros(S, int)
        for stage, low, high in zip(SEGMENTS, [0, *ends], ends, strict=False):
            for step in range(low, high):
                if step < ends[2]:
                    keys = np.arange(BAND) + (c - near[pair, step]) * BAND
                else:
                    slots = np.arange(BAND) + (step - ends[2]) * BAND
                    apart = c - column_tile[pair, slots]
                    counts = (apart > 0) & (in_band[pair, np.maximum(apart, 0)] == 0)
                    keys = np.asarray(got.position)[pair, slots]
                    assert (keys[counts] // BAND == column_tile[pair, slots][counts]).all()
                    keys = keys[counts]
                assert dca is None or all(int(key) in stages[stage] for key in keys if key < S)
                np.add.at(visits, keys[keys < S], 1)
        want = computed_keys(columns[b, n], bands[b, n], np.array([(c + 1) * BAND - 1]))[0]
        want[c * BAND : (c + 1) * BAND] = True  # the own tile is masked in the kernel
        np.testing.assert_array_equal(visits, want.astype(int))


def test_dear_heads_come_first_and_late_tiles_before_early_ones() -> None:
    columns, bands = lines(np.random.default_rng(0), 1, 50)
    rotary = Rotary(1e4, 64, 4096)
    start = jnp.int32(0)
    got = _plan(
        columns, bands, most_columns=50, q_start=start, query_tiles=17, kv_len_B=np.array([S]),
        stage_starts=rotary.stage_starts(start), dca=False,
    )  # fmt: skip
    items = np.asarray(got.items).reshape(N, 17, 9)
    cost = items[:, :, -1].sum(1)
    assert (np.diff(cost) <= 0).all()
    assert cost[0] > cost[-1]
    assert (np.diff(items[:, :, 1]) == -1).all()
