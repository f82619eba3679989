"""The wheel holds every package of the tree: setuptools cannot find them by itself, since two rooms lie outside `qwen_jax/`."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for name, folder in settings["package-dir"].items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            inside = marker.parent.relative_to(ROOT / folder).parts
            found.add(".".join([name, *inside]))
    assert sorted(settings["packages"]) == sorted(found)
