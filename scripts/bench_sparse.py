"""Times sparse prefill attention on an NVIDIA GPU against our dense kernel, in one run; writes benchmarks/sparse-*.json.

    python scripts/bench_sparse.py [--only minference-128k,chunk-1m-10] [--out benchmarks/sparse-nvidia-h200.json]

Lines are made, not chosen from scores: those of MInference's benchmark (1,000 columns, the 6,096 nearest diagonals), and
heads of ten separate bands at random distances whose widths reach a density, computed pairs over causal pairs. Sampled rows
are checked against a float32 softmax over their computed keys before anything is timed. A call's time holds the lists made from
the lines; they are timed alone as well. TFLOP/s count the tiles of 128 x 128 that the kernel walks, whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import results

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.sparse_attention import mosaic_gpu
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import BAND, bands_of, tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys, computed_pairs
from qwen_jax.kernels.sparse_attention.hopper import FIELDS

N, K, H = 28, 4, 128
TOLERANCE = 1e-2
KI = 1024
SEPARATE_BANDS = 10
MINFERENCE_COLUMNS, MINFERENCE_DIAGONALS, MINFERENCE_BLOCK = 1000, 6096, 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """Queries start .. start + queries of one prompt; density of None stands for MInference's lines."""

    queries: int
    start: int
    columns: int
    density: float | None
    dca: DualChunk | None = None

    @property
    def keys(self) -> int:
        return self.start + self.queries

    @property
    def causal(self) -> int:
        """Pairs of one head in dense attention."""
        return self.queries * self.start + self.queries * (self.queries + 1) // 2


SHAPES = {
    "minference-128k": Shape(128 * KI, 0, MINFERENCE_COLUMNS, None),
    "chunk-1m-10": Shape(32 * KI, 992 * KI, 1000, 0.10, tools.QWEN_1M),
    "chunk-1m-5": Shape(32 * KI, 992 * KI, 1000, 0.05, tools.QWEN_1M),
}


