"""Chunked prefill: the plan of pieces, and the loop that runs them through one compiled program.

Every full chunk runs the same program (its start is a value, not a shape); the rest of a prompt runs in the smallest
power-of-two bucket that holds it. Pieces never straddle a multiple of s, so every key tile is of one
stage (`algorithms.md` 2.7).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.cache import KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.linear import IN_CUBLAS
from qwen_jax.processes import replicated
from qwen_jax.sparsity.attention import SparsePrefill

MAX_CHUNK = 32_768
MIN_BUCKET = 128
_SCORE_ROWS = 256  # rows of logits alive at once while scoring: 256 x 152k float32 is 156 MB

OnPiece = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Positions [start, start + length) run as `padded` rows, of which the first stands at `begin` <= start.

    Rows before `start` and from start + length on are padding.
    """

    start: int
    length: int
    padded: int
    begin: int


def default_chunk(config: ModelConfig, multiple: int = 1) -> int:
    """Tokens a chunk: the largest divisor of s up to 32,768 (31,744 for the 1M models), so that only the last piece is short.

    A chunk length with no useful divisor gives min(s, 32,768); without dual chunk attention it is 32,768.

    Args:
        multiple: the chunk must be a multiple of this, which divides s.
    """
    most = MAX_CHUNK // multiple * multiple
    if config.dual_chunk is None:
        return most
    s = config.dual_chunk.chunk_len
    most = min(s, most)
    best = max(chunk for chunk in range(multiple, most + 1, multiple) if s % chunk == 0)
    return best if 4 * best >= most else most


