"""Decode attention: one query a row against the cache, whatever runs it. Refusals work as in `kernels.attention`."""

from __future__ import annotations

import jax

from qwen_jax.kernels.backends import Backend, dispatch, given, on_gpu, on_tpu
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.decode_attention import reference
from qwen_jax.rope import Rotary

BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": on_gpu("qwen_jax.kernels.decode_attention.mosaic_gpu", "decode_attend"),
    "mosaic_tpu": on_tpu("qwen_jax.kernels.decode_attention.mosaic_tpu", "decode_attend"),
    "xla": reference.decode_attend,
}


def decode_attend(
    q_BNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    position_B: jax.Array,
    prompt_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    k_scale_LBKS: jax.Array | None = None,
    v_scale_LBKS: jax.Array | None = None,
    share: Share | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query a row, each at its own position, over all keys j <= position_B[b] that the cache holds.

    The score of key j is scale_B[b] * m_j * <rotate(q, stage), k_j>, m_j the temperature the key is entitled to:
    m(prompt_len_B[b]) for a key of the prompt, m(j + 1) for a generated one (`algorithms.md` 3.2).

    Args:
        q_BNH: queries, not rotated, [B, N, H].
        k_LBKSH: keys of all layers, rotated at j mod s, unscaled, [L, B, K, S, H]; for a rotary that is `mixed`, mixed
            (`kernels.mixing`).
        v_LBKSH: values, like k; mixed if they have 8 bits.
        layer: int32 scalar, which layer to read.
        position_B: int32[B], absolute position of each row's query; -1 for a row that is to see nothing.
        prompt_len_B: int32[B], tokens of each row's prompt.
        rotary: positions and original_max_position_embeddings, static.
        scale_B: float32[B], 1 / sqrt(H) times the query's temperature m(position + 1).
        k_scale_LBKS, v_scale_LBKS: with a cache of 8-bit numbers, their factors as `kernels.quantised.quantise` makes them,
            float32[L, B, K, S].
        share: which positions are in the cache, S of its slots; None: slot and position are the same.
        backend: a name in BACKENDS, or None for the first that accepts.

    Returns:
        (out [B, N, H] in q's dtype, lse float32[B, N], natural log). A row that sees no key gives 0 and -inf.

    Raises:
        NotImplementedError: the named backend, or every backend, refuses; the message holds the reasons.
        ValueError: no backend of that name, or 8-bit numbers, which are mixed, and a rotary that is not.
    """
    if k_scale_LBKS is not None and not rotary.mixed:
        raise ValueError("keys of 8 bits are mixed: the rotary of their queries needs mixed=True")
    return dispatch(
        "decode attention", BACKENDS, backend, q_BNH, k_LBKSH, v_LBKSH,
        layer=layer, position_B=position_B, prompt_len_B=prompt_len_B, rotary=rotary, scale_B=scale_B,
        **given(k_scale_LBKS=k_scale_LBKS, v_scale_LBKS=v_scale_LBKS, share=share),
    )  # fmt: skip
