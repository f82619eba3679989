"""The TPU compiler's own schedule of a kernel, read from its dump: what a kernel costs where nothing can be timed.

    uv run --group aot python -m scripts.tpu_schedule [v5e v5p v6e tpu7x]

prints the attention kernels beside jax's splash attention, compiled in the same run. A bundle is one issue cycle when nothing
stalls: the figures leave out waits for copies and for units that are still busy, and no TPU has confirmed them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.attention.tpu import Problem, Tiling, prefill
from qwen_jax.kernels.attention.tpu_specs import tiling_for
from scripts import tpu_topology

_TILE = 1024 * 1024  # scores of the tile that figures are given for

_dump = Path(tempfile.mkdtemp(prefix="tpu_schedule_"))


@dataclasses.dataclass(frozen=True)
class Region:
    """Consecutive bundles: addresses [first, last], and how often they use every kind of slot."""

    first: int
    last: int
    slots: dict[str, int]

    @property
    def bundles(self) -> int:
        """Issue cycles."""
        return self.last - self.first + 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A compiled kernel: all of it, its regions (loop bodies, branches), and the slots of a bundle."""

    whole: Region
    regions: tuple[Region, ...]
    capacity: dict[str, int]

    def share(self, region: Region, slot: str) -> float:
        """Share of these slots in use."""
        return region.slots[slot] / (self.capacity[slot] * region.bundles)

    def bodies(self, exponentials: int) -> list[Region]:
        """Loop bodies that make at least so many vectors of exponentials, but not twice, smallest first; one of each kind."""
        kinds: dict[tuple[int, int], Region] = {}
        for region in sorted(self.regions, key=lambda r: r.bundles):
            if exponentials <= region.slots["EUP"] < 1.9 * exponentials:
                kinds.setdefault((region.slots["EUP"], region.slots["VALU"]), region)
        return sorted(kinds.values(), key=lambda r: r.bundles)


def dump_schedules() -> None:
    """Makes libtpu write its schedules; must come before it is loaded."""
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={_dump} --xla_jf_dump_llo_text=true"


def schedule_of(name: str, topology: str, function: Callable[..., Any], *args: Any) -> Schedule:
    """The schedule of the kernel called `name` within `function`, compiled for one device of `topology`."""
    _dump.mkdir(exist_ok=True)
    try:
        tpu_topology.compile_for_one(topology, function, *args)
        bundles, use = (_file(name, end) for end in ("-final_bundles.txt", "per-bundle-utilization.txt"))
        return _read(bundles.read_text().splitlines(), use.read_text())
    finally:
        shutil.rmtree(_dump)


def _file(name: str, end: str) -> Path:
    found = [
        path
        for path in _dump.iterdir()
        if name in path.name
        and path.name.endswith(end)
        and "schedule-analysis" not in path.name
        and "pre-delay" not in path.name
    ]
    if len(found) != 1:
        raise SystemExit(f"the compiler dumped {len(found)} schedules called {name!r}")
    return found[0]


def _read(bundle_lines: list[str], utilisation: str) -> Schedule:
    head, body = utilisation.split("== UTILIZATION:", 1)
    titles = re.search(r"\n(MXU[^\n]*)\n", head)
    counts = re.search(r"\n\s+([\d ]+)\n", head)
    if not (titles and counts):
        raise SystemExit("the compiler's dump has another form than this script reads")
    names = titles.group(1).replace(" ", "").split(",")
    rows = [[int(x) for x in line.split()] for line in body.splitlines() if line.strip()]

    def region(first: int, last: int) -> Region:
        part = rows[first : last + 1]
        return Region(first, last, {n: sum(row[k] for row in part) for k, n in enumerate(names)})

    regions = tuple(region(first, last) for first, last in _spans(bundle_lines))
    capacity = dict(zip(names, map(int, counts.group(1).split()), strict=True))
    return Schedule(region(0, len(rows) - 1), regions, capacity)


def _spans(bundle_lines: list[str]) -> Iterator[tuple[int, int]]:
    """(first, last) address of every region, from the compiler's notes "Start region N" and "End region N"."""
    starts: dict[str, int] = {}
    address = 0
    for line in bundle_lines:
        if at := re.match(r"\s*(0x[0-9a-f]+|0)\s", line):
            address = int(at.group(1), 16)
        for kind, number in re.findall(r"(Start|End) region (\d+)", line):
            if kind == "Start":
                starts[number] = address
            elif number in starts:
                yield starts.pop(number), address


def prefill_schedule(generation: str, tiling: Tiling, head_dim: int = 128) -> Schedule:
    """Of the prefill kernel with dual chunk attention, 7B's heads, a chunk of 31,744 tokens, a million keys."""
    T, N, K, S = 31_744, 28, 4, 1_010_176
    problem = Problem(3, 1, N, 1, -(-T // tiling.block_q), tiling.block_q, K, S, head_dim)
    cache = jax.ShapeDtypeStruct((1, 1, K, S, head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((3, 1, N, problem.tiles * problem.rows, head_dim), jnp.bfloat16)
    integers = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (5, 1, 2 * problem.tiles))
    kernel = prefill(problem, tiling, jnp.bfloat16)
    return schedule_of(
        "prefill_attention", tpu_topology.SMALLEST[generation], kernel, *integers, q, cache, cache
    )


def splash_schedule(generation: str) -> Schedule:
    """Of jax's own splash attention, causal, head 128, blocks of 1024, compute blocks of 512."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = 8192
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(block_q=1024, block_kv=1024, block_kv_compute=512),
    )
    x = jax.ShapeDtypeStruct((1, T, 128), jnp.bfloat16)
    return schedule_of("splash_mha_fwd", tpu_topology.SMALLEST[generation], kernel, x, x, x)


def line(title: str, schedule: Schedule, tiles: float, loops: int) -> str:
    """A row of the table: the smallest loop body that makes the exponentials of `tiles` tiles of 1024 x 1024 scores.

    A kernel with two `loops` has a body for tiles without masks and one with; one loop holds both and is not told apart.
    """
    bodies = schedule.bodies(int(tiles * _TILE / 1024))[:loops]
    inner = bodies[0]
    masked = f"{bodies[1].bundles / tiles:.0f}" if loops > 1 else "-"
    rest = str(schedule.whole.bundles - sum(body.bundles for body in bodies)) if loops > 1 else "-"
    spills = inner.slots["VSTORE:SPILL"] / tiles
    return (
        f"| {title} | {inner.bundles / tiles:.0f} | {schedule.share(inner, 'MXU'):.1%} | {spills:.0f} "
        f"| {masked} | {rest} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generations", nargs="*", default=list(tpu_topology.SMALLEST))
    if reason := tpu_topology.why_no_compiler():
        raise SystemExit(reason)
    dump_schedules()
    print("| kernel | bundles a tile | MXU slots in use | spills | bundles, masked tile | other bundles |")
    print("|---|---|---|---|---|---|")
    for generation in parser.parse_args().generations:
        print(line(f"{generation}, splash", splash_schedule(generation), 1, 1), flush=True)
        for head_dim in (128, 64):
            tiling = tiling_for(1 << 20, 253_952)
            tiles = tiling.block_q * tiling.block_kv / _TILE
            sizes = f"{tiling.block_q} x {tiling.block_kv}, {tiling.block_compute}"
            title = f"{generation}, ours, head {head_dim}, {sizes}"
            print(line(title, prefill_schedule(generation, tiling, head_dim), tiles, 2), flush=True)


if __name__ == "__main__":
    main()
