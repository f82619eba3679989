"""The suite that every backend of prefill attention passes: subclass `AttentionSuite` and name the backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention.api import attend
from qwen_jax.rope import Rotary
from tests.kernels import oracle
from tests.kernels.held import held

THETA = 10_000.0
_attend = jax.jit(
    attend, static_argnames=("rotary", "backend")
)  # one program serves every start and length of a shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `queries` from `start` on, `kv_len` real tokens a row, in a cache of `capacity`."""

    start: int
    queries: int
    kv_len: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    scale: float = 0.3


class AttentionSuite:
    """Numerics against the float64 oracle: out by relative norm, lse by absolute error."""

    backend: str
    dtype = jnp.float32
    keys_dtype: Any = None  # None: as queries and values
    mixed: bool | None = None  # None: as a cache of that dtype holds them
    tolerance = 2e-6
    head_dim = 16
    large_scale = (
        20.0  # scores whose exponential overflows float32; bf16 inputs cannot resolve such a softmax
    )
    unit = 8  # s in tokens is 4 units; a kernel that needs larger tiles raises it

    @property
    def s(self) -> int:
        return 4 * self.unit

    @property
    def dca(self) -> DualChunk:
        return DualChunk(chunk_size=5 * self.unit, local_size=self.unit)

    def check(self, case: Case, dca: DualChunk | None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        B, H, S = len(case.kv_len), self.head_dim, 4 * self.s + self.unit // 2
        q = self.random(rng, (B, case.queries, case.heads, H))
        k, v = (self.random(rng, (B, S, case.kv_heads, H)) for _ in range(2))
        k_BKSH, rotary = held(k, Rotary(THETA, H, 4096, dca=dca), self.keys_dtype, self.mixed)
        layer, L = 1, 3

        def cached(x_BKSH: jax.Array) -> jax.Array:
            other = self.random(rng, (L, *x_BKSH.shape))
            return other.astype(x_BKSH.dtype).at[layer].set(x_BKSH)

        out, lse = _attend(
            q,
            cached(k_BKSH),
            cached(jnp.swapaxes(v, 1, 2)),
            layer=jnp.int32(layer),
            q_start=jnp.int32(case.start),
            kv_len_B=jnp.array(case.kv_len, jnp.int32),
            rotary=rotary,
            scale_B=jnp.full(B, case.scale, jnp.float32),
            backend=self.backend,
        )
        assert out.dtype == q.dtype
        assert lse.dtype == jnp.float32
        for b in range(B):
            want_out, want_lse = oracle.attention(
                np.asarray(q[b], np.float64),
                np.asarray(k[b], np.float64),
                np.asarray(v[b], np.float64),
                i_T=case.start + np.arange(case.queries),
                kv_len=case.kv_len[b],
                theta=THETA,
                s=dca.chunk_len if dca else None,
                clip=dca.saturation if dca else 0,
                scale=case.scale,
            )
            got_out, got_lse = np.asarray(out[b], np.float64), np.asarray(lse[b], np.float64)
            error = np.linalg.norm(got_out - want_out) / max(np.linalg.norm(want_out), 1e-30)
            assert error <= self.tolerance
            empty = np.isneginf(want_lse)
            assert np.array_equal(np.isneginf(got_lse), empty)
            np.testing.assert_allclose(
                got_lse[~empty], want_lse[~empty], rtol=10 * self.tolerance, atol=10 * self.tolerance
            )
            assert not got_out[empty].any()

    def random(self, rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), self.dtype)

    @pytest.mark.parametrize("start_units", [0, 1, 3])
    def test_plain_positions_at_an_offset(self, start_units: int) -> None:
        n = self.unit
        self.check(Case(start_units * n, 2 * n, ((start_units + 2) * n,)), None)

    @pytest.mark.parametrize("chunk", [0, 1, 2, 3])
    def test_every_stage(self, chunk: int) -> None:
        n = self.unit
        start = chunk * self.s + n
        self.check(Case(start, 2 * n, (start + 2 * n,)), self.dca)

    @pytest.mark.parametrize("end_offset", [-1, 0, 1])
    @pytest.mark.parametrize("chunks", [1, 2])
    def test_lengths_around_a_chunk_boundary(self, chunks: int, end_offset: int) -> None:
        end = chunks * self.s + end_offset
        self.check(Case((end - 1) // self.s * self.s, self.s, (end,)), self.dca)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 1), (7, 1), (8, 4)])
    def test_query_groups(self, heads: int, kv_heads: int) -> None:
        n = self.unit
        self.check(Case(self.s, n, (self.s + n,), heads, kv_heads), self.dca)

    def test_rows_of_different_lengths(self) -> None:
        n = self.unit
        self.check(Case(self.s, 2 * n, (self.s + 2 * n, self.s + n // 2, n + 3)), self.dca)

    def test_one_key(self) -> None:
        self.check(Case(0, self.unit, (1,)), self.dca)

    def test_a_row_that_sees_nothing(self) -> None:
        self.check(Case(0, self.unit, (0, self.unit)), self.dca)

    def test_ragged_queries(self) -> None:
        self.check(Case(2 * self.s, self.unit + 3, (2 * self.s + self.unit + 3,)), self.dca)

    def test_the_papers_clip(self) -> None:
        dca = dataclasses.replace(self.dca, clip=self.dca.chunk_size - 1)
        self.check(Case(2 * self.s, self.unit, (2 * self.s + self.unit,)), dca)

    def test_large_scores_do_not_overflow(self) -> None:
        n = self.unit
        self.check(Case(0, 2 * n, (2 * n,), scale=self.large_scale), None)
