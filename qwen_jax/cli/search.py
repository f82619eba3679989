"""`qwen-jax search`: first budgets for sparse prefill, one shape a head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qwen_jax.cli import measuring, model
from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    from qwen_jax.sparsity.search import Found

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax search ckpt/ --calibration texts.jsonl -o first.json[/cyan]

[cyan]qwen-jax refine ckpt/ --budgets first.json --calibration long.jsonl -o ckpt/sparse_attention_config.json[/cyan]
"""


def command(
    path: model.Path,
    calibration: measuring.Calibration,
    output: measuring.Output,
    keys: Annotated[
        float, typer.Option(help="Keys that a query may compute: every shape is scaled to that cost.")
    ] = 5120,
    prefill_chunk: model.PrefillChunk = None,
    dtype: model.Dtype = None,
    dca: model.Dca = None,
) -> None:
    """Choose each head's first budget of columns and diagonals for sparse prefill.

    Six shapes compete on every head, each scaled until a query computes --keys keys; the one that keeps most attention
    wins. Texts of about 30,000 tokens do. A run that was broken off goes on where it was: its progress is kept beside FILE.
    """
    out = measuring.check_output(output)
    if not keys >= 1:
        raise QwenJaxError(f"--keys must be at least 1, got {keys:g}")

    from qwen_jax.progress import progress_bar
    from qwen_jax.sparsity.budgets import write
    from qwen_jax.sparsity.progress_file import ProgressFile
    from qwen_jax.sparsity.search import search

    loaded = measuring.load(path, calibration, prefill_chunk=prefill_chunk, dtype=dtype, dca=dca)
    progress = ProgressFile(out, loaded.settings | {"command": "search", "keys": keys})
    with progress_bar("measuring", sum(map(len, loaded.sequences))) as bar:
        found = search(
            loaded.model, loaded.sequences, progress, keys=keys, chunk=loaded.chunk,
            last_queries=loaded.last_queries, on_piece=measuring.tokens_done(loaded, bar),
        )  # fmt: skip
    write(out, found.budgets)
    progress.remove()
    _show(found)
    typer.echo(f"{output}: written")


def _show(found: Found) -> None:
    """The shapes, how many heads chose each, and what it recalls."""
    from rich.console import Console
    from rich.table import Table

    from qwen_jax.sparsity.search import GRID

    table = Table("columns : diagonals", "heads", "recall where chosen", "recall of all heads")
    for number, (vertical, slash) in enumerate(GRID):
        chosen = found.choice_LN == number
        recall = found.recall_CLN[number]
        own = f"{recall[chosen].mean():.3f}" if chosen.any() else "-"
        table.add_row(f"{vertical} : {slash}", str(int(chosen.sum())), own, f"{recall.mean():.3f}")
    Console().print(table)
