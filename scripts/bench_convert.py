"""Measures the converter on a generated checkpoint: seconds, peak memory and bit-exactness, both ways.

    python scripts/bench_convert.py --gigabytes 8 --out benchmarks/convert.json

Each conversion runs in a process of its own; its peak is VmHWM: resident memory as the kernel counts it, mapped
pages included. Needs Linux and three times the checkpoint's size of free disk; what it writes is removed again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qwen_jax.config import ModelConfig
from qwen_jax.convert.source import DTYPES, tensors
from qwen_jax.convert.synthetic import TINY, write_random_checkpoint
from qwen_jax.params import num_params

_QWEN2_5_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
}

_CHILD = """
import json, re, sys, time
from qwen_jax.convert import convert
start = time.monotonic()
convert(sys.argv[1], sys.argv[2])
seconds = time.monotonic() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gigabytes", type=float, default=8.0, help="least size of the checkpoint, in 10^9 bytes"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: print only")
    parser.add_argument("--tmp", type=Path, help="where to put the checkpoints; default: the system's")
    args = parser.parse_args()

    raw = _config(args.gigabytes * 1e9, args.dtype)
    config = ModelConfig.from_dict(raw)
    itemsize = DTYPES[args.dtype].itemsize
    largest = itemsize * max(_count(p.shape(config)) for p, _ in tensors(config))
    limit = 2 * largest + 10**9
    with tempfile.TemporaryDirectory(dir=args.tmp, prefix="bench_convert_") as folder:
        original, converted, back = (Path(folder) / name for name in ("original", "converted", "back"))
        write_random_checkpoint(original, raw)
        runs = {"hf_to_orbax": _convert(original, converted), "orbax_to_hf": _convert(converted, back)}
        different = _different_tensors(original, back)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {_memory_gb():.0f} GB",
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")
        },
        "checkpoint": {
            "shape": f"Qwen2.5-7B with {config.num_layers} layers, {args.dtype}",
            "bytes": num_params(config) * itemsize,
            "largest_tensor_bytes": largest,
        },
        "peak_rss_limit_bytes": limit,
        "runs": runs,
        "bit_exact": not different,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if different:
        sys.exit(f"the round trip changed {', '.join(different[:5])}")
    if any(run["peak_rss_bytes"] > limit for run in runs.values()):
        sys.exit("peak memory is above the limit")


def _config(least_bytes: float, dtype: str) -> dict[str, Any]:
    """Qwen2.5-7B with as many layers as the size asks for."""
    raw = {**TINY, **_QWEN2_5_7B, "torch_dtype": dtype, "num_hidden_layers": 1}
    while num_params(ModelConfig.from_dict(raw)) * DTYPES[dtype].itemsize < least_bytes:
        raw["num_hidden_layers"] += 1
    return raw


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _convert(src: Path, dst: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, str(src), str(dst)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _different_tensors(a: Path, b: Path) -> list[str]:
    """Names of tensors that are not the same bytes in both folders, read with the safetensors library."""
    files_a, files_b = _files_by_tensor(a), _files_by_tensor(b)
    different = sorted(files_a.keys() ^ files_b.keys())
    for name in files_a.keys() & files_b.keys():
        with safe_open(files_a[name], "numpy") as x, safe_open(files_b[name], "numpy") as y:
            one, other = x.get_tensor(name), y.get_tensor(name)
            bits = f"u{one.itemsize}"
            if (
                one.dtype != other.dtype
                or one.shape != other.shape
                or (one.view(bits) != other.view(bits)).any()
            ):
                different.append(name)
    return different


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    result = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as stream:
            result.update(dict.fromkeys(stream.keys(), file))
    return result


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


if __name__ == "__main__":
    main()
