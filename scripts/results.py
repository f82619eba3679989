"""What every figure carries beside it: the machine, the versions and the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "torch", "triton")


def stamp() -> dict[str, Any]:
    """Device, host, package versions and date of this run."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, {memory_gib:.0f} GiB",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` with its stamp as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamp() | result, indent=1) + "\n", encoding="utf-8")
