"""Accuracy over length x depth as heat maps, one beside the other. Needs matplotlib: `pip install qwen-jax[plot]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_jax.errors import QwenJaxError
from qwen_jax.evals.passkey import Grid


def save(grids: Mapping[str, Grid], path: str | Path, *, trained_on: int) -> None:
    """Draws one heat map a grid, titled by its key; the format follows the file name's ending.

    Args:
        grids: by title; all over the same lengths and depths.
        path: the picture to write.
        trained_on: the training length, tokens: columns beyond it stand right of a line.

    Raises:
        QwenJaxError: matplotlib is not installed, or it cannot write such a file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise QwenJaxError("drawing needs matplotlib: pip install 'qwen-jax[plot]'") from None

    figure = Figure(figsize=(1.2 + 4.2 * len(grids), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for ax, (title, grid) in zip(axes, grids.items(), strict=True):
        ax.imshow(grid.accuracy.T, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
        ax.set_title(f"{title}\n{grid.trials} texts a cell", fontsize=10)
        ax.set_xticks(range(len(grid.lengths)), [_tokens(length) for length in grid.lengths])
        ax.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
        ax.set_xlabel("length, tokens (dashed: the longest in training)" if trained_on else "length, tokens")
        trained = sum(length <= trained_on for length in grid.lengths)
        if 0 < trained < len(grid.lengths):
            ax.axvline(trained - 0.5, color="black", linewidth=1.5, linestyle="--")
    axes[0].set_ylabel("depth of the key")
    figure.colorbar(
        axes[0].images[0], ax=list(axes), label="right answers", format=lambda share, _: f"{share:.0%}"
    )
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise QwenJaxError(f"{path}: cannot write the plot: {error}") from None


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
