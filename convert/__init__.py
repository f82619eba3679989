"""Checkpoints on disk: Hugging Face safetensors and orbax, read by slices, each converted to the other."""

from qwen_jax.convert.converter import convert, open_checkpoint
from qwen_jax.convert.source import Progress, TensorSource

__all__ = ["Progress", "TensorSource", "convert", "open_checkpoint"]
