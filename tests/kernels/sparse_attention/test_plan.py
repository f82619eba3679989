"""The lists of the Hopper kernel against the contract: walking them visits exactly the computed keys, each once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import DualChunk
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.sparse_attention import tiles
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys
from qwen_jax.kernels.sparse_attention.plan import plan
from qwen_jax.kernels.sparse_attention.tiles import Tiles
from qwen_jax.rope import Rotary, Stage

S, N = 17 * BAND + 40, 5
SEGMENTS = (Stage.INTRA, Stage.SUCC, Stage.INTER, Stage.INTER, Stage.SUCC, Stage.INTRA)
DCA = DualChunk(5 * BAND, BAND)  # s = 4 bands
_plan = jax.jit(plan, static_argnames=("most_columns", "query_tiles", "dca"))


def lines(rng: np.random.Generator, B: int, most: int, capacity: int = S) -> tuple[np.ndarray, np.ndarray]:
    columns, bands = np.zeros((B, N, capacity), bool), np.zeros((B, N, tile_distances(capacity)), bool)
    for b, n in np.ndindex(B, N):
        chosen = rng.choice(capacity, most if n == 1 else rng.integers(0, most + 1), replace=False)
        columns[b, n, chosen] = n != 2
        bands[b, n] = rng.random(bands.shape[-1]) < (0, 0.2, 0.5, 1, 0.3)[n]
    return columns, bands


def walked(
    columns: np.ndarray, bands: np.ndarray, first_tile: int, tiles: int, kv_len: np.ndarray,
    dca: DualChunk | None, most: int, share: Share | None = None,
) -> dict[tuple[int, int], np.ndarray]:  # fmt: skip
    """By (head of a row, query tile): how often a walk of the lists visits the key at every position."""
    B, _, capacity = columns.shape
    R, slot_position = 1, np.arange(capacity)
    if share:
        dealt = share.blocks.deal(columns, 2)
        R, slot_position = share.blocks.round // BAND, share.blocks.deal(slot_position, 0)
        columns, slot_position = (
            np.asarray(jnp.split(x, share.blocks.count, -1)[int(share.rank)]) for x in (dealt, slot_position)
        )
    M = bands.shape[-1]
    rotary, start = Rotary(1e4, 64, 4096, dca=dca), jnp.int32(first_tile * BAND)
    got = _plan(
        columns, bands, most_columns=most, q_start=start, query_tiles=tiles, kv_len_B=kv_len,
        stage_starts=rotary.stage_starts(start), dca=dca is not None, share=share,
    )  # fmt: skip
    items, near = np.asarray(got.items).reshape(-1, 9), np.asarray(got.near).reshape(B * N, R, -1)
    in_band, column_tile = (np.asarray(x).reshape(B * N, -1) for x in (got.in_band, got.column_tile))
    assert in_band.shape[1] == M
    stages = {stage: range(*map(int, ends)) for stage, ends in rotary.stage_ranges(start, capacity).items()}
    assert {(pair, tile) for pair, tile in items[:, :2]} == set(np.ndindex(B * N, tiles))
    here = np.zeros(M * BAND, bool)
    here[slot_position] = True
    visits = {}
    for pair, tile, own_keys, *ends in items:
        c, length = first_tile + tile, kv_len[pair // N]
        count = visits[int(pair), int(tile)] = np.zeros(M * BAND, int)
        if c * BAND >= length:
            assert own_keys == 0
            assert set(ends) == {1}
            continue
        skipped = int(not here[c * BAND] and ends[2] + (own_keys > BAND) > 1)
        assert own_keys == (min(length - c * BAND, BAND) if here[c * BAND] else 2 * BAND * skipped)
        assert near[pair, c % R, 0] == 0
        for stage, low, high in zip(SEGMENTS, [0, *ends], ends, strict=False):
            for step in range(low, high):
                if step == 0 and not own_keys:
                    continue  # nothing of it is here
                if step < ends[2]:
                    keys = np.arange(BAND) + (c - near[pair, c % R, step + skipped]) * BAND
                    assert here[keys[0]]
                else:
                    slots = np.arange(BAND) + (step - ends[2]) * BAND
                    apart = c - column_tile[pair, slots]
                    counts = (apart > 0) & (in_band[pair, np.maximum(apart, 0)] == 0)
                    keys = slot_position[np.asarray(got.position)[pair, slots]]
                    assert (keys[counts] // BAND == column_tile[pair, slots][counts]).all()
                    keys = keys[counts]
                assert dca is None or all(int(key) in stages[stage] for key in keys if key < capacity)
                np.add.at(count, keys, 1)
    return visits


def check_walk(
    columns: np.ndarray, bands: np.ndarray, first_tile: int, tiles: int, kv_len: np.ndarray,
    visits: dict[tuple[int, int], np.ndarray],
) -> None:  # fmt: skip
    capacity = columns.shape[-1]
    for (pair, tile), count in visits.items():
        b, n, c = pair // N, pair % N, first_tile + tile
        if c * BAND >= kv_len[b]:
            continue
        want = computed_keys(columns[b, n], bands[b, n], np.array([(c + 1) * BAND - 1]))[0]
        want[c * BAND : (c + 1) * BAND] = True  # the own tile is masked in the kernel
        np.testing.assert_array_equal(count[:capacity], want.astype(int))


@pytest.mark.parametrize(
    ("first_tile", "dca", "most"),
    [(0, DCA, 300), (4, DCA, 300), (9, DCA, 300), (13, DCA, 3), (7, None, 300), (15, None, 300)],
)
def test_a_walk_of_the_lists_visits_the_computed_keys_once(
    first_tile: int, dca: DualChunk | None, most: int
) -> None:
    tiles = 3
    kv_len = np.array([(first_tile + tiles) * BAND - 30, first_tile * BAND + 1, first_tile * BAND])
    columns, bands = lines(np.random.default_rng(first_tile), len(kv_len), most)
    visits = walked(columns, bands, first_tile, tiles, kv_len, dca, most)
    check_walk(columns, bands, first_tile, tiles, kv_len, visits)


@pytest.mark.parametrize(
    ("blocks", "first_tile", "dca", "most"),
    [
        (Blocks(BAND, 2), 0, DCA, 300),
        (Blocks(BAND, 2), 13, DCA, 300),
        (Blocks(2 * BAND, 2), 9, DCA, 300),
        (Blocks(BAND, 4), 9, DCA, 300),
        (Blocks(BAND, 8), 20, None, 300),
        (Blocks(3 * BAND, 2), 20, DCA, 3),  # rounds that divide no chunk
    ],
)
def test_the_walks_of_several_devices_visit_the_computed_keys_once(
    blocks: Blocks, first_tile: int, dca: DualChunk | None, most: int
) -> None:
    tiles = 3
    kv_len = np.array([(first_tile + tiles) * BAND - 30, first_tile * BAND + 1, first_tile * BAND])
    columns, bands = lines(np.random.default_rng(first_tile), len(kv_len), most, 24 * BAND)
    visits = [
        walked(columns, bands, first_tile, tiles, kv_len, dca, most, Share(blocks, jnp.int32(rank)))
        for rank in range(blocks.count)
    ]
    together = {item: sum(one[item] for one in visits) for item in visits[0]}
    check_walk(columns, bands, first_tile, tiles, kv_len, together)


@settings(deadline=None, max_examples=40)
@given(
    each=st.integers(1, 3), count=st.integers(1, 5), distances=st.sampled_from([1, 14, 47]), data=st.data()
)
def test_lists_of_distances_hold_the_tiles_before_a_query_that_are_here(
    each: int, count: int, distances: int, data: st.DataObject
) -> None:
    blocks = Blocks(each * BAND, count)
    rank = data.draw(st.integers(0, count - 1))
    here = Tiles(Share(blocks, rank))
    owner = np.arange(distances + 3 * each * count) // each % count  # of every tile of positions
    listed = np.asarray(here.distances(distances))
    assert listed.shape == (tiles.residues(blocks), tiles.entries(blocks, distances))
    np.testing.assert_array_equal(here.holds(np.arange(len(owner))), owner == rank)
    mine = np.flatnonzero(owner == rank)
    np.testing.assert_array_equal(here.position(np.arange(len(mine))), mine)
    below = np.searchsorted(mine, np.arange(len(owner)))
    np.testing.assert_array_equal(here.below(np.arange(len(owner))), below)
    for c in range(distances, len(owner)):
        want = [0, *(D for D in range(1, distances) if owner[c - D] == rank)]
        found = listed[c % tiles.residues(blocks)]
        assert found[found < distances].tolist() == want
        assert (np.diff(found[1:]) > 0).all()


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
