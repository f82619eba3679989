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
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.sparse_attention.mosaic_tpu import tiling_for as sparse_tiling_for
from qwen_jax.kernels.sparse_attention.tpu import Problem as SparseProblem
from qwen_jax.kernels.sparse_attention.tpu import Tiling as SparseTiling
from qwen_jax.kernels.sparse_attention.tpu import sparse_prefill
from qwen_jax.kernels.tpu import as_it_lies, flat
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
        """Innermost regions that make at least so many vectors of exponentials, but not twice, in the program's order."""
        found = [r for r in self.regions if exponentials <= r.slots["EUP"] < 1.9 * exponentials]
        inner = [
            r
            for r in found
            if not any(r.first <= x.first and x.last <= r.last for x in found if x.bundles < r.bundles)
        ]
        return sorted({r.first: r for r in inner}.values(), key=lambda r: r.first)


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
    cache = jax.eval_shape(as_it_lies, jax.ShapeDtypeStruct((1, 1, K, S, head_dim), jnp.bfloat16))
    q = jax.ShapeDtypeStruct((3, 1, N, problem.tiles * problem.rows, head_dim), jnp.bfloat16)
    integers = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (5, 1, 2 * problem.tiles))
    kernel = prefill(problem, tiling, jnp.bfloat16)
    return schedule_of(
        "prefill_attention", tpu_topology.SMALLEST[generation], kernel, *integers, q, cache, cache
    )


def sparse_schedule(generation: str, tiling: SparseTiling, head_dim: int = 128) -> Schedule:
    """Of the sparse prefill kernel with dual chunk attention, 7B's heads, a chunk of 31,744 tokens, a million keys."""
    T, N, K, S, H, P = 31_744, 28, 4, 1_010_176, head_dim, 8192
    rows = tiling.tiles * BAND
    problem = SparseProblem(3, 1, N, K, -(-T // rows), S, H, P)
    shape, blocks = jax.ShapeDtypeStruct, problem.blocks
    integers = [
        shape(size, jnp.int32) for size in ((4,), (1,), (N * blocks * tiling.fields,), (N, 1, S // BAND))
    ]
    cache, columns, marks = (1, 1, K, S, H), (N, P, H), (N, P, 256)
    if flat(H):
        cache, columns, marks = ((*size[:-2], size[-1], size[-2]) for size in (cache, columns, marks))
    arrays = [(3, 1, N, blocks * rows, H), cache, cache, columns, columns]
    return schedule_of(
        "sparse_prefill_attention", tpu_topology.SMALLEST[generation], sparse_prefill(problem, tiling, jnp.bfloat16),
        *integers, *(shape(size, jnp.bfloat16) for size in arrays), shape(marks, jnp.int8),
    )  # fmt: skip


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


def rows(title: str, schedule: Schedule, tiles: float, kinds: tuple[str, ...]) -> Iterator[str]:
    """Rows of the table, one for every kind of loop body, in order; a body makes `tiles` tiles of 1024 x 1024 scores."""
    bodies = schedule.bodies(int(tiles * _TILE / 1024))[: len(kinds)]
    rest = schedule.whole.bundles - sum(body.bundles for body in bodies)
    for kind, body in zip(kinds, bodies, strict=True):
        yield (
            f"| {title} | {kind} | {body.bundles / tiles:.0f} | {schedule.share(body, 'MXU'):.1%} "
            f"| {body.slots['VSTORE:SPILL'] / tiles:.0f} | {rest} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generations", nargs="*", default=list(tpu_topology.SMALLEST))
    if reason := tpu_topology.why_no_compiler():
        raise SystemExit(reason)
    dump_schedules()
    print("| kernel | loop body | bundles a tile | MXU slots in use | spills | all other bundles |")
    print("|---|---|---|---|---|---|")
    for generation in parser.parse_args().generations:
        for title, schedule, tiles, kinds in _kernels(generation):
            for row in rows(f"{generation}, {title}", schedule, tiles, kinds):
                print(row, flush=True)


def _kernels(generation: str) -> Iterator[tuple[str, Schedule, float, tuple[str, ...]]]:
    yield "splash", splash_schedule(generation), 1, ("all tiles",)
    for head_dim in (128, 64):
        tiling = tiling_for(generation, head_dim, 1 << 20, 253_952)
        sizes = f"{tiling.block_q} x {tiling.block_kv}, {tiling.block_compute}"
        schedule = prefill_schedule(generation, tiling, head_dim)
        yield (
            f"dense, head {head_dim}, {sizes}",
            schedule,
            tiling.block_q * tiling.block_kv / _TILE,
            ("plain", "masked"),
        )
    for head_dim in (128, 64):
        sparse = sparse_tiling_for(generation, head_dim)
        tiles = sparse.tiles * sparse.distances * BAND**2 / _TILE
        # The compiler lays the kinds of a walk's steps out from the last to the first.
        runs = (f"bands, runs of {run}" for run in reversed(sparse.runs))
        yield (
            f"sparse, head {head_dim}, {sparse.tiles} x {sparse.distances} tiles",
            sparse_schedule(generation, sparse, head_dim),
            tiles,
            (*runs, "bands, masked", "columns"),
        )


if __name__ == "__main__":
    main()
