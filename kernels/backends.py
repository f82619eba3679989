"""Choosing among the backends of an op: in order, each may refuse with a reason."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.tpu import why_not_tpu

Backend = Callable[..., tuple[jax.Array, jax.Array]]


def dispatch[R](
    op: str, backends: Mapping[str, Callable[..., R]], name: str | None, *args: Any, **kwargs: Any
) -> R:
    """Calls the backend called `name`, or the first that does not refuse.

    Raises:
        NotImplementedError: the named backend, or every backend, refuses; the message holds the reasons.
        ValueError: no backend of that name.
    """
    if name is not None and name not in backends:
        raise ValueError(f"no {op} backend {name!r}; there are {', '.join(backends)}")
    reasons = []
    for candidate in [name] if name else backends:
        try:
            return backends[candidate](*args, **kwargs)
        except NotImplementedError as refusal:
            reasons.append(f"{candidate}: {refusal}")
    raise NotImplementedError("; ".join(reasons))


def alone(backend: Backend) -> Backend:
    """`backend`, which knows only caches that hold every position."""

    @functools.wraps(backend)
    def call(*args: Any, share: Share | None = None, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        if share is not None:
            raise NotImplementedError("does not read a cache that is spread over a context axis")
        return backend(*args, **kwargs)

    return call


def given(**arguments: Any) -> dict[str, Any]:
    """Those that are not None: a backend need not know of what a call does not use."""
    return {name: value for name, value in arguments.items() if value is not None}


def on_gpu(module: str, function: str) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call on a GPU; anywhere else a call is refused without the import."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if jax.default_backend() != "gpu":
            raise NotImplementedError(f"runs on NVIDIA GPUs, not on a {jax.default_backend()}")
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def on_tpu(module: str, function: str) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call compiled for a TPU; any other is refused without the import."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if reason := why_not_tpu():
            raise NotImplementedError(reason)
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call
