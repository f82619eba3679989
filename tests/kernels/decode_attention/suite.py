"""The suite that every backend of decode attention passes: subclass `DecodeSuite` and name the backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.decode_attention.api import decode_attend
from qwen_jax.rope import Rotary
from tests.kernels import oracle
from tests.kernels.held import held

THETA = 10_000.0
_decode_attend = jax.jit(decode_attend, static_argnames=("rotary", "backend"))


class DecodeSuite:
    """Numerics against the float64 oracle, rows of a batch at different positions, prompt and generated keys."""

    backend: str
    dtype = jnp.float32
    keys_dtype: Any = None  # None: as queries and values
    tolerance = 2e-6
    head_dim = 16
    large_scale = (
        20.0  # scores whose exponential overflows float32; bf16 inputs cannot resolve such a softmax
    )
    unit = 8  # s in tokens is 4 units

    @property
    def s(self) -> int:
        return 4 * self.unit

    def dca(self, original: int = 0) -> DualChunk:
        return DualChunk(5 * self.unit, self.unit, original)

    def check(
        self,
        positions: list[int],
        prompts: list[int],
        dca: DualChunk | None,
        heads: tuple[int, int] = (4, 2),
        scale: float = 0.3,
    ) -> None:
        rng = np.random.default_rng(0)
        B, (N, K), H = len(positions), heads, self.head_dim
        S = 4 * self.s + self.unit // 2
        q = self.random(rng, (B, N, H))
        k, v = (self.random(rng, (B, S, K, H)) for _ in range(2))
        k_BKSH, rotary = held(k, Rotary(THETA, H, 4096, dca=dca), self.keys_dtype)
        layer = 1
        caches = [
            self.random(rng, (3, B, K, S, H)).astype(x.dtype).at[layer].set(x)
            for x in (k_BKSH, jnp.swapaxes(v, 1, 2))
        ]
        out, lse = _decode_attend(
            q,
            *caches,
            layer=jnp.int32(layer),
            position_B=jnp.array(positions, jnp.int32),
            prompt_len_B=jnp.array(prompts, jnp.int32),
            rotary=rotary,
            scale_B=jnp.full(B, scale, jnp.float32),
            backend=self.backend,
        )
        assert out.dtype == q.dtype
        assert lse.dtype == jnp.float32
        original = dca.original_max_position_embeddings if dca else 0
        for b in range(B):
            entitled = [prompts[b] if j < prompts[b] else j + 1 for j in range(S)]
            want_out, want_lse = oracle.attention(
                np.asarray(q[b], np.float64)[None],
                np.asarray(k[b], np.float64),
                np.asarray(v[b], np.float64),
                i_T=np.array([positions[b]]),
                kv_len=S,
                theta=THETA,
                s=dca.chunk_len if dca else None,
                clip=dca.saturation if dca else 0,
                scale=scale,
                key_scale_S=np.array([oracle.temperature(n, original) for n in entitled]),
            )
            got_out, got_lse = np.asarray(out[b], np.float64), np.asarray(lse[b], np.float64)
            error = np.linalg.norm(got_out - want_out[0]) / max(np.linalg.norm(want_out), 1e-30)
            assert error <= self.tolerance
            if positions[b] < 0:
                assert np.isneginf(got_lse).all()
                assert not got_out.any()
            else:
                np.testing.assert_allclose(
                    got_lse, want_lse[0], rtol=10 * self.tolerance, atol=10 * self.tolerance
                )

    def random(self, rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), self.dtype)

    def test_plain_positions(self) -> None:
        self.check([0, 1, 5 * self.unit + 3], [1, 1, 5 * self.unit], None)

    def test_every_stage_and_boundary_in_one_batch(self) -> None:
        s = self.s
        lengths = [1, s - 1, s, s + 1, 5 * self.unit, 5 * self.unit + 1, 2 * s, 2 * s + 1, 3 * s + 5]
        self.check([n - 1 for n in lengths], [max(1, n // 2) for n in lengths], self.dca())

    def test_each_key_carries_the_temperature_it_is_entitled_to(self) -> None:
        s = self.s
        self.check([s + 3, 2 * s + 1, 3 * s], [s, s // 2, 3 * s], self.dca(original=self.unit))

    @pytest.mark.parametrize("heads", [(1, 1), (5, 1), (7, 1), (8, 4)])
    def test_query_groups(self, heads: tuple[int, int]) -> None:
        self.check([self.s + 2], [self.s], self.dca(), heads)

    def test_a_row_that_sees_nothing(self) -> None:
        self.check([-1, 3], [0, 2], self.dca())

    def test_the_papers_clip(self) -> None:
        dca = dataclasses.replace(self.dca(), clip=5 * self.unit - 1)
        self.check([2 * self.s + 3], [self.s], dca)

    def test_large_scores_do_not_overflow(self) -> None:
        self.check([self.s], [self.s], self.dca(), scale=self.large_scale)
