"""Sizes that were tuned: JSON files by device, beside the kernels they are for."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any


@functools.cache
def tuned(package: str, device: str, kernel: str) -> list[dict[str, Any]]:
    """The entries of a kernel in `tuned/<device>.json` of a package; none for a device without a file."""
    file = resources.files(package).joinpath("tuned", device.lower().replace(" ", "_") + ".json")
    return json.loads(file.read_text(encoding="utf-8"))[kernel] if file.is_file() else []
