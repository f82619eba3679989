"""Reading JSON written by others: each function takes one key of one kind, and names the key when it is of another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError


def read_json(path: Path) -> Any:
    """Parses a JSON file; raises ConfigError naming the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: broken JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: broken JSON: nested too deeply") from None


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """One id, a list of ids or null, as config.json and generation_config.json write them."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ConfigError(f"{name} must be a token id or a list of them, got {value!r}")
    return tuple(values)


def integer(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number from 0 on; raises ConfigError when it is missing without a default, or anything else."""
    value = raw.get(key, default)
    if value is None:
        raise ConfigError(f"key {key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{key} must be a non-negative integer, got {value!r:.80}")
    return value


def number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0; raises ConfigError as `integer` does."""
    value = raw.get(key, default)
    if value is None:
        raise ConfigError(f"key {key!r} is missing")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key} must be a positive number, got {value!r:.80}")
    return float(value)


def boolean(raw: dict[str, Any], key: str, default: bool) -> bool:
    """true or false; raises ConfigError for anything else."""
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {value!r:.80}")
    return value


def optional_id(raw: dict[str, Any], key: str) -> int | None:
    """The first of `token_ids`, or None."""
    ids = token_ids(raw.get(key), key)
    return ids[0] if ids else None
