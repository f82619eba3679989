"""`qwen-jax refine`: budgets for sparse prefill that keep enough attention on long texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_jax.cli import measuring, model
from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    from qwen_jax.sparsity.refinement import Round

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax refine ckpt/ --calibration long.jsonl --threshold 0.9 -o sparse_attention_config.json[/cyan]

[cyan]qwen-jax refine ckpt/ --budgets first.json --calibration long.jsonl -o ckpt/sparse_attention_config.json[/cyan]
"""
_RECALLS = (0.99, 0.95, 0.9, 0.8, 0.6)  # lower ends of the classes shown


def command(
    path: model.Path,
    calibration: measuring.Calibration,
    output: measuring.Output,
    threshold: Annotated[
        float, typer.Option(help="Share of dense attention that every head is to keep.")
    ] = 0.9,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Budgets to start from.",
            show_default="the checkpoint's sparse_attention_config.json",
        ),
    ] = None,
    cap: Annotated[int, typer.Option(help="Most columns, and most diagonals, of a head.")] = 32_768,
    step: Annotated[
        int, typer.Option(help="Lines of the smallest raise; the published table's others are in proportion.")
    ] = 2048,
    prefill_chunk: model.PrefillChunk = None,
    dtype: model.Dtype = None,
    dca: model.Dca = None,
) -> None:
    """Raise budgets for sparse prefill until every head keeps enough attention.

    Each text is prefilled densely, and beside it sparse attention shows what share of each head's attention its budget keeps.
    Heads below the threshold are raised by the published table, and measured again, until all recall enough or have
    reached the cap. A run that was broken off goes on where it was: its progress is kept beside FILE.
    """
    out = measuring.check_output(output)
    if not 0 < threshold <= 1:
        raise QwenJaxError(f"--threshold must be above 0 and at most 1, got {threshold:g}")
    for name, value in (("--cap", cap), ("--step", step)):
        if value < 1:
            raise QwenJaxError(f"{name} must be at least 1, got {value}")

    from qwen_jax.hub import resolve
    from qwen_jax.loading import open_checkpoint
    from qwen_jax.progress import progress_bar
    from qwen_jax.sparsity.budgets import FILE_NAME, read, write
    from qwen_jax.sparsity.progress_file import ProgressFile
    from qwen_jax.sparsity.refinement import refine

    folder = resolve(path)
    start = Path(budgets).expanduser() if budgets is not None else folder / FILE_NAME
    if budgets is None and not start.exists():
        raise QwenJaxError(
            f"{path} holds no {FILE_NAME} to start from: make one with qwen-jax search and give it as --budgets"
        )
    first = read(start, open_checkpoint(folder).config)
    loaded = measuring.load(path, calibration, prefill_chunk=prefill_chunk, dtype=dtype, dca=dca)
    sizes = [[(b.vertical, b.slash) for b in layer] for layer in first]
    settings = {
        "command": "refine",
        "threshold": threshold,
        "cap": cap,
        "step": step,
        "first budgets": _plain(sizes),
    }
    progress = ProgressFile(out, loaded.settings | settings)
    total = sum(map(len, loaded.sequences))
    with progress_bar("measuring", total) as bar:
        done = measuring.tokens_done(loaded, bar)
        last = refine(
            loaded.model, loaded.sequences, first, progress,
            threshold=threshold, cap=cap, step=step, chunk=loaded.chunk, last_queries=loaded.last_queries,
            on_piece=lambda number, at, piece: done(at, piece),
            on_round=lambda number, found: _show_round(number, found, threshold),
        )  # fmt: skip
    write(out, last.budgets())
    progress.remove()
    _show(last, threshold)
    typer.echo(f"{output}: written")


def _plain(sizes: list[list[tuple[int, int]]]) -> list[list[list[int]]]:
    return [[list(each) for each in layer] for layer in sizes]


def _show_round(number: int, found: Round, threshold: float) -> None:
    recall = found.recall_LN
    typer.echo(
        f"round {number + 1}: {int((recall < threshold).sum())} of {recall.size} heads below {threshold:g}; recall "
        f"{recall.mean():.3f} on average, {recall.min():.3f} at least; {found.keys_LN.mean():,.0f} keys a query"
    )


def _show(last: Round, threshold: float) -> None:
    """How recalls and budgets are distributed over the heads."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    table = Table("recall", "heads", "columns: median, most", "diagonals: median, most", "lowest piece")
    upper = np.inf
    for lower in (*_RECALLS, 0.0):
        here = (last.recall_LN >= lower) & (last.recall_LN < upper)
        if here.any():
            sizes = [
                f"{np.median(x[here]):,.0f}, {x[here].max():,}" for x in (last.vertical_LN, last.slash_LN)
            ]
            name = f"{lower:g} and above" if lower else f"below {upper:g}"
            table.add_row(name, str(int(here.sum())), *sizes, f"{last.lowest_LN[here].min():.3f}")
        upper = lower
    console = Console()
    console.print(table)
    short = int((last.recall_LN < threshold).sum())
    if short:
        typer.echo(f"{short} heads stay below {threshold:g} at the cap", err=True)
