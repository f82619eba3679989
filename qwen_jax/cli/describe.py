"""What a checkpoint is, in words."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.convert.orbax_folder import PARAMS


def kind_of(folder: str | Path) -> str:
    """Of a checkpoint folder that has been checked."""
    if (Path(folder) / PARAMS).is_dir():
        return "converted (orbax)"
    count = len(list(Path(folder).glob("*.safetensors")))
    return f"Hugging Face ({count} safetensors file{'s' if count > 1 else ''})"


def size_of(folder: str | Path) -> str:
    """Of all files, links followed."""
    return gigabytes(
        sum(os.stat(Path(root) / name).st_size for root, _, names in os.walk(folder) for name in names)
    )


def gigabytes(count: int) -> str:
    """Bytes for people: 15.2 GB, 3.1 MB."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"
    return f"{count} bytes"


def positions_of(config: ModelConfig) -> str:
    """The whole of how the model tells positions apart."""
    parts = [f"rope, theta {config.rope_theta:,.0f}"]
    if config.yarn:
        yarn = config.yarn
        parts.append(f"yarn, factor {yarn.factor:g} over {yarn.original_max_position_embeddings:,}")
    if config.dual_chunk:
        dual = config.dual_chunk
        parts.append(
            f"dual chunk attention, chunk {dual.chunk_size:,}, local {dual.local_size:,}, clip {dual.saturation:,}"
        )
        original = dual.original_max_position_embeddings
        parts.append(f"length temperature beyond {original:,}" if original else "no length temperature")
    return "; ".join(parts)
