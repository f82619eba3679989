"""Progress bars with the remaining time, drawn on stderr and only when it is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def progress_bar(
    what: str, total: int | None = None, *, show: bool = True, unit: str = "tokens"
) -> Iterator[Callable[..., None]]:
    """Yields `update(done)` or `update(done, total)`; draws nothing when `show` is false or stderr is no terminal.

    Args:
        what: the bar's label.
        total: in `unit`; may also come with the first update.
        unit: "tokens" or "bytes".
    """
    if not show or not sys.stderr.isatty():
        yield lambda done, total=None: None
        return
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, total: int | None = None) -> None:
            bar.update(task, completed=done, total=total)

        yield update
