"""Option values that are more than a number or a name, and what they become."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen_jax.config import DTYPES, DualChunk
from qwen_jax.errors import QwenJaxError

if TYPE_CHECKING:
    from jax.sharding import Mesh

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_AXES = ("data", "context", "tensor")


class OptionError(QwenJaxError):
    """An option's value that cannot be read."""


def dual_chunk(text: str | None) -> DualChunk | Literal[False] | None:
    """--dca: "chunk_size,local_size" or with a third number, original_max_position_embeddings; "none" switches it off."""
    if text is None:
        return None
    if text == "none":
        return False
    parts = text.split(",")
    if len(parts) not in (2, 3) or not all(part.strip().isdecimal() for part in parts):
        raise OptionError(
            f"--dca {text!r}: give chunk_size,local_size (32768,4096), a third number for the length temperature's "
            "original_max_position_embeddings, or none"
        )
    return DualChunk(*map(int, parts))


def mesh(text: str | None) -> Mesh | None:
    """--mesh: "context=2,tensor=4" over the first devices there are."""
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in _AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise OptionError(
                f"--mesh {text!r}: give sizes of data, context, tensor, such as context=2,tensor=4"
            )
        sizes[axis] = int(size)
    import jax
    import numpy as np
    from jax.sharding import Mesh

    devices, needed = jax.devices(), math.prod(sizes.values())
    if needed < len(devices) and jax.process_count() > 1:
        raise OptionError(
            f"--mesh {text}: is of {needed} devices, and these {jax.process_count()} processes have {len(devices)}: use all"
        )
    if needed > len(devices):
        raise OptionError(f"--mesh {text}: needs {needed} devices, there are {len(devices)}")
    return Mesh(np.array(devices[:needed]).reshape(list(sizes.values())), tuple(sizes))


def token_ids(text: str) -> list[int]:
    """--token-ids: whole numbers with commas or blanks between them."""
    parts = re.split(r"[,\s]+", text.strip(" \t\r\n,"))
    if parts == [""]:
        return []
    for part in parts:
        if not re.fullmatch(r"-?\d{1,18}", part):
            raise OptionError(
                f"--token-ids: {part[:40]!r} is not a token id: give whole numbers, such as 1,2,3"
            )
    return [int(part) for part in parts]


def number_of_bytes(text: str, option: str) -> int:
    """ "5GB", "500 MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise OptionError(f"{option} {text!r}: give a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def text_of(path: str, option: str) -> str:
    """The text in a file, or on standard input for "-", as it is: nothing is stripped."""
    name = "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise OptionError(f"{option} {name}: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{option} {name}: not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}"
        ) from None


def check_dtype(text: str | None) -> None:
    """--dtype, before anything is loaded."""
    if text is not None and text not in DTYPES:
        raise OptionError(f"--dtype {text!r} is not one of {', '.join(DTYPES)}")
