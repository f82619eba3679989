"""`qwen-jax info`: what a checkpoint is, from its config and the headers of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qwen_jax.cli import model

if TYPE_CHECKING:
    from qwen_jax.config import ModelConfig

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax info ckpt/[/cyan]

[cyan]qwen-jax info Qwen/Qwen2.5-7B-Instruct-1M[/cyan]    downloads the config, no weights
"""


def command(path: model.Path) -> None:
    """Show what a checkpoint is, without reading its weights.

    A folder is checked as loading would check it: every tensor's name, shape and dtype against the config. Of a
    repository on the hub only the config is read.
    """
    from qwen_jax.cli.describe import kind_of, size_of
    from qwen_jax.convert import open_checkpoint
    from qwen_jax.hub import resolve

    if not Path(path).expanduser().exists():
        from qwen_jax.config import ModelConfig

        folder = resolve(path, ("config.json",))
        return _print({"hub id": path} | _model(ModelConfig.from_folder(folder)))
    folder = resolve(path)
    source = open_checkpoint(folder)
    facts = {"folder": f"{folder}: {size_of(folder)}", "format": kind_of(folder)}
    return _print(facts | _model(source.config) | _companions(folder))


def _model(config: ModelConfig) -> dict[str, str]:
    from qwen_jax.cli.describe import gigabytes, positions_of
    from qwen_jax.convert.source import DTYPES
    from qwen_jax.params import num_params

    count, itemsize = num_params(config), DTYPES[config.dtype].itemsize
    a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    longest = config.max_position_embeddings
    return {
        "parameters": f"{count:,}",
        "weights": f"{config.dtype}, {count * itemsize:,} bytes ({gigabytes(count * itemsize)})",
        "layers": f"{config.num_layers} of width {config.hidden_size:,}, MLP {config.intermediate_size:,}",
        "heads": f"{config.num_heads} for queries, {config.num_kv_heads} for keys and values, {config.head_dim} wide",
        "vocabulary": f"{config.vocab_size:,}, output head {'tied to' if config.tie_embeddings else 'apart from'} the "
        "embedding",
        "positions": positions_of(config),
        "max length": f"{longest:,} tokens",
        "KV cache": f"{a_token:,} bytes a token in {config.dtype}, {gigabytes(a_token * longest)} at max length",
    }


def _companions(folder: Path) -> dict[str, str]:
    from qwen_jax.generation_config import GenerationDefaults
    from qwen_jax.tokenizer import Tokenizer, has_tokenizer

    facts = {"tokenizer": "none"}
    if has_tokenizer(folder):
        tokenizer = Tokenizer.from_folder(folder)
        template = "a" if tokenizer.has_chat_template else "no"
        facts["tokenizer"] = f"ids up to {tokenizer.vocab_size - 1:,}, {template} chat template"
    defaults = GenerationDefaults.from_folder(folder)
    facts["answers"] = (
        f"sampled, temperature {defaults.temperature:g}, top-k {defaults.top_k}, top-p {defaults.top_p:g}"
        if defaults.do_sample
        else "greedy"
    )
    if defaults.repetition_penalty != 1:
        facts["answers"] += f", repetition penalty {defaults.repetition_penalty:g}"
    if defaults.eos_token_ids:
        facts["answers"] += f", ended by token {' or '.join(map(str, defaults.eos_token_ids))}"
    return facts


def _print(facts: dict[str, str]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}{value}")
