"""`qwen-jax demo`: the shipped checkpoint finds a pass key far past its training length; plain RoPE does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    from qwen_jax.evals.demo import Answered
    from qwen_jax.evals.passkey import Task

EXAMPLES = """
[bold]Examples[/bold]

[cyan]qwen-jax demo[/cyan]

[cyan]qwen-jax demo --length 131072 --depth 0.1[/cyan]

[cyan]qwen-jax demo --length 8192 --plot accuracy.png --trials 4[/cyan]
"""

DEFAULT_LENGTH = 16_384


def command(
    length: Annotated[
        int, typer.Option(help="Tokens of text and question, at most 131072.")
    ] = DEFAULT_LENGTH,
    depth: Annotated[
        float, typer.Option(help="Where the asked key stands: 0 is the start, 1 the end.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="Another seed, another text.", min=0)] = 0,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also draw accuracy over length and depth; asks many questions, takes minutes.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Texts for each cell of the plot.", min=1)] = 2,
    depths: Annotated[int, typer.Option(help="Depths in the plot.", min=2)] = 5,
) -> None:
    """Hide pass keys in a long text, ask for one, and compare.

    A small checkpoint that comes with the package was trained on texts of 2,048 tokens at most. It reads a longer one in
    chunks, once with dual chunk attention and once with plain RoPE, and answers.
    """
    if plot is not None:
        _check_plot(Path(plot))

    from qwen_jax.evals import demo

    demo.run(length, depth=depth, seed=seed, progress=True, on_task=_show_task, on_answer=_show_answer)
    if plot is not None:
        _draw(Path(plot), length, depths, trials)


def _show_task(task: Task) -> None:
    from qwen_jax.evals.demo_folder import DUAL_CHUNK

    trained, length = DUAL_CHUNK.chunk_size, len(task.text)
    typer.echo(
        f"A text of {length:,} tokens, {length / trained:.3g} times as long as any the model was trained on, with "
        f"{1 + len(task.others)} pass keys in it:\n"
    )
    for start, key in sorted(
        (task.text.index(key.needle().decode()), key) for key in (task.asked, *task.others)
    ):
        typer.echo(
            f"  token {start:>7,}  {key.name} {key.digits}{'  <- asked for' if key == task.asked else ''}"
        )
    typer.echo(f"\nQuestion: {task.asked.question().decode().strip()} ...\n")


def _show_answer(answer: Answered) -> None:
    verdict = "right" if answer.correct else "wrong"
    typer.echo(f"  {answer.mode:<18} {answer.text.strip()!r:<12} {verdict}   {answer.seconds:5.1f} s")


def _check_plot(path: Path) -> None:
    """Refuses a plot that could not be written before minutes are spent on it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise QwenJaxError("--plot needs matplotlib: pip install 'qwen-jax[plot]'") from None
    endings = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in endings:
        raise QwenJaxError(f"--plot {path}: the name must end in one of .{', .'.join(endings)}")
    if not path.absolute().parent.is_dir():
        raise QwenJaxError(f"--plot {path}: no such folder: {path.absolute().parent}")


def _draw(path: Path, longest: int, depths: int, trials: int) -> None:
    from qwen_jax.evals import demo, plot
    from qwen_jax.evals.demo_folder import DUAL_CHUNK
    from qwen_jax.progress import progress_bar

    lengths, modes = demo.doublings(longest), (demo.DCA_TEMPERATURE, demo.PLAIN)
    cell = depths * trials
    typer.echo(
        f"\nPlot: {len(modes) * len(lengths) * cell} texts of {lengths[0]:,} to {lengths[-1]:,} tokens"
    )
    with progress_bar("asking", len(modes) * sum(lengths) * cell) as bar:

        def report(mode: str, length: int, done: int, right: int) -> None:
            shorter = sum(each for each in lengths if each < length)
            bar(modes.index(mode) * sum(lengths) * cell + shorter * cell + length * done)
            if done == cell:
                typer.echo(f"  {mode:<18} {length:>7,} tokens  {right / done:4.0%} right")

        grids = demo.grids(lengths, depths=depths, trials=trials, modes=modes, report=report)
    plot.save(grids, path, trained_on=DUAL_CHUNK.chunk_size)
    typer.echo(f"{path}: written")
