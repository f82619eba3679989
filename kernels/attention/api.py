"""Prefill attention: the queries of one chunk against the cache, whatever runs it.

Backends are tried in order; one that cannot serve a call raises NotImplementedError with the reason, and if all refuse
every reason is reported. Asking for a backend by name makes its refusal final.
"""

from __future__ import annotations

import jax

from qwen_jax.kernels.attention import reference
from qwen_jax.kernels.backends import Backend, alone, dispatch, given, on_gpu, on_tpu
from qwen_jax.kernels.blocks import Share
from qwen_jax.rope import Rotary

BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": on_gpu("qwen_jax.kernels.attention.mosaic_gpu", "attend"),
    "mosaic_tpu": on_tpu("qwen_jax.kernels.attention.mosaic_tpu", "attend"),
    "cudnn": alone(on_gpu("qwen_jax.kernels.attention.cudnn", "attend")),
    "xla": reference.attend,
}


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
    share: Share | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of T consecutive queries over the cached keys before them, with the positions of `rotary`.

    Query t of row b stands at absolute position i = q_start + t and sees key j iff j <= i and j < kv_len_B[b]; its score is
    scale_B[b] * <rotate(q, stage(i, j)), k_j>. The queries must not straddle a multiple of the rotary's chunk length s.

    Args:
        q_BTNH: queries, not rotated, [B, T, N, H].
        k_LBKSH: keys of all layers, rotated at j mod s, mixed (`kernels.mixing`) if the rotary says so, [L, B, K, S, H]; query
            head n uses KV head n // (N / K).
        v_LBKSH: values, laid out like k; where they are mixed, as those of 8 bits are, so are the results.
        layer: int32 scalar, which layer to read; a value, not a shape.
        q_start: int32 scalar, absolute position of query 0; a value, not a shape.
        kv_len_B: int32[B], tokens of each row that are real.
        rotary: positions, static.
        scale_B: float32[B], the factor on scores: 1 / sqrt(H) times the temperatures of the query and of the keys.
        share: which positions are in the cache, S of its slots; None: slot and position are the same.
        backend: a name in BACKENDS, or None for the first that accepts.

    Returns:
        (out [B, T, N, H] in q's dtype, lse float32[B, T, N], natural log). A row that sees no key gives 0 and -inf.

    Raises:
        NotImplementedError: the named backend, or every backend, refuses; the message holds the reasons.
        ValueError: no backend of that name.
    """
    return dispatch(
        "attention", BACKENDS, backend, q_BTNH, k_LBKSH, v_LBKSH,
        layer=layer, q_start=q_start, kv_len_B=kv_len_B, rotary=rotary, scale_B=scale_B,
        **given(share=share),
    )  # fmt: skip
