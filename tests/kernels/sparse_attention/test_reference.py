"""Attention over columns and bands against a float64 softmax over exactly the computed keys, and the rule for those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from qwen_jax.cache import KVCache, write_chunk
from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.sparse_attention import reference
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import bands_of, tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys, computed_pairs
from qwen_jax.rope import Rotary
from scripts import tpu_topology
from tests.kernels.sparse_attention import suite
from tests.kernels.sparse_attention.suite import SCALE, THETA, Check

H, S = 16, 300
DCA = DualChunk(chunk_size=80, local_size=16)  # s = 64
BAND = 12  # divides neither s nor the cache
check = Check("xla", BAND, S, H, DCA)


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BATCH", 40)
        yield


@pytest.mark.parametrize("start", [0, 64, 128, 192])
def test_every_stage(start: int) -> None:
    check(start, 64, (start + 64, start + 40))


@pytest.mark.parametrize("start", [5, 77, 201])
def test_pieces_at_an_offset(start: int) -> None:
    check(start, 37, (start + 37, start + 30))


def test_plain_positions() -> None:
    check(70, 64, (134, 100), plain=True)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1)])
def test_query_groups(heads: tuple[int, int]) -> None:
    check(192, 37, (229,), heads=heads)


def test_the_papers_clip() -> None:
    check(192, 64, (256, 230), dca=DualChunk(80, 16, clip=79))


def test_rows_that_ended_before_the_piece_are_finite() -> None:
    check(192, 64, (256, 100))
    check(192, 64, (0, 192))


def test_the_cache_end_bounds_the_tiles() -> None:
    check(256, 44, (300, 299))


def test_without_a_line_a_query_sees_its_own_tile() -> None:
    check(192, 64, (256, 256), lines=check.no_lines(2, 4))


@pytest.mark.parametrize("stage", ["inter", "succ", "intra"])
def test_a_stage_without_a_line(stage: str) -> None:
    lo, hi = {"inter": (0, 128), "succ": (128, 192), "intra": (192, 256)}[stage]
    columns, bands = check.no_lines(2, 4)
    columns[..., ::9] = True
    columns[..., lo:hi] = False
    check(192, 64, (256, 256), lines=(columns, bands))


def test_all_lines_are_dense_attention() -> None:
    rng = np.random.default_rng(3)
    start, T = 192, 64
    q = jnp.asarray(rng.standard_normal((2, T, 4, H)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((1, 2, 2, S, H)), jnp.float32) for _ in range(2))
    call = {
        "layer": 0, "q_start": start, "kv_len_B": jnp.array([256, 256], jnp.int32),
        "rotary": Rotary(THETA, H, 1024, dca=DCA), "scale_B": jnp.full(2, SCALE, jnp.float32),
    }  # fmt: skip
    want = attend(q, k, v, backend="xla", **call)
    none = check.no_lines(2, 4)
    every = [~x for x in none]
    for columns, bands in ((every[0], none[1]), (none[0], every[1]), every):
        got = suite.attend(q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=S, band=BAND, **call)
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    columns=st.sets(st.integers(0, S - 1), max_size=20), distances=st.sets(st.integers(0, S - 1), max_size=20),
    start=st.integers(0, 230), length=st.integers(1, 70), band=st.integers(1, 40),
)  # fmt: skip
def test_the_computed_set_holds_the_chosen_one_and_touches_no_tile_in_vain(
    columns: set[int], distances: set[int], start: int, length: int, band: int
) -> None:
    columns_S, diagonals_S = np.zeros((2, S), bool)
    columns_S[list(columns)], diagonals_S[list(distances)] = True, True
    bands_M = np.asarray(bands_of(jnp.asarray(diagonals_S), band))
    i_T, j_S = np.arange(start, start + length), np.arange(S)
    distance = i_T[:, None] - j_S
    keys = computed_keys(columns_S, bands_M, i_T, band)
    causal = distance >= 0
    chosen = (columns_S | diagonals_S[np.clip(distance, 0, S - 1)]) & causal  # `algorithms.md` 4.4
    assert keys[chosen].all()
    assert not keys[~causal].any()
    for D in np.flatnonzero(bands_M[1:]) + 1:
        assert diagonals_S[max((D - 1) * band + 1, 0) : (D + 1) * band].any()
    piece = {"q_start": start, "queries": 70, "kv_len": start + length, "band": band}
    assert computed_pairs(columns_S, bands_M, **piece) == keys.sum()


def test_an_unknown_backend_is_refused() -> None:
    x = jnp.zeros((1, 1, 1, 8, H))
    with pytest.raises(
        ValueError, match="no sparse attention backend 'none'; there are mosaic_gpu, mosaic_tpu, xla"
    ):
        attend_lines(
            jnp.zeros((1, 4, 1, H)), x, x, columns_BNS=jnp.ones((1, 1, 8), bool), bands_BNM=jnp.ones((1, 1, 1), bool),
            most_columns=8, layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32), rotary=Rotary(THETA, H, 64),
            scale_B=jnp.ones(1), backend="none",
        )  # fmt: skip


@pytest.mark.skipif(tpu_topology.why_no_compiler() is not None, reason=tpu_topology.why_no_compiler() or "")
def test_on_a_tpu_a_spread_cache_is_carried_through_the_layers_without_a_copy() -> None:
    """Over a context axis TPUs take this backend."""
    L, T, N, S, H, blocks = 6, 4096, 7, 63_488, 128, Blocks(512, 4)
    rotary, shape = Rotary(1e7, H, 1 << 20, dca=DualChunk(262_144, 8192)), jax.ShapeDtypeStruct

    def layers(q: Any, cache: Any, columns: Any, bands: Any, start: Any, rank: Any) -> Any:
        def layer(state: tuple[Any, Any], layer: Any) -> tuple[Any, None]:
            (q, cache), share = state, Share(blocks, rank)
            k = q[:, : T // blocks.count, :1]
            cache = write_chunk(cache, k, k, layer=layer, start=start, share=share)
            out, _ = reference.attend_lines(
                q, cache.k, cache.v, columns_BNS=columns, bands_BNM=bands, most_columns=4096, layer=layer, q_start=start,
                kv_len_B=start[None] + T, rotary=rotary, scale_B=jnp.ones(1), share=share,
            )  # fmt: skip
            return (out, cache), None

        return lax.scan(layer, (q, cache), jnp.arange(L, dtype=jnp.int32))[0]

    kv, scalar = shape((L, 1, 1, S, H), jnp.bfloat16), shape((), jnp.int32)
    compiled = tpu_topology.compile_for_one(
        tpu_topology.SMALLEST["v6e"], layers, shape((1, T, N, H), jnp.bfloat16), KVCache(kv, kv),
        shape((1, N, S), bool), shape((1, N, tile_distances(blocks.count * S)), bool), scalar, scalar, donate_argnums=1,
    )  # fmt: skip
    assert (
        compiled.memory_analysis().temp_size_in_bytes < L * S * H * 2
    )  # no copy of the keys, nor of the values
