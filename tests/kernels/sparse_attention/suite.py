"""The check that every backend of sparse attention passes: a float64 softmax over exactly the keys of the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DualChunk
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.merge import merge
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys
from qwen_jax.rope import Rotary
from tests.kernels import oracle
from tests.kernels.held import held

THETA, SCALE = 10_000.0, 0.4
attend = jax.jit(attend_lines, static_argnames=("rotary", "most_columns", "band", "backend"))


@dataclasses.dataclass(frozen=True)
class Check:
    """Calls of one backend on one size of cache.

    Attributes:
        backend, band: arguments of `attend_lines`.
        capacity: S.
        head_dim: H.
        dca: dual chunk attention of calls that do not say.
        dtype: of queries, keys and values. keys_dtype: that of keys, where it is another.
        tolerance: absolute, on outputs; ten times as much on log-sum-exps.
        most: largest number of columns a head in random lines.
    """

    backend: str
    band: int
    capacity: int
    head_dim: int
    dca: DualChunk
    dtype: Any = jnp.float32
    keys_dtype: Any = None
    tolerance: float = 5e-6
    most: int = 12

    def no_lines(self, B: int, N: int) -> tuple[np.ndarray, np.ndarray]:
        """bool[B, N, S] columns and bool[B, N, M] bands."""
        return np.zeros((B, N, self.capacity), bool), np.zeros(
            (B, N, tile_distances(self.capacity, self.band)), bool
        )

    def random_lines(self, rng: np.random.Generator, B: int, N: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `most` columns and any number of bands a head."""
        found = self.no_lines(B, N)
        for lines, (b, n) in ((lines, at) for lines in found for at in np.ndindex(B, N)):
            size = lines.shape[-1]
            count = rng.integers(0, min(self.most, size) + 1)
            lines[b, n, rng.choice(size, count, replace=False)] = True
        return found

    def __call__(
        self, start: int, T: int, kv_len: tuple[int, ...], heads: tuple[int, int] = (4, 2), *,
        plain: bool = False, dca: DualChunk | None = None, lines: tuple[np.ndarray, np.ndarray] | None = None,
        blocks: Blocks | None = None,
    ) -> None:  # fmt: skip
        """T queries from `start` on; rows of kv_len tokens; `plain` positions or `dca`; random lines or `lines`; a cache that
        is dealt to devices in `blocks`, one after another, and their results merged."""
        rng = np.random.default_rng(start)
        dca = None if plain else dca or self.dca
        B, S, H, (N, K) = len(kv_len), self.capacity, self.head_dim, heads

        def random(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        q, k, v = random(B, T, N, H), random(B, S, K, H), random(B, S, K, H)
        columns, bands = self.random_lines(rng, B, N) if lines is None else lines
        k_BKSH, rotary = held(k, Rotary(THETA, H, 4096, dca=dca), self.keys_dtype)
        v_BKSH = jnp.swapaxes(v, 1, 2)
        devices = blocks.count if blocks else 1

        def dealt(x: jax.Array, axis: int) -> list[jax.Array]:
            return jnp.split(blocks.deal(x, axis), devices, axis) if blocks else [x]

        arrays = zip(dealt(k_BKSH, 2), dealt(v_BKSH, 2), dealt(jnp.asarray(columns), 2), strict=True)
        parts = [
            attend(
                q, *(jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in (k_BKSH, v_BKSH)),
                columns_BNS=columns_BNS, bands_BNM=bands, most_columns=S if lines else self.most, layer=1, q_start=start,
                kv_len_B=jnp.array(kv_len, jnp.int32), rotary=rotary, scale_B=jnp.full(B, SCALE, jnp.float32),
                band=self.band, backend=self.backend, share=Share(blocks, jnp.int32(rank)) if blocks else None,
            )
            for rank, (k_BKSH, v_BKSH, columns_BNS) in enumerate(arrays)
        ]  # fmt: skip
        for out, lse in parts:
            assert out.dtype == q.dtype
            assert lse.dtype == jnp.float32
            assert jnp.isfinite(out).all()
            assert not jnp.isnan(lse).any()
        out, lse = parts[0]
        if blocks:
            outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
            assert not outs[jnp.isneginf(lses)].any()
            out, lse = merge(outs.astype(jnp.float32), lses, 0)
        for b in range(B):
            i_T = start + np.arange(T)
            real = i_T < kv_len[b]
            keep_TNS = np.stack(
                [computed_keys(columns[b, n], bands[b, n], i_T, self.band) for n in range(N)], 1
            )
            want_out, want_lse = oracle.attention(
                *(np.asarray(x[b], np.float64) for x in (q, k, v)), i_T=i_T, kv_len=kv_len[b], theta=THETA,
                s=dca.chunk_len if dca else None, clip=dca.saturation if dca else 0, scale=SCALE, keep_TNS=keep_TNS,
            )  # fmt: skip
            got = np.asarray(out[b], np.float64)[real], np.asarray(lse[b])[real]
            np.testing.assert_allclose(got[0], want_out[real], rtol=0, atol=self.tolerance)
            np.testing.assert_allclose(got[1], want_lse[real], rtol=0, atol=10 * self.tolerance)
