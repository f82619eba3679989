"""Compiled programs kept between runs: JAX's persistent compilation cache, on by default in the command."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "QWEN_JAX_COMPILATION_CACHE"
_JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_JAX_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def use_compilation_cache(wanted: str | None = None) -> None:
    """Points JAX at a folder, through the environment: jax is not imported yet, and may never be.

    A folder that cannot be written leaves the cache off: it only saves time.

    Args:
        wanted: a folder, "off", or None for the default: what JAX's own variable says, else the user's cache folder.
    """
    if wanted is None and _JAX_VARIABLE in os.environ:
        return
    if wanted == "off":
        os.environ.pop(_JAX_VARIABLE, None)
        return
    folder = _default_folder() if wanted is None else Path(wanted).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ[_JAX_VARIABLE] = str(folder)
        os.environ.setdefault(
            _JAX_LEAST_SECONDS, "0.1"
        )  # JAX's default of 1 recompiles the many small programs


def _default_folder() -> Path:
    """One folder per kind of CPU: JAX's key does not tell them apart, and a home directory may serve many machines."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen-jax" / "compiled" / f"{platform.machine()}-{_cpu_digest()}"


def _cpu_digest() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kind = sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    )
    return hashlib.sha256("\n".join(kind or lines[:1]).encode()).hexdigest()[:12]
