"""Answers to many pass key tasks of many lengths from two compiled programs: prefill pieces of one shape, one cache size.

`LLM` compiles anew for each size of cache and last piece: right for one conversation, minutes of compiling for a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_jax.balance import balanced
from qwen_jax.cache import KVCache, init_cache, is_8_bit
from qwen_jax.evals.passkey import DIGITS, Task
from qwen_jax.model import Qwen2
from qwen_jax.sharding import mesh_of
from qwen_jax.sparsity.attention import SparsePrefill

_NEW_TOKENS = DIGITS + 1  # one more than the key: a longer number is a wrong answer


def answerer(
    model: Qwen2,
    longest: int,
    piece: int,
    sparse: SparsePrefill | None = None,
    kv_dtype: DTypeLike | None = None,
) -> Callable[[Sequence[Task]], list[str]]:
    """A function that continues tasks of one common length by greedy decoding, as many rows as it is given tasks.

    Args:
        model: its positions decide how far it reads.
        longest: tokens of the longest task; every call allocates a cache for it.
        piece: tokens of a prefill piece; it must divide the model's chunk length s.
        sparse: makes texts above its threshold sparse; None: all are dense.
        kv_dtype: of the cache; None: that of the weights.
    """
    dtype = kv_dtype or model.embed.weight[...].dtype
    graph, params = nnx.split(balanced(model) if is_8_bit(dtype) else model)
    capacity = -(-(longest + _NEW_TOKENS) // piece) * piece
    # The cache goes on its mesh, as every piece returns it: elsewhere the first piece would compile a program of its own.
    weight = model.embed.weight[...]

    def answer(tasks: Sequence[Task]) -> list[str]:
        ids_BT = np.stack([task.ids for task in tasks])
        B, T = ids_BT.shape
        ids_BT = np.pad(ids_BT, ((0, 0), (0, -T % piece)))
        cache = init_cache(model.config, B, capacity, dtype, mesh_of(weight))
        length_B = jnp.full(B, T, jnp.int32)
        rule = sparse if sparse and sparse.threshold < T else None
        for start in range(0, T, piece):
            tokens_BT = jnp.asarray(ids_BT[:, start : start + piece])
            logits_BV, cache = _prefill(graph, params, tokens_BT, cache, jnp.int32(start), length_B, rule)
        tokens = []
        for n in range(_NEW_TOKENS):
            token_B = logits_BV.argmax(-1).astype(jnp.int32)
            tokens.append(token_B)
            if n + 1 < _NEW_TOKENS:
                logits_BV, cache = _step(graph, params, token_B, cache, length_B + n, length_B)
        return [_text(row) for row in np.stack(tokens, axis=1)]

    return answer


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _prefill(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    cache: KVCache,
    start: jax.Array,
    length_B: jax.Array,
    sparse: SparsePrefill | None,
) -> tuple[jax.Array, KVCache]:
    """Runs one piece; the logits [B, V] are those of the last prompt token, if it lies in this piece."""
    model = nnx.merge(graph, params)
    x_BTD, cache = model.extend(tokens_BT, cache, start, length_B, sparse)
    last_B = jnp.clip(length_B - 1 - start, 0, tokens_BT.shape[1] - 1)
    return model.logits(x_BTD[jnp.arange(len(length_B)), last_B]), cache


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _step(
    graph: nnx.GraphDef,
    params: nnx.State,
    token_B: jax.Array,
    cache: KVCache,
    position_B: jax.Array,
    length_B: jax.Array,
) -> tuple[jax.Array, KVCache]:
    return nnx.merge(graph, params).step(token_B, cache, position_B, length_B)


def _text(tokens_T: np.ndarray) -> str:
    """The bytes before the first special token."""
    special = np.flatnonzero(tokens_T >= 256)
    return bytes(tokens_T[: special[0] if len(special) else None].astype(np.uint8)).decode(errors="replace")
