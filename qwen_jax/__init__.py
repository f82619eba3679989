"""Qwen2.5 with contexts of one million tokens, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_jax.answer import Generation
    from qwen_jax.build import load
    from qwen_jax.chat import Chat
    from qwen_jax.config import DualChunk, ModelConfig
    from qwen_jax.context import Document
    from qwen_jax.errors import QwenJaxError
    from qwen_jax.llm import LLM
    from qwen_jax.model import Qwen2
    from qwen_jax.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Chat",
    "Document",
    "DualChunk",
    "Generation",
    "ModelConfig",
    "Qwen2",
    "QwenJaxError",
    "SamplingParams",
    "load",
]

# Imported on first use: jax takes seconds to import, and `qwen-jax --help` must not wait for it.
_MODULES = {
    "LLM": "llm",
    "Chat": "chat",
    "Document": "context",
    "DualChunk": "config",
    "Generation": "answer",
    "ModelConfig": "config",
    "Qwen2": "model",
    "QwenJaxError": "errors",
    "SamplingParams": "sampling",
    "load": "build",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
