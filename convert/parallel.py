"""A few threads for work that leaves the interpreter's lock alone: reading files, scanning large arrays."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_MOST_THREADS = 8
_PIECE_BYTES = 8 << 20


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="qwen-jax-read")


def in_parallel[Item, Result](function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[function(item) for item in items], by several threads if there are several items. `function` must not call this."""
    return list(_pool().map(function, items)) if len(items) > 1 else [function(item) for item in items]


def cuts(count: int, itemsize: int = 1) -> list[tuple[int, int]]:
    """Consecutive (start, stop) over `count` items, each a piece of work worth a thread."""
    step = max(1, _PIECE_BYTES // itemsize)
    return [(start, min(start + step, count)) for start in range(0, count, step)]
