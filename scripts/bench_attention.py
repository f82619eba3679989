"""Times attention on an NVIDIA GPU against the peers that are installed, in one run, and writes benchmarks/attention-*.json.

    python scripts/bench_attention.py [--only causal-8k,decode-1m] [--heads 28/4,40/8] [--out benchmarks/attention.json]

Every case runs in a process of its own. Several compile at once, without XLA's autotuning, which would use the GPU; from its
first array to its last measurement a process has the GPU to itself. Every contender's output is checked against float32 on
sampled rows before it is timed; contenders take turns, so that none gets a cooler chip. TFLOP/s count the visible pairs only:
4 * pairs * N * H. Decode counts the bytes of K and V read, and of the factors of an 8-bit cache. Rows of other cases that the
file holds are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import results
from attention_contenders import Contender, Inputs, Run, Shape, contenders, exact, make_inputs

TOLERANCE = 1e-2

K = 1024
SHAPES = {
    "causal-8k": Shape(8 * K, 0),
    "causal-32k": Shape(32 * K, 0),
    "causal-128k": Shape(128 * K, 0),
    "causal-32k-head-64": Shape(32 * K, 0, head_dim=64),
    "chunk-at-128k": Shape(32 * K, 96 * K),
    "chunk-at-256k": Shape(32 * K, 224 * K),
    "chunk-at-1m": Shape(32 * K, 992 * K),
    "dca-second-chunk": Shape(
        32 * K, 224 * K, tools.QWEN_1M, cut=tools.QWEN_1M.chunk_len
    ),  # rows 229,376 to 262,143
    "dca-end": Shape(26_960, 983_040, tools.QWEN_1M),  # rows 983,040 to 1,009,999
    "decode-128k": Shape(1, 128 * K - 1),
    "decode-1m": Shape(1, 1024 * K - 1),
    "decode-1m-dca": Shape(1, 1024 * K - 1, tools.QWEN_1M),
    "decode-1m-int8": Shape(1, 1024 * K - 1, tools.QWEN_1M, "int8"),
    "decode-1m-fp8": Shape(1, 1024 * K - 1, tools.QWEN_1M, "float8_e4m3fn"),
}


@dataclasses.dataclass
class Prepared:
    """One shape, compiled: what makes its arrays, what is right for each kind of positions, and what binds each contender."""

    shape: Shape
    make: Callable[[], dict[str, Any]]
    right: dict[Any, Callable[[dict[str, Any]], jax.Array]]
    contenders: dict[str, Contender]
    binds: dict[str, Any]  # or the exception


def prepare(shape: Shape, wanted: dict[str, Contender]) -> Prepared:
    """Compiles everything; the GPU is used by peers' first calls on small arrays only."""
    make = jax.jit(functools.partial(make_inputs, shape))
    arrays = jax.eval_shape(make)
    right: dict[Any, Callable[[dict[str, Any]], jax.Array]] = {}
    binds: dict[str, Any] = {}
    for name, contender in wanted.items():
        dca = contender.shape.dca
        if dca not in right:
            of = functools.partial(exact, shape=dataclasses.replace(shape, dca=dca))
            right[dca] = jax.jit(of).lower(arrays).compile()
        try:
            binds[name] = contender.compile()
        except (
            Exception
        ) as problem:  # a peer that cannot run must not end the run; its reason is part of the result
            binds[name] = problem
    return Prepared(shape, make.lower().compile(), right, wanted, binds)


def measure(prepared: Prepared, rounds: int, at_most_s: float) -> list[dict[str, Any]]:
    """Every contender checked, then timed in turn: a row each, with the reason where one could not run."""
    shape = prepared.shape
    arrays = prepared.make()
    inputs = Inputs(shape, **arrays)
    right = {dca: jax.block_until_ready(of(arrays)) for dca, of in prepared.right.items()}
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, bind in prepared.binds.items():
        row = rows[name] = {"contender": name}
        try:
            if isinstance(bind, Exception):
                raise bind
            run = bind(inputs)
            result = run.start()
            run.wait(result)
            row["error"] = tools.worst_row_error(
                run.out(result)[shape.sample], right[prepared.contenders[name].shape.dca]
            )
            del result
            if row["error"] <= TOLERANCE:
                runs[name] = run
            else:
                row["reason"] = f"wrong: relative error {row['error']:.1e}"
        except Exception as problem:  # as above
            text = str(problem).splitlines()[0][:200] if str(problem) else ""
            row["reason"] = f"{type(problem).__name__}: {text}"
    pairs = {name: (run.start, run.wait) for name, run in runs.items()}
    for name, seconds in tools.interleaved_medians(pairs, rounds, at_most_s=at_most_s).items():
        rows[name] |= {"ms": seconds * 1e3} | rate(prepared.contenders[name].shape, seconds)
    cudnn = min((r["ms"] for n, r in rows.items() if "cudnn" in n and "ms" in r), default=None)
    own = {name.partition(", ")[2]: row["ms"] for name, row in rows.items() if "ms" in row}
    for name, row in rows.items():
        if "ms" in row and cudnn:
            row["ratio to cuDNN"] = cudnn / row["ms"]
        if name == "mosaic_gpu" and "ms" in row:
            for other in ("plain RoPE", "bfloat16 cache", "unpaced"):
                if other in own:
                    row[f"ratio to {other}"] = own[other] / row["ms"]
    return list(rows.values())


