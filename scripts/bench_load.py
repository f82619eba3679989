"""How fast weights arrive on the device, against a plain read of the same files; and when the first token comes.

    python scripts/bench_load.py --gigabytes 3 --out benchmarks/load.json
    python scripts/bench_load.py --folder PATH          # of a checkpoint that is there

Each row is timed with the files out of the page cache (posix_fadvise, as far as the system honours it) and in it. The plain
read goes through one buffer of 8 MB from front to end, and so needs no memory for what it reads; the same read into
new memory is given beside it. A load ends when every array is on the device; each runs in a process of its own, which has
imported all and started the device before the clock, and finds its few programs in a compilation cache; the load that filled
the cache is a row too.

The first token is that of the demo checkpoint in a new process, from the start of Python to the end of a one-token answer, with
an empty compilation cache and with a full one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results
from bench_convert import _config

from qwen_jax.convert import convert
from qwen_jax.convert.synthetic import write_random_checkpoint
from qwen_jax.evals import demo_folder

BLOCK = 8 << 20
LOADS: dict[str, dict[str, str]] = {"bfloat16": {}, "int8": {"weight_dtype": "int8"}}

_LOAD = """
import json, sys, time
import jax
from qwen_jax.loading import open_checkpoint, load_params
from qwen_jax.linear import WEIGHT_DTYPES
folder, weight_dtype = sys.argv[1:3]
jax.device_put(0.0).block_until_ready()
start = time.monotonic()
arrays = load_params(open_checkpoint(folder), weight_dtype=WEIGHT_DTYPES.get(weight_dtype))
jax.block_until_ready(arrays)
print(json.dumps(time.monotonic() - start))
"""
_FIRST_TOKEN = """
import sys
from qwen_jax import LLM, SamplingParams
print(LLM(sys.argv[1]).generate("What is", SamplingParams(max_new_tokens=1)).text)
"""


def files_of(folder: Path) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop(folder: Path) -> None:
    """Asks the system to forget the files' pages."""
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(folder: Path, *, fresh: bool) -> float:
    """Seconds to read every file in order, into one buffer or into new memory."""
    start = time.monotonic()
    for file in files_of(folder):
        size = file.stat().st_size
        memory = memoryview(bytearray(min(BLOCK, size))) if not fresh else None
        kept = []
        with file.open("rb", buffering=0) as stream:
            while size > 0:
                block = memory if memory is not None else memoryview(bytearray(BLOCK))
                kept += [block] * fresh
                size -= stream.readinto(block[: min(BLOCK, size)]) or size
    return time.monotonic() - start


def run(code: str, cache: Path, *arguments: str) -> str:
    """What a process of its own prints, with a compilation cache."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def load(folder: Path, kind: str, cache: Path) -> float:
    """Seconds of one load."""
    return float(json.loads(run(_LOAD, cache, str(folder), kind).splitlines()[-1]))


def first_token(cache: Path) -> float:
    """Seconds from nothing to the first token of the demo checkpoint."""
    start = time.monotonic()
    run(_FIRST_TOKEN, cache, str(demo_folder.DEFAULT))
    return time.monotonic() - start


def measure(folder: Path, cache: Path) -> dict[str, Any]:
    """Rates in GB/s of one checkpoint."""
    size = sum(file.stat().st_size for file in files_of(folder))
    rows: dict[str, Any] = {"bytes": size}

    def note(name: str, seconds: float) -> None:
        rows[name] = round(size / seconds / 1e9, 3)
        print(f"{folder.name:10s} {name:36s} {seconds:7.2f} s {rows[name]:7.2f} GB/s", flush=True)

    for kind in LOADS:
        note(f"load {kind}, in page cache, compiling", load(folder, kind, cache / kind))
    for state in ("out of page cache", "in page cache"):
        for name, action in (
            ("plain read", lambda: plain_read(folder, fresh=False)),
            ("plain read, new memory", lambda: plain_read(folder, fresh=True)),
            *((f"load {kind}", lambda kind=kind: load(folder, kind, cache / kind)) for kind in LOADS),
        ):
            if state.startswith("out"):
                drop(folder)
            note(f"{name}, {state}", action())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there, in place of a generated one")
    parser.add_argument("--tmp", type=Path, help="where to put generated checkpoints; default: the system's")
    parser.add_argument("--no-converted", action="store_true", help="leave out the converted folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.tmp, prefix="bench_load_") as scratch:
        base = Path(scratch)
        if args.folder:
            folders = {"given": args.folder}
        else:
            folders = {"safetensors": base / "hf"}
            write_random_checkpoint(folders["safetensors"], _config(args.gigabytes * 1e9, "bfloat16"))
            if not args.no_converted:
                folders["converted"] = base / "orbax"
                convert(folders["safetensors"], folders["converted"])
        for name, folder in folders.items():
            report[name] = measure(folder, base / "cache")
        report["first_token_seconds"] = {
            name: round(first_token(base / "compiled"), 2) for name in ("compiling", "compiled before")
        }
        print(report["first_token_seconds"], flush=True)
    if args.out:
        results.write(args.out, report)


if __name__ == "__main__":
    main()
