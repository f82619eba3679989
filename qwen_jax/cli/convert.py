"""`qwen-jax convert`: Hugging Face safetensors to an orbax checkpoint, or back."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from qwen_jax.cli import options

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax convert Qwen2.5-7B-Instruct-1M/ ckpt/[/cyan]       Hugging Face to orbax

[cyan]qwen-jax convert Qwen/Qwen2.5-0.5B ckpt/[/cyan]             the same, downloaded first

[cyan]qwen-jax convert ckpt/ exported/ --max-shard-size 2GB[/cyan]  back again
"""


def command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a converted folder or a hub id.")
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The folder to make; it must not exist.")],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes in one safetensors file, when writing those.")
    ] = "5GB",
) -> None:
    """Convert Hugging Face safetensors to an orbax checkpoint, or back.

    The direction follows from what SRC is. Every bit is kept, and tokenizer and config travel along. DST appears when it
    is whole, never before: after an interruption run the same command again.
    """
    max_shard_bytes = options.number_of_bytes(max_shard_size, "--max-shard-size")

    from qwen_jax.cli.describe import kind_of, size_of
    from qwen_jax.convert import convert
    from qwen_jax.hub import resolve
    from qwen_jax.progress import progress_bar

    start = time.perf_counter()
    source = resolve(src)
    with progress_bar("converting", unit="bytes") as bar:
        convert(source, dst, progress=bar, max_shard_bytes=max_shard_bytes)
    seconds = time.perf_counter() - start
    typer.echo(f"{dst}: {kind_of(dst)}, {size_of(dst)} in {seconds:.1f} s")