def bucket(length: int, chunk: int, multiple: int = 1) -> int:
    """Rows that `length` tokens run as: the next power of two from 128 on, rounded up to a multiple, at most a whole chunk."""
    rows = max(MIN_BUCKET, 1 << (length - 1).bit_length())
    return min(chunk, -(-rows // multiple) * multiple)


def plan_pieces(
    start: int, end: int, *, chunk: int, capacity: int, chunk_len: int | None = None, multiple: int = 1
) -> list[Piece]:
    """Splits positions [start, end) into pieces of at most `chunk` rows that do not straddle a multiple of `chunk_len`.

    Args:
        start, end: absolute positions; what lies before `start` is in the cache.
        chunk: rows of a full piece.
        capacity: positions the cache holds; padding never reaches beyond it.
        chunk_len: s of dual chunk attention, or None.
        multiple: pieces begin at multiples of this and have as many rows; it divides chunk, capacity and chunk_len.

    Raises:
        ValueError: end passes the capacity, or start > end.
    """
    if not 0 <= start <= end <= capacity:
        raise ValueError(f"positions {start}..{end} do not fit a cache of {capacity}")
    pieces = []
    while start < end:
        begin = start - start % multiple
        stop = min(end, begin + chunk)
        if chunk_len:
            stop = min(stop, start - start % chunk_len + chunk_len)
        rows = min(bucket(stop - begin, chunk, multiple), capacity - begin)
        pieces.append(Piece(start, stop - start, rows, begin))
        start = stop
    return pieces


def piece_tokens(tokens_BT: np.ndarray, origin: int, piece: Piece) -> np.ndarray:
    """The piece's columns of tokens_BT (whose column 0 is position `origin`), zero-padded to its rows."""
    first, before = piece.start - origin, piece.start - piece.begin
    cut = tokens_BT[:, first : first + piece.length]
    return np.pad(cut, ((0, 0), (before, piece.padded - piece.length - before)))


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache", compiler_options=IN_CUBLAS)
def _prefill_piece(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    start: jax.Array,
    prompt_len_B: jax.Array,
    cache: KVCache,
    last_BD: jax.Array,
    sparse: SparsePrefill | None = None,
    first: jax.Array | int = 0,
) -> tuple[jax.Array, KVCache]:
    """Runs one piece from `start` on; last_BD takes the hidden state of each row whose last prompt token lies in it.

    first: int32 scalar, the first real position, see `Qwen2.extend`.
    """
    model = nnx.merge(graph, params)
    x_BTD, cache = model.extend(tokens_BT, cache, start, prompt_len_B, sparse, first)
    T = tokens_BT.shape[1]
    t_B = prompt_len_B - 1 - start
    here_B = (t_B >= 0) & (t_B < T)
    row_B = model.row(jnp.where(here_B, t_B, 0), T)
    x_BD = jnp.take_along_axis(x_BTD, row_B[:, None, None], axis=1)[:, 0]
    last_BD = jnp.where(here_B[:, None], x_BD, last_BD)
    return model.spread.place(last_BD, "") if model.spread else last_BD, cache


@functools.partial(jax.jit, static_argnames="graph")
def _head(graph: nnx.GraphDef, params: nnx.State, x_BD: jax.Array) -> jax.Array:
    return nnx.merge(graph, params).logits(x_BD)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache", compiler_options=IN_CUBLAS)
def _score_piece(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    start: jax.Array,
    prompt_len_B: jax.Array,
    cache: KVCache,
    sparse: SparsePrefill | None = None,
    first: jax.Array | int = 0,
) -> tuple[jax.Array, KVCache]:
    """Runs one piece and returns the log-probability of each row's target, float32[B, T]."""
    model = nnx.merge(graph, params)
    x_BTD, cache = model.extend(tokens_BT, cache, start, prompt_len_B, sparse, first)
    B, T, D = x_BTD.shape
    if model.spread:
        x_BTD = model.spread.place(x_BTD, "B")[:, model.row(jnp.arange(T), T)]

    def score(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_D, target = args
        logits_V = model.logits(x_D)
        return logits_V[target] - jax.nn.logsumexp(logits_V)

    flat = lax.map(score, (x_BTD.reshape(B * T, D), targets_BT.reshape(B * T)), batch_size=_SCORE_ROWS)
    logp_BT = flat.reshape(B, T)
    return model.spread.place(logp_BT, "") if model.spread else logp_BT, cache


class Prefiller:
    """Runs prompts through a model piece by piece.

    Attributes:
        graph, params: the model, split once.
        config: its config.
        chunk: tokens of a full piece.
        multiple: positions that pieces begin at a multiple of, and caches hold a multiple of.
        sparse: what makes long prompts sparse, or None.
        where: every device of the weights' mesh, where small arrays belong; None: there is one device.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        config: ModelConfig,
        chunk: int,
        sparse: SparsePrefill | None = None,
    ):
        self.graph, self.params, self.config, self.sparse = graph, params, config, sparse
        # A piece ends at a multiple of s: a longer chunk would only pad it.
        self.chunk = min(chunk, config.dual_chunk.chunk_len) if config.dual_chunk else chunk
        spread = nnx.merge(graph, params).spread
        self.multiple = spread.round if spread else 1
        assert self.chunk % self.multiple == 0, (self.chunk, self.multiple)
        placed: Any = params["embed"]["weight"][...]
        self.dtype = placed.dtype
        held = placed.sharding
        self.where = NamedSharding(held.mesh, PartitionSpec()) if isinstance(held, NamedSharding) else None

    def pieces(self, start: int, end: int, capacity: int) -> list[Piece]:
        """The plan for positions [start, end)."""
        s = self.config.dual_chunk.chunk_len if self.config.dual_chunk else None
        return plan_pieces(
            start, end, chunk=self.chunk, capacity=capacity, chunk_len=s, multiple=self.multiple
        )

    def run(
        self, tokens_BT: np.ndarray, prompt_len_B: np.ndarray, cache: KVCache, start: int = 0
    ) -> Iterator[tuple[int, jax.Array, KVCache]]:
        """Yields (tokens done, last hidden states [B, D], cache) after each piece has been handed to the device.

        Args:
            tokens_BT: int32[B, T], right-padded; column 0 stands at position `start`.
            prompt_len_B: int32[B], whole prompt of each row, what is cached before `start` included.
            cache: holds positions below `start` of every row. It is donated: use the yielded one from then on.
            start: absolute position, the same for every row.
        """
        end = start + tokens_BT.shape[1]
        fixed = self._fixed(prompt_len_B)
        last_BD = self.nothing_yet(len(tokens_BT))
        for piece in self.pieces(start, end, cache.capacity):
            arguments = self._arguments(piece_tokens(tokens_BT, start, piece), piece, cache, last_BD, *fixed)
            last_BD, cache = _prefill_piece(*arguments)
            yield piece.start + piece.length - start, last_BD, cache

    def compile(self, prompt_len_B: np.ndarray, cache: KVCache) -> None:
        """Compiles, side by side, what `run` of prompts from position 0 on needs; the cache may be abstract."""
        fixed = self._fixed(prompt_len_B)
        last_BD = self.nothing_yet(len(prompt_len_B))
        pieces = {piece.padded: piece for piece in self.pieces(0, int(max(prompt_len_B)), cache.capacity)}

        def one(piece: Piece) -> None:
            tokens_BT = np.zeros((len(prompt_len_B), piece.padded), np.int32)
            _prefill_piece.lower(*self._arguments(tokens_BT, piece, cache, last_BD, *fixed)).compile()

        with ThreadPoolExecutor(len(pieces), thread_name_prefix="qwen-jax-compile") as pool:
            list(pool.map(one, pieces.values()))

    def nothing_yet(self, rows: int) -> jax.Array:
        """A first piece's `last_BD`, [rows, D], where every piece returns it: else the first would be a program of its own."""
        return replicated(np.zeros((rows, self.config.hidden_size), self.dtype), self.where)

    def _fixed(self, prompt_len_B: np.ndarray) -> tuple[jax.Array, SparsePrefill | None]:
        """What all pieces of prompts are given."""
        sparse = self.sparse.for_prompts(prompt_len_B) if self.sparse else None
        return replicated(np.asarray(prompt_len_B, np.int32), self.where), sparse

    def _arguments(
        self,
        tokens_BT: np.ndarray,
        piece: Piece,
        cache: KVCache,
        last_BD: jax.Array,
        lengths_B: jax.Array,
        sparse: SparsePrefill | None,
    ) -> tuple[Any, ...]:
        """Of `_prefill_piece`."""
        begin, first = np.int32(piece.begin), np.int32(piece.start)
        return self.graph, self.params, tokens_BT, begin, lengths_B, cache, last_BD, sparse, first

    def logits(self, last_BD: jax.Array) -> jax.Array:
        """float32[B, V] from the last hidden states."""
        return _head(self.graph, self.params, last_BD)

    def score(
        self, token_ids: np.ndarray, cache: KVCache, *, start: int = 0, on_piece: OnPiece | None = None
    ) -> np.ndarray:
        """Log-probability of each next token of one row after `start`: float32[T - 1 - start] from int32[T].

        The cache holds positions below `start` of its first row; it is donated.
        """
        T = len(token_ids)
        inputs, targets = (
            np.pad(ids[None], ((0, cache.batch - 1), (0, 0))) for ids in (token_ids[:-1], token_ids[1:])
        )
        # As `model(tokens)`: the temperature is that of all T tokens. Rows after the first are empty.
        length_B, sparse = self._fixed(np.array([T, *[0] * (cache.batch - 1)]))
        out = []
        for piece in self.pieces(start, T - 1, cache.capacity):
            logp_BT, cache = _score_piece(
                self.graph, self.params,
                piece_tokens(inputs, 0, piece), piece_tokens(targets, 0, piece),
                np.int32(piece.begin), length_B, cache, sparse, np.int32(piece.start),
            )  # fmt: skip
            out.append(np.asarray(logp_BT)[0, piece.start - piece.begin :][: piece.length])
            if on_piece:
                on_piece(piece.start + piece.length - start)
        return np.concatenate(out)
