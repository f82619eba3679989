"""Attention over columns and bands against a float64 softmax over exactly the computed keys, and the rule for those."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.sparse_attention import reference
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import bands_of, tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys, computed_pairs
from qwen_jax.rope import Rotary
from tests.kernels import oracle

THETA, H, S, SCALE = 10_000.0, 16, 300, 0.4
DCA = DualChunk(chunk_size=80, local_size=16)  # s = 64
BAND = 12  # divides neither s nor the cache
_attend_lines = jax.jit(attend_lines, static_argnames=("rotary", "most_columns", "band"))


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BATCH", 40)
        yield


def random_lines(rng: np.random.Generator, B: int, N: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """bool[B, N, S] columns and bool[B, N, M] bands: up to `most` of each a head, some heads with none."""
    columns, bands = np.zeros((B, N, S), bool), np.zeros((B, N, tile_distances(S, BAND)), bool)
    for lines, (b, n) in ((lines, at) for lines in (columns, bands) for at in np.ndindex(B, N)):
        size = lines.shape[-1]
        lines[b, n, rng.choice(size, rng.integers(0, min(most, size) + 1), replace=False)] = True
    return columns, bands


def check(
    start: int, T: int, kv_len: tuple[int, ...], dca: DualChunk | None = DCA, heads: tuple[int, int] = (4, 2),
    lines: tuple[np.ndarray, np.ndarray] | None = None, seed: int = 0,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed + start)
    B, (N, K) = len(kv_len), heads
    q = rng.standard_normal((B, T, N, H)).astype(np.float32)
    k, v = (rng.standard_normal((B, S, K, H)).astype(np.float32) for _ in range(2))
    columns, bands = random_lines(rng, B, N, 12) if lines is None else lines
    rotary = Rotary(THETA, H, 1024, dca=dca)
    k_BKSH = jnp.swapaxes(rotary.rotate_keys(jnp.asarray(k), jnp.arange(S, dtype=jnp.int32)), 1, 2)
    v_BKSH = jnp.swapaxes(jnp.asarray(v), 1, 2)
    out, lse = _attend_lines(
        q, *(jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in (k_BKSH, v_BKSH)),
        columns_BNS=columns, bands_BNM=bands, most_columns=S if lines else 12, layer=1, q_start=start, band=BAND,
        kv_len_B=jnp.array(kv_len, jnp.int32), rotary=rotary, scale_B=jnp.full(B, SCALE, jnp.float32),
    )  # fmt: skip
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    for b in range(B):
        i_T = start + np.arange(T)
        real = i_T < kv_len[b]
        keep_TNS = np.stack([computed_keys(columns[b, n], bands[b, n], i_T, BAND) for n in range(N)], 1)
        want_out, want_lse = oracle.attention(
            q[b].astype(np.float64), k[b].astype(np.float64), v[b].astype(np.float64), i_T=i_T, kv_len=kv_len[b],
            theta=THETA, s=dca.chunk_len if dca else None, clip=dca.saturation if dca else 0, scale=SCALE,
            keep_TNS=keep_TNS,
        )  # fmt: skip
        np.testing.assert_allclose(out[b][real], want_out[real], rtol=0, atol=5e-6)
        np.testing.assert_allclose(lse[b][real], want_lse[real], rtol=0, atol=5e-6)


@pytest.mark.parametrize("start", [0, 64, 128, 192])
def test_every_stage(start: int) -> None:
    check(start, 64, (start + 64, start + 40))


@pytest.mark.parametrize("start", [5, 77, 201])
def test_pieces_at_an_offset(start: int) -> None:
    check(start, 37, (start + 37, start + 30))


def test_plain_positions() -> None:
    check(70, 64, (134, 100), dca=None)


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
    check(192, 64, (256, 256), lines=no_lines())


def no_lines() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((2, 4, S), bool), np.zeros((2, 4, tile_distances(S, BAND)), bool)


@pytest.mark.parametrize("stage", ["inter", "succ", "intra"])
def test_a_stage_without_a_line(stage: str) -> None:
    lo, hi = {"inter": (0, 128), "succ": (128, 192), "intra": (192, 256)}[stage]
    columns, bands = no_lines()
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
    none = no_lines()
    every = [~x for x in none]
    for columns, bands in ((every[0], none[1]), (none[0], every[1]), every):
        got = _attend_lines(q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=S, band=BAND, **call)
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
    with pytest.raises(ValueError, match="no sparse attention backend 'none'; there are xla"):
        attend_lines(
            jnp.zeros((1, 4, 1, H)), x, x, columns_BNS=jnp.ones((1, 1, 8), bool), bands_BNM=jnp.ones((1, 1, 1), bool),
            most_columns=8, layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32), rotary=Rotary(THETA, H, 64),
            scale_B=jnp.ones(1), backend="none",
        )  # fmt: skip
