"""A folder that appears all at once: written beside its destination, moved there when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.errors import CheckpointError

_SUFFIX = ".writing"
_LOCK = "lock"
_OUT = "out"


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on leaving without error it becomes `destination` in one rename.

    It lies in `<destination>.writing/`, on the same file system. On an error it is removed; what a killed
    run left behind is removed by the next run, which starts clean. Two runs towards one destination exclude
    each other.

    Raises:
        CheckpointError: the destination exists, its parent does not, or somebody else is writing it.
    """
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already: choose another destination or remove it")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}: no such folder to write {destination.name} into")
    staging = destination.with_name(destination.name + _SUFFIX)
    with _locked(staging, destination):
        out = staging / _OUT
        if out.exists():
            shutil.rmtree(out)
        try:
            out.mkdir()
            yield out
            _sync(out)
            if (
                destination.exists()
            ):  # made by somebody else meanwhile; an empty folder would be replaced silently
                raise CheckpointError(f"{destination} appeared in the meantime: nothing was written")
            out.rename(destination)
            _sync(destination.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(staging: Path, destination: Path) -> Iterator[None]:
    foreign = staging.is_symlink() or (staging.exists() and not (staging / _LOCK).is_file())
    if foreign:
        raise CheckpointError(f"{staging} is in the way and was not left by a conversion: remove it")
    try:
        staging.mkdir(exist_ok=True)
        descriptor = os.open(staging / _LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{destination} is being written by another process") from None
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
