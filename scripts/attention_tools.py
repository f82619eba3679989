"""What the attention scripts share: random inputs, attention straight from the definition, and interleaved timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.config import DualChunk
from qwen_jax.rope import Rotary, Stage

QWEN_1M = DualChunk(chunk_size=262_144, local_size=8_192, original_max_position_embeddings=262_144)


def rotary(head_dim: int, dca: DualChunk | None, max_position: int = 1 << 20) -> Rotary:
    """The positions of the 1M models, or the same with plain RoPE."""
    return Rotary(10_000_000.0, head_dim, max_position, dca=dca)


def random(key: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Standard normal values, made on the device."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(key), shape, jnp.float32).astype(dtype))()


def exact(
    q_RNH: jax.Array,
    i_R: np.ndarray,
    k_KSH: jax.Array,
    v_KSH: jax.Array,
    *,
    kv_len: int,
    rotary: Rotary,
    scale: float,
    key_factor_S: jax.Array | None = None,
    keep_RNS: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """float32 attention of R query rows at positions i_R over the rotated keys of one batch row: one softmax over all keys.

    `keep_RNS` narrows the keys that each query row and head sees.
    Every stage's scores are computed in full and picked by key: nothing is shared with the kernels but the rotations.
    Returns (out [R, N, H], lse [R, N]).
    """
    return _exact(
        q_RNH,
        jnp.asarray(i_R, jnp.int32),
        k_KSH,
        v_KSH,
        jnp.int32(kv_len),
        jnp.float32(scale),
        key_factor_S,
        None if keep_RNS is None else jnp.asarray(keep_RNS),
        rotary,
    )


@jax.jit(static_argnames="rotary")
def _exact(
    q_RNH: jax.Array, i_R: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, kv_len: jax.Array, scale: jax.Array,
    key_factor_S: jax.Array | None, keep_RNS: jax.Array | None, rotary: Rotary,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    R, N, H = q_RNH.shape
    K, S, _ = k_KSH.shape
    j_S = jnp.arange(S, dtype=jnp.int32)
    apart_RS = i_R[:, None] // (rotary.chunk_len or 1 << 30) - j_S // (rotary.chunk_len or 1 << 30)
    stages = (Stage.INTRA, Stage.SUCC, Stage.INTER) if rotary.dca else (Stage.INTRA,)
    q_PRNH = jnp.stack([rotary.rotate_queries(q_RNH.astype(jnp.float32), i_R, stage) for stage in stages])
    seen_RS = (j_S <= i_R[:, None]) & (j_S < kv_len)

    def head(group: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_PRGH, k_SH, v_SH, *keep = group
        seen_RGS = seen_RS[:, None] & keep[0] if keep else seen_RS[:, None]
        s_PRGS = jnp.einsum(
            "PRGH,SH->PRGS", q_PRGH, k_SH.astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        s = s_PRGS[0]
        for stage in stages[1:]:
            far = apart_RS == 1 if stage is Stage.SUCC else apart_RS >= 2
            s = jnp.where(far[:, None], s_PRGS[stage], s)
        s = s * scale if key_factor_S is None else s * scale * key_factor_S
        s = jnp.where(seen_RGS, s, -jnp.inf)
        peak = s.max(-1, keepdims=True)
        p = jnp.where(seen_RGS, jnp.exp(s - jnp.where(jnp.isneginf(peak), 0.0, peak)), 0.0)
        total = p.sum(-1)
        out = jnp.einsum("RGS,SH->RGH", p, v_SH.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return out / jnp.where(total > 0, total, 1.0)[..., None], peak[..., 0] + jnp.log(total)

    q_KPRGH = jnp.moveaxis(q_PRNH.reshape(len(stages), R, K, N // K, H), 2, 0)
    keep = () if keep_RNS is None else (jnp.moveaxis(keep_RNS.reshape(R, K, N // K, S), 1, 0),)
    out_KRGH, lse_KRG = lax.map(head, (q_KPRGH, k_KSH, v_KSH, *keep))
    return jnp.moveaxis(out_KRGH, 0, 1).reshape(R, N, H), jnp.moveaxis(lse_KRG, 0, 1).reshape(R, N)


def relative_error(got: Any, want: Any) -> float:
    """||got - want|| / ||want|| in float64; infinite where got has a NaN."""
    got, want = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, want))
    error = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
    return error if np.isfinite(error) else float("inf")


def worst_row_error(got: Any, want: Any) -> float:
    """The largest `relative_error` of a query row; rows that see few keys would hide the others in one norm."""
    return max(relative_error(g, w) for g, w in zip(got, want, strict=True))


def interleaved_medians(
    runs: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]],
    rounds: int = 5,
    at_least_s: float = 0.02,
    at_most_s: float = float("inf"),
) -> dict[str, float]:
    """Median seconds a call, all contenders in turn in every round, so that clocks and temperature favour none.

    runs: name -> (start a call without waiting, wait for what it returned). Each measurement spans at least `at_least_s`.
    After `at_most_s` no further round begins.
    """
    repeats: dict[str, int] = {}
    for name, (start, wait) in runs.items():
        wait(start())
        begin = time.perf_counter()
        wait(start())
        repeats[name] = max(1, int(at_least_s / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - began > at_most_s:
            break
        for name, (start, wait) in runs.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                last = start()
            wait(last)
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(seconds) for name, seconds in times.items()}
