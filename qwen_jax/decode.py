"""The decode loop on the device: sample, write, attend, until every row has stopped or the block is full.

The host sees whole blocks of tokens, for streaming and stop strings; nothing crosses between two tokens of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding

from qwen_jax.cache import KVCache
from qwen_jax.linear import IN_CUBLAS
from qwen_jax.processes import replicated
from qwen_jax.request import pad
from qwen_jax.sampling import (
    ResolvedSampling,
    SamplingControls,
    mark_seen,
    row_seeds,
    sample,
    seen_tokens,
    step_keys,
)

BLOCK = 32  # tokens between two looks of the host
NO_TOKEN = -1


class Decoding(NamedTuple):
    """What changes from token to token.

    Attributes:
        token_B: int32[B], the newest token of each row, sampled but not yet in the cache.
        position_B: int32[B], the absolute position of that token.
        count_B: int32[B], tokens sampled so far.
        done_B: bool[B], rows that met an end token or their limit.
        seen_BV: bool[B, V], tokens the repetition penalty applies to.
    """

    token_B: jax.Array
    position_B: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array


class Request(NamedTuple):
    """What stays fixed while a batch decodes.

    Attributes:
        prompt_len_B: int32[B]. limit_B: int32[B], most tokens to sample.
        eos_BE: int32[B, E], end tokens of each row, padded with NO_TOKEN.
        controls: sampling settings, [B] each. seeds_B2: uint32[B, 2], each row's.
    """

    prompt_len_B: jax.Array
    limit_B: jax.Array
    eos_BE: jax.Array
    controls: SamplingControls
    seeds_B2: jax.Array

    @classmethod
    def of(
        cls,
        prompt_len_B: np.ndarray,
        limit_B: np.ndarray,
        settings: Sequence[ResolvedSampling],
        where: NamedSharding | None = None,
    ) -> Request:
        """One row for each setting.

        Args:
            prompt_len_B: whole prompts, in tokens, [B]. limit_B: most tokens to sample, [B].
            settings: of each row, B of them.
            where: that of the `Prefiller`, so that decoding moves nothing.
        """
        eos_BE = pad([np.array(s.eos_token_ids or (NO_TOKEN,), np.int32) for s in settings], fill=NO_TOKEN)
        numbers = (np.asarray(x, np.int32) for x in (prompt_len_B, limit_B, eos_BE))
        return cls(*replicated((*numbers, SamplingControls.stack(settings), row_seeds(settings)), where))


def _choose(logits_BV: jax.Array, request: Request, state: Decoding) -> Decoding:
    """Samples the next token of every row that is not done; done rows stay as they are."""
    keys_B = step_keys(request.seeds_B2, state.count_B)
    token_B = sample(logits_BV, state.seen_BV, request.controls, keys_B)
    live_B = ~state.done_B
    token_B = jnp.where(live_B, token_B, state.token_B)
    count_B = state.count_B + live_B
    ended_B = (token_B[:, None] == request.eos_BE).any(-1) | (count_B >= request.limit_B)
    return Decoding(
        token_B,
        state.position_B + live_B,
        count_B,
        state.done_B | ended_B,
        jnp.where(live_B[:, None], mark_seen(state.seen_BV, token_B), state.seen_BV),
    )


@functools.partial(jax.jit, static_argnames="graph")
def first_token(
    graph: nnx.GraphDef,
    params: nnx.State,
    last_BD: jax.Array,
    tokens_BT: jax.Array | np.ndarray,
    request: Request,
) -> Decoding:
    """Samples the first token of every row.

    Args:
        last_BD: final hidden states of the prompts' last tokens, [B, D], of a prefill.
        tokens_BT: int32[B, T], the whole prompts, right-padded, for the repetition penalty.
    """
    model = nnx.merge(graph, params)
    logits_BV = model.logits(last_BD)
    seen_BV = seen_tokens(jnp.asarray(tokens_BT), request.prompt_len_B, logits_BV.shape[1])
    zeros_B = jnp.zeros_like(request.prompt_len_B)
    start = Decoding(zeros_B, request.prompt_len_B - 1, zeros_B, zeros_B.astype(bool), seen_BV)
    state = _choose(logits_BV, request, start)
    # Small, and every process reads its own copy.
    return jax.tree.map(lambda x: model.spread.place(x, ""), state) if model.spread else state


def decode_block(
    graph: nnx.GraphDef,
    params: nnx.State,
    request: Request,
    cache: KVCache,
    state: Decoding,
    steps: jax.Array | np.int32,
) -> tuple[jax.Array, KVCache, Decoding]:
    """Samples up to `steps` <= BLOCK more tokens a row; cache and state are donated.

    Returns:
        (tokens int32[B, BLOCK], NO_TOKEN where a row had stopped; cache; state). The newest token of a row is not in the cache.
    """
    found: tuple[jax.Array, KVCache, Decoding] = decode_program(params)(
        graph, params, request, cache, state, steps
    )
    return found


def _decode_block(
    graph: nnx.GraphDef,
    params: nnx.State,
    request: Request,
    cache: KVCache,
    state: Decoding,
    steps: jax.Array,
) -> tuple[jax.Array, KVCache, Decoding]:
    model = nnx.merge(graph, params)
    out_BT = jnp.full((len(state.token_B), BLOCK), NO_TOKEN, jnp.int32)

    def more(carry: tuple[jax.Array, jax.Array, KVCache, Decoding]) -> jax.Array:
        n, _, _, state = carry
        return (n < steps) & ~state.done_B.all()

    def step(
        carry: tuple[jax.Array, jax.Array, KVCache, Decoding],
    ) -> tuple[jax.Array, jax.Array, KVCache, Decoding]:
        n, out_BT, cache, state = carry
        # A done row repeats its last token at its last position: it rewrites what is there.
        logits_BV, cache = model.step(state.token_B, cache, state.position_B, request.prompt_len_B)
        new = _choose(logits_BV, request, state)
        out_BT = out_BT.at[:, n].set(jnp.where(state.done_B, NO_TOKEN, new.token_B))
        return n + 1, out_BT, cache, new

    _, out_BT, cache, state = lax.while_loop(more, step, (jnp.int32(0), out_BT, cache, state))
    if model.spread:  # small, and every process reads its own copy
        out_BT, state = jax.tree.map(lambda x: model.spread.place(x, ""), (out_BT, state))
    return out_BT, cache, state


_STATIC: Any = {"static_argnames": "graph", "donate_argnames": ("cache", "state")}
_in_cublas = jax.jit(_decode_block, **_STATIC, compiler_options=IN_CUBLAS)
_in_either = jax.jit(_decode_block, **_STATIC)


def decode_program(params: nnx.State) -> Any:
    """The jitted `decode_block` for these weights: those of 8 bits cuBLAS would have widened in memory first."""
    in_8_bits = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(params["layers"]))
    return _in_either if in_8_bits else _in_cublas
