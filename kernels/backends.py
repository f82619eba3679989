"""Backends that are imported only where they can run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax


def on_gpu(module: str, function: str) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call on a GPU; anywhere else a call is refused without the import."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if jax.default_backend() != "gpu":
            raise NotImplementedError(f"runs on NVIDIA GPUs, not on a {jax.default_backend()}")
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call