def lines(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """bool[1, N, S] columns and bool[1, N, M] bands."""
    rng = np.random.default_rng(seed)
    S, M = shape.keys, tile_distances(shape.keys)
    columns = np.zeros((1, N, S), bool)
    for n in range(N):
        columns[0, n, :30] = True
        columns[0, n, 30 + rng.choice(S - 30, shape.columns - 30, replace=False)] = True
    if shape.density is None:
        diagonals = jnp.arange(S) < MINFERENCE_DIAGONALS
        return columns, np.tile(np.asarray(bands_of(diagonals)), (1, N, 1))
    bands = np.zeros((1, N, M), bool)
    piece = {"q_start": shape.start, "queries": shape.queries, "kv_len": shape.keys}
    for n in range(N):
        starts = np.arange(SEPARATE_BANDS) * M // SEPARATE_BANDS
        starts += rng.integers(0, M // (2 * SEPARATE_BANDS), SEPARATE_BANDS)
        starts[0] = 0
        shares = rng.uniform(0.5, 1.5, SEPARATE_BANDS)
        low, high = 0.0, M / 2
        for _ in range(20):  # the width that reaches the density
            width = (low + high) / 2
            bands[0, n] = False
            for start, share in zip(starts, shares / shares.sum(), strict=True):
                bands[0, n, start : start + max(1, round(width * share))] = True
            dense_enough = computed_pairs(columns[0, n], bands[0, n], **piece) >= shape.density * shape.causal
            low, high = (low, width) if dense_enough else (width, high)
    return columns, bands


def minference_pairs(columns_S: np.ndarray, queries: int) -> int:
    """Pairs that MInference computes for its local lines: per 64 rows, keys back to the first one's farthest diagonal."""
    first = np.arange(queries) // MINFERENCE_BLOCK * MINFERENCE_BLOCK
    lowest = np.maximum(first - (MINFERENCE_DIAGONALS - 1), 0)
    before = np.append(0, np.cumsum(columns_S))
    return int((np.arange(queries) - lowest + 1 + before[lowest]).sum())


def measure(name: str, shape: Shape, rounds: int) -> dict[str, Any]:
    """One shape: checked, then timed."""
    columns, bands = lines(shape)
    piece = {"q_start": shape.start, "queries": shape.queries, "kv_len": shape.keys}
    pairs = sum(computed_pairs(columns[0, n], bands[0, n], **piece) for n in range(N))
    most = int(columns.sum(-1).max())
    rotary = tools.rotary(H, shape.dca)
    q = tools.random(1, (1, shape.queries, N, H))
    k, v = (tools.random(n, (1, 1, K, shape.keys, H)) for n in (2, 3))
    common = {
        "layer": jnp.int32(0), "q_start": jnp.int32(shape.start), "kv_len_B": jnp.full(1, shape.keys, jnp.int32),
        "scale_B": jnp.full(1, H**-0.5, jnp.float32),
    }  # fmt: skip
    marks = {"columns_BNS": jnp.asarray(columns), "bands_BNM": jnp.asarray(bands)}
    sparse = jax.jit(functools.partial(attend_lines, rotary=rotary, most_columns=most, backend="mosaic_gpu"))
    lists = jax.jit(
        functools.partial(mosaic_gpu.lists, rotary=rotary, most_columns=most, queries=shape.queries)
    )
    list_arguments = {name: x for name, x in common.items() if name != "scale_B"}
    dense = jax.jit(functools.partial(attend, rotary=rotary, backend="mosaic_gpu"))

    out, lse = sparse(q, k, v, **common, **marks)
    rows = np.unique(np.linspace(0, shape.queries - 1, 4).astype(int))
    keep = np.stack([computed_keys(columns[0, n], bands[0, n], shape.start + rows) for n in range(N)], axis=1)
    want, want_lse = tools.exact(
        q[0, rows], shape.start + rows, k[0, 0], v[0, 0], kv_len=shape.keys, rotary=rotary, scale=H**-0.5, keep_RNS=keep
    )  # fmt: skip
    row: dict[str, Any] = {
        "shape": name, "density": pairs / (N * shape.causal), "columns": most,
        "bands_of_head_0": int((np.diff(np.flatnonzero(bands[0, 0])) > 1).sum()) + 1,
        "error": tools.worst_row_error(out[0, rows], want),
        "lse_error": float(np.abs(np.asarray(lse[0, rows]) - np.asarray(want_lse)).max()),
    }  # fmt: skip
    if row["error"] > TOLERANCE:
        return row | {"reason": "wrong"}
    walked = lists(k, v, **list_arguments, **marks)[0].items.reshape(-1, FIELDS)[:, -1]
    flop = 4 * H * BAND**2 * int(np.asarray(walked, np.int64).sum())
    seconds = tools.interleaved_medians(
        {
            "sparse": (lambda: sparse(q, k, v, **common, **marks), jax.block_until_ready),
            "lists": (lambda: lists(k, v, **list_arguments, **marks), jax.block_until_ready),
            "dense": (lambda: dense(q, k, v, **common), jax.block_until_ready),
        },
        rounds,
    )
    row |= {f"{contender}_ms": s * 1e3 for contender, s in seconds.items()}
    row |= {
        "TFLOP/s": flop / seconds["sparse"] / 1e12,
        "dense TFLOP/s": 4 * H * N * shape.causal / seconds["dense"] / 1e12,
        "speed-up": seconds["dense"] / seconds["sparse"],
    }
    if shape.density is None:
        theirs = sum(minference_pairs(columns[0, n], shape.queries) for n in range(N))
        row["pairs over MInference's"] = pairs / theirs
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SHAPES), help="shapes, comma separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only.split(","):
        rows.append(measure(name, SHAPES[name], arguments.rounds))
        for key, value in rows[-1].items():
            print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}", flush=True)
        if arguments.out:
            results.write(arguments.out, {"heads": f"{N}/{K}", "head_dim": H, "rows": rows})


if __name__ == "__main__":
    main()
