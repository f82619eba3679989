"""What a long measurement has found so far, on disk beside its result: a run that was broken off goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qwen_jax.errors import QwenJaxError
from qwen_jax.json_fields import read_json

SUFFIX = ".progress"


class ProgressFile:
    """A JSON object beside `output`, replaced whole at each save, that only a run with the same settings reads again.

    Attributes:
        path: `output` with ".progress" behind it.
        content: what was saved last; empty at the first run.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        """Opens or begins the file.

        Args:
            output: the file that the run is to write.
            settings: all that the result depends on, as JSON knows it.

        Raises:
            QwenJaxError: the output exists, its folder does not, or the progress there is belongs to other settings.
        """
        self.path, self._settings = output.with_name(output.name + SUFFIX), settings
        self.content: dict[str, Any] = {}
        if output.exists():
            raise QwenJaxError(f"{output} exists already: choose another output or remove it")
        if not output.absolute().parent.is_dir():
            raise QwenJaxError(f"{output.absolute().parent}: no such folder to write {output.name} into")
        if self.path.exists():
            raw = read_json(self.path)
            if not isinstance(raw, dict) or raw.keys() != {"settings", "content"}:
                raise QwenJaxError(f"{self.path} is not the progress of such a run: remove it")
            other = [name for name, value in settings.items() if raw["settings"].get(name) != value]
            if other:
                raise QwenJaxError(
                    f"{self.path} belongs to a run with another {', '.join(other)}: remove it, or choose another output"
                )
            self.content = raw["content"]

    def save(self, content: dict[str, Any]) -> None:
        """Replaces what was saved."""
        self.content = content
        write_whole(self.path, json.dumps({"settings": self._settings, "content": content}))

    def remove(self) -> None:
        """Ends the run: its result is written."""
        self.path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears, or is replaced, all at once."""
    beside = path.with_name(path.name + ".writing")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