def rate(shape: Shape, seconds: float) -> dict[str, float]:
    """TFLOP/s of prefill, GB/s of decode."""
    N, kv_heads = shape.heads
    if shape.queries > 1:
        return {"TFLOP/s": 4 * shape.pairs * N * shape.head_dim / seconds / 1e12}
    element = jnp.dtype(shape.cache).itemsize
    row_bytes = shape.head_dim * element + 4 * (element == 1)
    return {"GB/s": 2 * shape.keys * kv_heads * row_bytes / seconds / 1e9}


def table_line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    name = f"{row.get('shape', ''):20} {row.get('heads', ''):5} {row['contender']:24}"
    if "ms" not in row:
        return f"{name} {row['reason']}"
    speed = f"{row['TFLOP/s']:7.1f} TFLOP/s" if "TFLOP/s" in row else f"{row['GB/s']:7.0f} GB/s   "
    ratios = ", ".join(
        f"{value:.3f} x {key.removeprefix('ratio to ')}" for key, value in row.items() if "ratio" in key
    )
    return f"{name} {row['ms']:9.3f} ms {speed} error {row['error']:.1e} {ratios}"


def save(path: pathlib.Path, new: list[dict[str, Any]]) -> None:
    """Replaces the rows of these cases in the file."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    cases = {(row["shape"], row["heads"]) for row in new}
    rows = [row for row in old if (row["shape"], row["heads"]) not in cases] + new
    results.write(path, {"command": "python scripts/bench_attention.py", "rows": rows})


def run_case(case: str, arguments: argparse.Namespace, turns: str) -> None:
    """One case, in this process."""
    name, heads = case.split("@")
    N, kv_heads = map(int, heads.split("/"))
    shape = dataclasses.replace(SHAPES[name], heads=(N, kv_heads))
    wanted = arguments.contenders.split(",") if arguments.contenders else None
    # A name's part before the comma asks for all of its kind.
    found = {n: c for n, c in contenders(shape).items() if wanted is None or n.split(",")[0] in wanted}
    prepared = prepare(shape, found)
    with open(turns, "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        rows = measure(prepared, arguments.rounds, arguments.at_most)
        date = str(datetime.date.today())
        rows = [{"shape": name, "heads": heads} | row | {"date": date} for row in rows]
        save(arguments.out, rows)
        print("\n".join(map(table_line, rows)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"shapes, comma separated, of {', '.join(SHAPES)}")
    parser.add_argument("--heads", default="28/4,40/8", help="query heads / KV heads, comma separated")
    parser.add_argument("--contenders", default="", help="comma separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-most", type=float, default=60, help="seconds of a case after which rounds end")
    parser.add_argument("--processes", type=int, default=8, help="cases that compile side by side")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/attention.json"))
    parser.add_argument("--case", nargs=2, metavar=("SHAPE@HEADS", "TURNS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case[0], arguments, arguments.case[1])
        return 0
    shapes = arguments.only.split(",") if arguments.only else list(SHAPES)
    cases = [f"{name}@{heads}" for heads in arguments.heads.split(",") for name in shapes]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
    with tempfile.NamedTemporaryFile() as turns, ThreadPoolExecutor(arguments.processes) as pool:

        def child(case: str) -> int:
            command = [*sys.orig_argv, "--case", case, turns.name]
            return subprocess.run(command, env=environment).returncode

        failed = [case for case, code in zip(cases, pool.map(child, cases), strict=True) if code]
    for case in failed:
        print(f"{case} ended without a row", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
