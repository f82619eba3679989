"""Where a GPU's time goes: kernels of a profiler trace, summed by part of the network."""

from __future__ import annotations

import collections
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

# The first pattern that a kernel's name holds decides. What XLA makes of the line scores, the selection and the lists beside
# their kernels is part of the rest, with norms, rotations and what is added.
PARTS = {
    "attention": re.compile(r"dense_prefill|sparse_prefill|decode_attention|cudnn|flash", re.I),
    "line scores": re.compile(r"line_scores", re.I),
    "selection": re.compile(r"cutoffs", re.I),
    "linear": re.compile(r"gemm|nvjet|cutlass|cublas|matmul|xmma|dot", re.I),
    "copies": re.compile(r"memcpy|memset|copy", re.I),
}


class Parts:
    """Filled when the `traced` block ends: seconds by part, and the kernels that took longest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.longest: dict[str, float] = {}


@contextlib.contextmanager
def traced(longest: int = 40) -> Iterator[Parts]:
    """Traces what runs inside; the caller waits for its results before the block ends."""
    parts = Parts()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield parts
        (path,) = Path(folder).rglob("*.xplane.pb")
        names = _kernel_seconds(path)
    for name, seconds in names.items():
        part = next((part for part, pattern in PARTS.items() if pattern.search(name)), "rest")
        parts.seconds[part] = parts.seconds.get(part, 0.0) + seconds
    parts.longest = {name[:80]: round(seconds, 4) for name, seconds in names.most_common(longest)}


def _kernel_seconds(path: Path) -> collections.Counter[str]:
    """Seconds of every kernel and copy, by name, over the streams of all GPUs, divided by the number of GPUs."""
    names: collections.Counter[str] = collections.Counter()
    gpus = 0
    for plane in ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        gpus += 1
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    names[event.name] += event.duration_ns / 1e9
    return collections.Counter({name: seconds / max(gpus, 1) for name, seconds in names.items()})
