"""What a cache holds: the tokens that have been run, and their keys and values. A `Document` is one that a user keeps."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.cache import KVCache

CAPACITY_STEP = 256


def capacity_for(tokens: int, max_len: int) -> int:
    """Positions to allocate for `tokens`: a power of two, so that few programs are compiled, at most what max_len needs."""
    most = -(-max_len // CAPACITY_STEP) * CAPACITY_STEP
    return min(most, max(CAPACITY_STEP, 1 << (tokens - 1).bit_length()))


@functools.partial(jax.jit, static_argnames="capacity")
def _grown(cache: KVCache, capacity: int) -> KVCache:
    room = ((0, 0), (0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0))
    return KVCache(*(jnp.pad(x, room) for x in cache))


class Context:
    """Rows that share a cache. Calls donate the cache's buffers and put the new ones back here, so it is always valid.

    Attributes:
        cache: positions from len(self) on mean nothing.
        token_ids: int32[n], the tokens at positions 0 .. n - 1 (of the only row).
    """

    def __init__(self, cache: KVCache, token_ids: np.ndarray | None = None):
        self.cache = cache
        self.token_ids = np.zeros(0, np.int32) if token_ids is None else np.asarray(token_ids, np.int32)

    def __len__(self) -> int:
        return len(self.token_ids)

    def reserve(self, tokens: int, max_len: int) -> None:
        """Makes room for `tokens` positions in all; copies the cache only when it must grow."""
        if tokens > self.cache.capacity:
            self.cache = _grown(self.cache, capacity=capacity_for(tokens, max_len))


class Document(Context):
    """A prefilled text: pass it as `prefix=` to ask any number of questions; `save` it, load it with `LLM.load_prefix`.

    Up to original_max_position_embeddings an answer equals that of a fresh prefill of document and question together. Beyond, a
    question raises the length temperature m(L): its scores use the new m for every key, but the document's hidden states were
    computed under the document's own. `generate(..., anew=True)` prefills the whole again.
    """

    def __init__(self, cache: KVCache, token_ids: np.ndarray, owner: dict[str, object]):
        """`owner`: see `prefix_io.owner`."""
        super().__init__(cache, token_ids)
        self.owner = owner

    def save(self, path: str | Path) -> None:
        """Writes tokens, keys and values to the new folder `path`; it appears whole or not at all.

        Raises:
            QwenJaxError: the path exists, or the disk is full.
        """
        from qwen_jax import prefix_io

        prefix_io.save(self, Path(path))
