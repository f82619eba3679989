"""The decode loop on the device: sample, write, attend, until every row has stopped or the block is full.

The host sees whole blocks of tokens, for streaming and stop strings; nothing crosses between two tokens of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwen_jax.cache import KVCache
from qwen_jax.linear import IN_CUBLAS
from qwen_jax.sampling import SamplingControls, mark_seen, sample, step_keys

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
        controls: sampling settings, [B] each. keys_B: one random key a row.
    """

    prompt_len_B: jax.Array
    limit_B: jax.Array
    eos_BE: jax.Array
    controls: SamplingControls
    keys_B: jax.Array


def _choose(logits_BV: jax.Array, request: Request, state: Decoding) -> Decoding:
    """Samples the next token of every row that is not done; done rows stay as they are."""
    keys_B = step_keys(request.keys_B, state.count_B)
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


@jax.jit
def first_token(logits_BV: jax.Array, request: Request, seen_BV: jax.Array) -> Decoding:
    """Samples the first token of every row from the prefill's logits float32[B, V]."""
    zeros_B = jnp.zeros_like(request.prompt_len_B)
    start = Decoding(zeros_B, request.prompt_len_B - 1, zeros_B, zeros_B.astype(bool), seen_BV)
    return _choose(logits_BV, request, start)


def decode_block(
    graph: nnx.GraphDef,
    params: nnx.State,
    request: Request,
    cache: KVCache,
    state: Decoding,
    steps: jax.Array,
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
