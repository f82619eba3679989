"""Times what one device of a context axis does in a sparse prefill piece, one rank at a time on one GPU, against one alone.

    python scripts/bench_shares.py [--devices 1 2 4 8] [--densities 0.1 0.01] [--out shares.json]

The piece is the last 31,744 queries of 1,015,808 keys, dual chunk attention, heads of the 14B (40/8 of 128); every head has
1,000 columns and bands at random distances. "ideal" is the time of one device over their number. Line scores are timed up to
where devices would meet, lists by themselves too; inputs are random, the first and the last rank are timed.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import results

from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.kernels.sparse_attention import mosaic_gpu
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import tile_distances

COLUMNS = 1000


def measure(args: argparse.Namespace, count: int, density: float) -> dict[str, Any]:
    """Milliseconds of one rank of `count` devices, the first and the last."""
    (N, K), H, S, T = args.heads, 128, args.keys, args.queries
    rotary, start = tools.rotary(H, tools.QWEN_1M), S - T
    blocks = Blocks.fitting(count, rotary.chunk_len) if count > 1 else None
    rng = np.random.default_rng(0)
    columns = np.zeros((1, N, S), bool)
    for n in range(N):
        columns[0, n, rng.choice(S, COLUMNS, replace=False)] = True
    bands = jnp.asarray(rng.random((1, N, tile_distances(S))) < density)
    dealt = blocks.deal(jnp.asarray(columns), 2) if blocks else jnp.asarray(columns)
    q = tools.random(0, (1, T, N, H))
    k, v = (tools.random(n, (1, 1, K, S // count, H)) for n in (1, 2))
    place = {
        "layer": jnp.int32(0), "q_start": jnp.int32(start), "kv_len_B": jnp.full(1, S, jnp.int32),
    }  # fmt: skip
    common: dict[str, Any] = {"rotary": rotary, "scale_B": jnp.full(1, H**-0.5)}

    def share(rank: jax.Array) -> Share | None:
        return Share(blocks, rank) if blocks else None

    @jax.jit
    def sparse(q: Any, k: Any, v: Any, columns: Any, bands: Any, rank: Any, place: Any) -> Any:
        return attend_lines(
            q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=COLUMNS, share=share(rank), backend=args.backend,
            **place, **common,
        )  # fmt: skip

    @jax.jit
    def scores(q: Any, k: Any, rank: Any, place: Any) -> Any:
        return line_scores(q, k, share=share(rank), backend=args.backend, **place, **common)

    @jax.jit
    def lists(k: Any, v: Any, columns: Any, bands: Any, rank: Any, place: Any) -> Any:
        return mosaic_gpu.lists(
            k, v, columns_BNS=columns, bands_BNM=bands, most_columns=COLUMNS, rotary=rotary, queries=T, share=share(rank),
            **place,
        )  # fmt: skip

    runs = {}
    for rank in sorted({0, count - 1}):
        mine = jnp.split(dealt, count, 2)[rank]
        at = jnp.int32(rank)
        runs[f"sparse, rank {rank}"] = functools.partial(sparse, q, k, v, mine, bands, at, place)
        runs[f"scores, rank {rank}"] = functools.partial(scores, q, k, at, place)
        runs[f"lists, rank {rank}"] = functools.partial(lists, k, v, mine, bands, at, place)
    seconds = tools.interleaved_medians(
        {name: (run, jax.block_until_ready) for name, run in runs.items()}, args.rounds
    )
    return {"devices": count, "share of bands": density} | {
        f"{name} ms": s * 1e3 for name, s in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.01])
    parser.add_argument("--heads", type=int, nargs=2, default=[40, 8])
    parser.add_argument("--keys", type=int, default=1_015_808)
    parser.add_argument("--queries", type=int, default=31_744)
    parser.add_argument("--backend", default="mosaic_gpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for density in args.densities:
        alone = 0.0
        for count in args.devices:
            row = measure(args, count, density)
            alone = row["sparse, rank 0 ms"] if count == 1 else alone
            if alone:
                row["ideal sparse ms"] = alone / count
            rows.append(row)
            print("; ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
            if args.out:
                results.write(args.out, {"command": "python scripts/bench_shares.py", "rows": rows})


if __name__ == "__main__":
    main()
