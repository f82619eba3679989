"""Finds the sizes of the Hopper kernels on the machine at hand and writes them where the kernels look them up.

    python scripts/tune_attention.py [--write] [--prefill chunk-at-256k] [--decode decode-1m]

Every candidate that compiles is checked against float32, then all are timed in turn; the fastest right one wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import bench_attention as bench
import jax
from attention_contenders import Shape, ours

from qwen_jax.kernels.attention import hopper as prefill
from qwen_jax.kernels.decode_attention.split import Tiling

PREFILL = {
    ("bfloat16", 128): [
        prefill.Tiling(),
        prefill.Tiling(registers=(240, 24)),
        prefill.Tiling(cluster=2),
        prefill.Tiling(cluster=2, registers=(240, 24)),
    ],
    ("bfloat16", 64): [
        prefill.Tiling(stages=3),
        prefill.Tiling(stages=4),
        prefill.Tiling(wgs=3, stages=3, registers=(160, 32)),
    ],
}
DECODE = {
    ("bfloat16", 128): [Tiling(128, 2), Tiling(64, 5), Tiling(64, 4)],
    ("bfloat16", 64): [Tiling(128, 4), Tiling(64, 8), Tiling(128, 2, walks=2)],
    **{
        (cache, head_dim): [
            Tiling(keys, 128 * stages // keys, walks)
            for keys in (128, 64)
            for walks, stages in ((1, 6 * 128 // head_dim), (2, 3 * 128 // head_dim))
        ]
        for cache in ("int8", "float8_e4m3fn")
        for head_dim in (128, 64)
    },
}


def best(shape: Shape, tilings: list[Any], rounds: int) -> dict[str, Any] | None:
    """The tiling to write, or None where none ran."""
    candidates = {json.dumps(dataclasses.asdict(t)): ours(shape, "mosaic_gpu", tiling=t) for t in tilings}
    rows = bench.measure(bench.prepare(shape, candidates), rounds, float("inf"))
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
        for (cache, head_dim), tilings in table.items() if shape else ():
            if str(head_dim) not in arguments.head_dims.split(","):
                continue
            problem = dataclasses.replace(bench.SHAPES[shape], cache=cache, head_dim=head_dim)
            tiling = best(problem, tilings, arguments.rounds)
            entry = {"head_dim": head_dim, "cache": cache, "tuned_on": shape, "tiling": tiling}
            entries += [entry] if tiling else []
        print(json.dumps({op: entries}))
        if arguments.write and entries:
            path = root / folder / "tuned" / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({op: entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
