"""Prefill attention through cuDNN, for NVIDIA GPUs and shapes that the Mosaic kernel does not serve.

cuDNN knows neither a query offset nor dual chunk attention. A call is split into the keys before the queries, in up to three
parts (one a stage), and the square of the chunk's own keys; every part is one cuDNN call with run-time lengths, and the parts
are merged by their float32 log-sum-exps. jax.nn rounds those to bfloat16, so the function beneath it is called.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.merge import merge
from qwen_jax.rope import Rotary, Stage

try:
    from jax._src.cudnn import (
        fused_attention_stablehlo as _cudnn,
    )  # private: jax.nn gives no float32 log-sum-exp
except ImportError as missing:
    _cudnn = None  # type: ignore[assignment]
    _MISSING = str(missing)


def attend(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.attention.api.attend`. Copies one layer of the cache, and the chunk's keys.

    Raises:
        NotImplementedError: no NVIDIA GPU, this jax has no such function, or shapes and dtypes cuDNN does not serve.
    """
    if reason := _refusal(q_BTNH, k_LBKSH, v_LBKSH):
        raise NotImplementedError(reason)
    T = q_BTNH.shape[1]
    S = k_LBKSH.shape[3]
    q_start, kv_len_B = jnp.asarray(q_start, jnp.int32), jnp.asarray(kv_len_B, jnp.int32)
    # Keys come in float16, and lose here what that keeps of them: cuDNN's keys and values are of one dtype.
    k_BKSH, v_BKSH = (
        lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(q_BTNH.dtype) for x in (k_LBKSH, v_LBKSH)
    )
    i_T = q_start + jnp.arange(T, dtype=jnp.int32)

    def part(
        stage: Stage, start: jax.Array, end: jax.Array, size: int, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Keys start <= j < end, of which at most `size`."""
        q = rotary.rotate_queries(q_BTNH, i_T, stage, scale_B=scale_B)
        # A window that would pass the cache's end starts earlier: dynamic_slice clamps, and so does `first`.
        first = jnp.minimum(start, S - size)
        k, v = (lax.dynamic_slice_in_dim(x, first, size, axis=2) if size < S else x for x in (k_BKSH, v_BKSH))
        length_B = jnp.clip(jnp.minimum(kv_len_B, end) - start, 0, size)
        if size < S:
            k, v = (jnp.roll(x, first - start, axis=2) for x in (k, v))
        return _call(q, k, v, length_B, causal)

    succ, intra = rotary.stage_starts(q_start)
    window = min(rotary.chunk_len or S, S)
    parts = [
        part(Stage.INTRA, intra, q_start, window, False),
        part(Stage.INTRA, q_start, q_start + T, min(T, S), True),
    ]
    if rotary.dca:
        parts += [
            part(Stage.INTER, jnp.int32(0), succ, S, False),
            part(Stage.SUCC, succ, intra, window, False),
        ]
    out, lse = merge(jnp.stack([o for o, _ in parts]), jnp.stack([x for _, x in parts]), axis=0)
    return out.astype(q_BTNH.dtype), lse


def _call(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, length_B: jax.Array, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k) v over the first length_B keys: (out float32 [B, T, N, H], lse float32 [B, T, N])."""
    assert _cudnn is not None
    B, T, N, _ = q_BTNH.shape
    kind = _cudnn.MaskType.PADDING_CAUSAL if causal else _cudnn.MaskType.PADDING
    out_BNTH, lse = _cudnn.dot_product_attention(
        jnp.swapaxes(q_BTNH, 1, 2), k_BKSH, v_BKSH,
        q_seqlen=jnp.full(B, T, jnp.int32), kv_seqlen=jnp.maximum(length_B, 1),
        scale=1.0, mask_type=kind, qkv_layout="BNTH", return_residual=True,
    )  # fmt: skip
    lse_BTN = jnp.swapaxes(lse.reshape(B, N, T), 1, 2)
    seen = (length_B > 0)[:, None, None]
    out = jnp.where(seen[..., None], jnp.swapaxes(out_BNTH, 1, 2).astype(jnp.float32), 0.0)
    return out, jnp.where(seen, lse_BTN, -jnp.inf)


def _refusal(q_BTNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array) -> str | None:
    """Why cuDNN cannot serve this call, or None."""
    if _cudnn is None:
        return f"this jax has no float32 log-sum-exp from cuDNN ({_MISSING})"
    if jax.default_backend() != "gpu":
        return f"runs on NVIDIA GPUs, not on a {jax.default_backend()}"
    if "cuda" not in jax.devices()[0].client.platform_version.lower():
        return "runs on NVIDIA GPUs"
    dtypes = {q_BTNH.dtype, v_LBKSH.dtype} | ({k_LBKSH.dtype} - {jnp.dtype(jnp.float16)})
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        got = ", ".join(sorted(str(d) for d in dtypes))
        return f"needs bfloat16 or float16 throughout, or float16 keys beside bfloat16, got {got}"
    if q_BTNH.shape[3] % 8 or q_BTNH.shape[3] > 128:
        return f"needs a head dimension that is a multiple of 8 up to 128, got {q_BTNH.shape[3]}"
    return None
