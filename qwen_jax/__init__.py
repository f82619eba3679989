"""Qwen2.5 with contexts of one million tokens, in JAX."""

from qwen_jax.answer import Generation
from qwen_jax.build import load
from qwen_jax.chat import Chat
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.context import Document
from qwen_jax.convert import convert
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
    "convert",
    "load",
]
