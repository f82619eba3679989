"""How fast weights arrive on the device, against a plain read of the same files; and when the first token comes.

    python scripts/bench_load.py --gigabytes 3 --out benchmarks/load.json
    python scripts/bench_load.py --folder PATH          # of a checkpoint that is there

Each row is timed with the files out of the page cache (posix_fadvise, as far as the system honours it) and in it. The plain
read goes through one buffer of 8 MB from front to end, and so needs no memory for what it reads; the same read into new memory
is given beside it. A load ends when every array is on the device; the first one of a kind compiles its few programs and has a
row of its own.

The first token is that of the demo checkpoint in a new process, from the start of Python to the end of a one-token answer, with
an empty compilation cache and with a full one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import results
from bench_convert import _config

from qwen_jax.convert import convert
from qwen_jax.convert.synthetic import write_random_checkpoint
from qwen_jax.evals import demo_folder
from qwen_jax.linear import WEIGHT_DTYPES
from qwen_jax.loading import load_params, open_checkpoint

BLOCK = 8 << 20
KINDS = ("bfloat16", "int8")

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
    block = np.empty(BLOCK, np.uint8)
    kept = [block]
    for file in files_of(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(memoryview(block)):
                if fresh:
                    block = np.empty(BLOCK, np.uint8)
                    kept.append(block)
    return time.monotonic() - start


def load(folder: Path, kind: str) -> float:
    """Seconds of one load."""
    start = time.monotonic()
    jax.block_until_ready(load_params(open_checkpoint(folder), weight_dtype=WEIGHT_DTYPES.get(kind)))
    return time.monotonic() - start


def first_token(cache: Path) -> float:
    """Seconds from nothing to the first token of the demo checkpoint."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, "-P", "-c", _FIRST_TOKEN, str(demo_folder.DEFAULT)]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - start


def measure(folder: Path) -> dict[str, Any]:
    """Rates in GB/s of one checkpoint."""
    size = sum(file.stat().st_size for file in files_of(folder))
    rows: dict[str, Any] = {"bytes": size}

    def note(name: str, seconds: float) -> None:
        rows[name] = round(size / seconds / 1e9, 3)
        print(f"{folder.name:10s} {name:36s} {seconds:7.2f} s {rows[name]:7.2f} GB/s", flush=True)

    for kind in KINDS:
        note(f"load {kind}, in page cache, compiling", load(folder, kind))
    for state in ("out of page cache", "in page cache"):
        for name, action in (
            ("plain read", lambda: plain_read(folder, fresh=False)),
            ("plain read, new memory", lambda: plain_read(folder, fresh=True)),
            *((f"load {kind}", lambda kind=kind: load(folder, kind)) for kind in KINDS),
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
        report["first_token_seconds"] = {
            name: round(first_token(base / "compiled"), 2) for name in ("compiling", "compiled before")
        }
        print(report["first_token_seconds"], flush=True)
        jax.device_put(0.0).block_until_ready()  # only now: the processes above needed the device
        if args.folder:
            folders = {"given": args.folder}
        else:
            folders = {"safetensors": base / "hf"}
            write_random_checkpoint(folders["safetensors"], _config(args.gigabytes * 1e9, "bfloat16"))
            if not args.no_converted:
                folders["converted"] = base / "orbax"
                convert(folders["safetensors"], folders["converted"])
        for name, folder in folders.items():
            report[name] = measure(folder)
    if args.out:
        results.write(args.out, report)


if __name__ == "__main__":
    main()
