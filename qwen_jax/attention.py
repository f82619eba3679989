"""Attention of one layer with the cache: write the new keys and values, attend, and over several devices meet.

Along the mesh axis `context` queries travel and keys stay: each device attends with the queries of the whole piece to
the keys it holds, and the parts are merged by log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import jax

from qwen_jax.cache import KVCache, write_chunk, write_token
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.decode_attention.api import decode_attend
from qwen_jax.rope import Rotary
from qwen_jax.sparsity.attention import SparsePrefill, attend_prompts
from qwen_jax.spread import Spread, gather_queries, merge_outputs, scatter_outputs


def prefill_layer(
    spread: Spread | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: KVCache,
    sparse: SparsePrefill | None,
    *,
    layer: jax.Array,
    start: jax.Array,
    first: jax.Array,
    prompt_len_B: jax.Array,
    scale_B: jax.Array,
    rotary: Rotary,
    backend: str | None,
) -> tuple[jax.Array, KVCache]:
    """A piece of T positions from `start` on: (out [B, T, N, H], the cache with its keys and values).

    Args:
        spread: over which devices; T is then in the order of `Blocks.deal`.
        first: int32 scalar, the first position that is real: what the cache holds below it stays.
        layer, start, prompt_len_B, scale_B, rotary, backend: as `sparsity.attention.attend_prompts` takes them.
    """

    def body(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, sparse: SparsePrefill | None,
        layer: jax.Array, start: jax.Array, first: jax.Array, prompt_len_B: jax.Array, scale_B: jax.Array,
        share: Share | None = None,
    ) -> tuple[jax.Array, KVCache]:  # fmt: skip
        cache = write_chunk(cache, k, v, layer=layer, start=start, first=first, share=share)
        out, lse, _ = attend_prompts(
            gather_queries(q, share), cache, sparse,
            layer=layer, q_start=start, prompt_len_B=prompt_len_B, rotary=rotary, scale_B=scale_B,
            first=first if share else None, share=share, backend=backend,
        )  # fmt: skip
        return scatter_outputs(out, lse, share), cache

    arguments: tuple[Any, ...] = (
        q_BTNH, k_BTKH, v_BTKH, cache, sparse, layer, start, first, prompt_len_B, scale_B
    )  # fmt: skip
    if spread is None:
        return body(*arguments)
    letters = ("BTN", "BTK", "BTK", "LBKS", "LN", "", "", "", "B", "B")
    return spread.run(body, letters, ("BTN", "LBKS"), *arguments)


def decode_layer(
    spread: Spread | None,
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    cache: KVCache,
    *,
    layer: jax.Array,
    position_B: jax.Array,
    prompt_len_B: jax.Array,
    scale_B: jax.Array,
    rotary: Rotary,
    backend: str | None,
) -> tuple[jax.Array, KVCache]:
    """One token a row: (out [B, N, H], the cache with its key and value).

    Over a context axis every device has every token; the owner of its position writes it.

    Args:
        layer, position_B, prompt_len_B, scale_B, rotary, backend: as `kernels.decode_attention.api.decode_attend` takes them.
    """

    def body(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache,
        layer: jax.Array, position_B: jax.Array, prompt_len_B: jax.Array, scale_B: jax.Array,
        share: Share | None = None,
    ) -> tuple[jax.Array, KVCache]:  # fmt: skip
        cache = write_token(cache, k, v, layer=layer, positions_B=position_B, share=share)
        out, lse = decode_attend(
            q, cache.k, cache.v,
            layer=layer, position_B=position_B, prompt_len_B=prompt_len_B, rotary=cache.met_by(rotary), scale_B=scale_B,
            k_scale_LBKS=cache.k_scale, v_scale_LBKS=cache.v_scale, share=share, backend=backend,
        )  # fmt: skip
        return merge_outputs(out, lse, share), cache

    arguments = (q_BNH, k_BKH, v_BKH, cache, layer, position_B, prompt_len_B, scale_B)
    if spread is None:
        return body(*arguments)
    letters = ("BN", "BK", "BK", "LBKS", "", "B", "B", "B")
    return spread.run(body, letters, ("BN", "LBKS"), *arguments)
