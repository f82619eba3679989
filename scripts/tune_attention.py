"""Finds the sizes of the Hopper kernels on the machine at hand and writes them where the kernels look them up.

    python scripts/tune_attention.py [--write] [--prefill chunk-at-256k] [--decode decode-1m]

Every candidate that compiles is checked against float32, then all are timed in turn; the fastest right one wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import bench_attention as bench
import jax

from qwen_jax.kernels.attention import hopper as prefill
from qwen_jax.kernels.decode_attention import hopper as decode

PREFILL = {
    128: [
        prefill.Tiling(),
        prefill.Tiling(registers=(240, 24)),
        prefill.Tiling(cluster=2),
        prefill.Tiling(cluster=2, registers=(240, 24)),
    ],
    64: [
        prefill.Tiling(stages=3),
        prefill.Tiling(stages=4),
        prefill.Tiling(wgs=3, stages=3, registers=(160, 32)),
    ],
}
DECODE = {
    128: [
        decode.Tiling(128, 2),
        decode.Tiling(64, 5),
        decode.Tiling(64, 4),
    ],
    64: [decode.Tiling(128, 4), decode.Tiling(64, 8), decode.Tiling(128, 2, blocks_each=2)],
}


def candidates(inputs: bench.Inputs, tilings: list[Any]) -> dict[str, Callable[[], bench.Contender]]:
    """A contender for each tiling, named by its fields."""
    return {
        describe(tiling): functools.partial(bench.ours, inputs, "mosaic_gpu", tiling=tiling)
        for tiling in tilings
    }


def describe(tiling: Any) -> str:
    return json.dumps(dataclasses.asdict(tiling))


def best(
    shape: str, heads: tuple[int, int], head_dim: int, tilings: list[Any], rounds: int
) -> dict[str, Any] | None:
    """The tiling to write, or None where none ran."""
    rows = bench.measure(
        shape, bench.SHAPES[shape], heads, lambda inputs: candidates(inputs, tilings), rounds, head_dim
    )
    print("\n".join(map(bench.table_line, rows)), flush=True)
    timed = [row for row in rows if "ms" in row]
    return json.loads(min(timed, key=lambda row: row["ms"])["contender"]) if timed else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prefill", default="chunk-at-256k", help="shape to tune the prefill kernel on; '' for none"
    )
    parser.add_argument(
        "--decode", default="decode-1m", help="shape to tune the decode kernel on; '' for none"
    )
    parser.add_argument("--head-dims", default="128,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the winners under kernels/")
    arguments = parser.parse_args()
    file = jax.devices()[0].device_kind.lower().replace(" ", "_") + ".json"
    root = pathlib.Path(__file__).resolve().parent.parent / "kernels"
    for op, folder, shape, table in (
        ("prefill", "attention", arguments.prefill, PREFILL),
        ("decode", "decode_attention", arguments.decode, DECODE),
    ):
        entries = []
        for head_dim in map(int, arguments.head_dims.split(",")) if shape else ():
            tiling = best(shape, (28, 4), head_dim, table[head_dim], arguments.rounds)
            entry = {"head_dim": head_dim, "cache": "bfloat16", "tuned_on": shape, "tiling": tiling}
            entries += [entry] if tiling else []
        print(json.dumps({op: entries}))
        if arguments.write and entries:
            path = root / folder / "tuned" / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({op: entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
