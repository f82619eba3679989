"""What `search` and `refine` share: the options, and the checkpoint and texts that budgets are measured with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qwen_jax.cli import options
from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    import numpy as np

    from qwen_jax.model import Qwen2

Calibration = Annotated[
    str,
    typer.Option(
        metavar="FILE.jsonl",
        help='Texts as long as the prompts to come: {"text": ...} or {"token_ids": [...]} a line.',
    ),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The budget file to make.")]


class Loaded(NamedTuple):
    """A model on one device and the sequences to measure on, with all that the figures depend on."""

    model: Qwen2
    sequences: list[np.ndarray]
    chunk: int
    last_queries: int
    settings: dict[str, Any]


def load(
    path: str, calibration: str, *, prefill_chunk: int | None, dtype: str | None, dca: str | None
) -> Loaded:
    """The checkpoint and the texts, which are checked before the weights are read."""
    options.check_dtype(dtype)
    dual_chunk = options.dual_chunk(dca)

    from qwen_jax import build
    from qwen_jax.hub import resolve
    from qwen_jax.loading import open_checkpoint
    from qwen_jax.prefill import default_chunk
    from qwen_jax.prefix_io import owner
    from qwen_jax.progress import progress_bar
    from qwen_jax.sparsity.calibration import read_sequences
    from qwen_jax.tokenizer import Tokenizer, has_tokenizer

    folder = resolve(path)
    config = build.with_dca(open_checkpoint(folder).config, dual_chunk)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
    sequences = read_sequences(calibration, tokenizer, config.vocab_size, config.max_position_embeddings)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise QwenJaxError(f"--prefill-chunk must be at least 1, got {prefill_chunk}")
    if config.sparse.last_q < 1:
        raise QwenJaxError(f"{folder}: sparse_attention_last_q in config.json must be at least 1")
    chunk = default_chunk(config) if prefill_chunk is None else prefill_chunk
    with progress_bar("loading", unit="bytes") as bar:
        loaded = build.load(folder, dtype=dtype, dca=dual_chunk, progress=bar)
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8) + ids.tobytes())
    settings = {
        "checkpoint": owner(loaded),
        "calibration": digest.hexdigest(),
        "prefill chunk": chunk,
        "dtype": str(loaded.embed.weight.dtype),
    }
    return Loaded(loaded, sequences, chunk, config.sparse.last_q, settings)


def tokens_done(loaded: Loaded, bar: Callable[[int], None]) -> Callable[[int, Any], None]:
    """A function for (sequence, piece) that moves a bar over the tokens of all sequences."""
    lengths = [len(ids) for ids in loaded.sequences]
    return lambda at, piece: bar(sum(lengths[:at]) + piece.start + piece.length)


def check_output(output: str) -> Path:
    """Refuses an output that could not be written, before anything is loaded."""
    path = Path(output).expanduser()
    if path.exists():
        raise QwenJaxError(f"-o {output}: exists already: choose another file or remove it")
    if not path.absolute().parent.is_dir():
        raise QwenJaxError(f"-o {output}: no such folder: {path.absolute().parent}")
    return path
