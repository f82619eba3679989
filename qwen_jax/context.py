"""What a cache holds: the tokens that have been run, and their keys and values. A `Document` is one that a user keeps."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.cache import KVCache
from qwen_jax.errors import QwenJaxError
from qwen_jax.kernels.blocks import Share
from qwen_jax.spread import Spread

CAPACITY_STEP = 256


def capacity_for(tokens: int, max_len: int, multiple: int = 1, chunk: int | None = None) -> int:
    """Positions to allocate for `tokens`: at most a quarter more than needed, and at most what max_len needs.

    The step is an eighth of the next power of two, so that few programs are compiled, then rounded up to a multiple; from 16
    prefill pieces of `chunk`, if that is a multiple of 256, on to whole ones: the last then runs the program of the others.
    """
    step = max(CAPACITY_STEP, 1 << max(0, (tokens - 1).bit_length() - 3))
    capacity = _round_up(min(_round_up(tokens, step), _round_up(max_len, CAPACITY_STEP)), multiple)
    whole = chunk and chunk % CAPACITY_STEP == 0 and capacity >= 16 * chunk
    return _round_up(capacity, chunk) if chunk and whole else capacity


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


@functools.partial(jax.jit, static_argnames=("capacity", "spread"))
def _grown(cache: KVCache, capacity: int, spread: Spread | None) -> KVCache:
    devices = spread.blocks.count if spread and spread.blocks else 1
    room = ((0, 0), (0, 0), (0, 0), (0, (capacity - cache.capacity) // devices), (0, 0))

    def grow(cache: KVCache, share: Share | None = None) -> KVCache:
        return jax.tree.map(lambda x: jnp.pad(x, room[: x.ndim]), cache)

    return spread.run(grow, ("LBKS",), "LBKS", cache) if spread else grow(cache)


class Context:
    """Rows that share a cache. Calls donate the cache's buffers and put the new ones back here; only a call that is broken
    off in between (Ctrl-C, a device out of memory) loses them.

    Attributes:
        cache: positions from len(self) on mean nothing.
        token_ids: int32[n], the tokens at positions 0 .. n - 1 (of the only row).
        spread: the devices that the cache is on; None: one.
    """

    def __init__(self, cache: KVCache, token_ids: np.ndarray | None = None, spread: Spread | None = None):
        self.cache, self.spread = cache, spread
        self.token_ids = np.zeros(0, np.int32) if token_ids is None else np.asarray(token_ids, np.int32)

        self._turn = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def lost(self) -> bool:
        """Whether the cache's buffers were lost in a call that was broken off."""
        return self.cache.k.is_deleted() or self.cache.v.is_deleted()

    def begin(self) -> int:
        """Begins an answer, which writes behind what is held: the answer before it cannot go on. Gives what `require` takes.

        Raises:
            QwenJaxError: the cache is lost.
        """
        if self.lost:
            raise QwenJaxError(
                "the document's cache was lost when a call was broken off: prefill or load it again"
            )
        self._turn += 1
        return self._turn

    def require(self, turn: int) -> None:
        """Raises QwenJaxError if another answer was begun since: the keys of this one are overwritten."""
        if turn != self._turn:
            raise QwenJaxError(
                "another answer was begun on the same document or chat: read one to its end before the next"
            )

    def reserve(self, tokens: int, max_len: int) -> None:
        """Makes room for `tokens` positions in all; copies the cache only when it must grow."""
        if tokens > self.cache.capacity:
            capacity = capacity_for(tokens, max_len, self.spread.round if self.spread else 1)
            self.cache = _grown(self.cache, capacity=capacity, spread=self.spread)

    def slots(self) -> np.ndarray:
        """Where in the cache's S positions 0 .. len(self) - 1 lie."""
        positions = np.arange(len(self))
        blocks = self.spread.blocks if self.spread else None
        return blocks.dealt(positions, self.cache.capacity) if blocks else positions


class Document(Context):
    """A prefilled text: pass it as `prefix=` to ask any number of questions; `save` it, load it with `LLM.load_prefix`.

    Up to original_max_position_embeddings an answer equals that of a fresh prefill of document and question together. Beyond, a
    question raises the length temperature m(L): its scores use the new m for every key, but the document's hidden states were
    computed under the document's own. `generate(..., anew=True)` prefills the whole again.
    """

    def __init__(
        self,
        cache: KVCache,
        token_ids: np.ndarray,
        owner: dict[str, object],
        spread: Spread | None = None,
    ):
        """`owner`: see `prefix_io.owner`."""
        super().__init__(cache, token_ids, spread)
        self.owner = owner

    def save(self, path: str | Path) -> None:
        """Writes tokens, keys and values to the new folder `path`; it appears whole or not at all.

        Raises:
            QwenJaxError: the path exists, or the disk is full.
        """
        from qwen_jax import prefix_io

        prefix_io.save(self, Path(path))
