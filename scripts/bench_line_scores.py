"""Times what chooses the lines of sparse prefill on a GPU, apart from attention: scores, selection, lists of tiles.

    python scripts/bench_line_scores.py [--only 32k-at-1m] [--backend mosaic_gpu] [--out benchmarks/line-scores.json]

Scores of two heads are first compared with float64 over all keys. Keys and queries are standard normal, as no trained model's
are; none of the times depends on that, except that scores which tie at the cutoff cost the selection two more passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import results

from qwen_jax.kernels.line_scores.api import FORCED_COLUMNS, FORCED_DIAGONALS, LAST_QUERIES, line_scores
from qwen_jax.kernels.sparse_attention.bands import bands_of
from qwen_jax.kernels.sparse_attention.mosaic_gpu import lists
from qwen_jax.rope import Rotary, Stage
from qwen_jax.sparsity.selection import select_lines

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
TOLERANCE = 1e-2
K = 1024


@dataclasses.dataclass(frozen=True)
class Shape:
    """A piece of `queries` at the end of `keys` keys, and the lines that every head keeps."""

    queries: int
    keys: int
    vertical: int
    slash: int


SHAPES = {
    "32k-at-128k": Shape(32 * K, 128 * K, 1000, 6096),
    "32k-at-1m": Shape(32 * K, 1024 * K, 20_000, 24_000),
}


def exact(
    q_RH: np.ndarray, i_R: np.ndarray, k_SH: np.ndarray, rotary: Rotary, scale: float
) -> tuple[Any, Any]:
    """Column sums, float64[S], and diagonal sums of one head, from queries not rotated, and the rotated keys."""
    j_S = np.arange(len(k_SH))
    s_RS = np.full((len(q_RH), len(k_SH)), -np.inf)
    ranges = rotary.stage_ranges(jnp.int32(i_R[0]), jnp.int32(len(k_SH)))
    for stage, bounds in ranges.items():
        lo, hi = (int(x) for x in bounds)
        q = _rotated(q_RH, i_R, rotary, stage)
        s_RS[:, lo:hi] = q @ k_SH[lo:hi].T.astype(np.float64) * scale
    s_RS[j_S > i_R[:, None]] = -np.inf
    p_RS = np.exp(s_RS - s_RS.max(-1, keepdims=True))
    p_RS /= p_RS.sum(-1, keepdims=True)
    diagonals = np.zeros(len(k_SH))
    for i, p_S in zip(i_R, p_RS, strict=True):
        diagonals[: i + 1] += p_S[i::-1]
    return p_RS.sum(0), diagonals


def _rotated(q_RH: np.ndarray, i_R: np.ndarray, rotary: Rotary, stage: Stage) -> np.ndarray:
    q_1RH = jnp.asarray(q_RH, jnp.float32)[:, None]
    return np.asarray(rotary.rotate_queries(q_1RH, jnp.asarray(i_R, jnp.int32), stage, critical=True))[:, 0]


def measure(name: str, shape: Shape, backend: str | None, rounds: int) -> list[dict[str, Any]]:
    """One row a part, and their sum."""
    rotary, scale = tools.rotary(HEAD_DIM, tools.QWEN_1M), HEAD_DIM**-0.5
    q = tools.random(1, (1, shape.queries, HEADS, HEAD_DIM))
    k = tools.random(2, (1, 1, KV_HEADS, shape.keys, HEAD_DIM))
    start, length = jnp.int32(shape.keys - shape.queries), jnp.array([shape.keys], jnp.int32)
    budgets = [jnp.full(HEADS, count, jnp.int32) for count in (shape.vertical, shape.slash)]

    @jax.jit
    def scores(q: jax.Array, k: jax.Array, start: jax.Array, length: jax.Array) -> Any:
        return line_scores(
            q,
            k,
            layer=0,
            q_start=start,
            kv_len_B=length,
            rotary=rotary,
            scale_B=jnp.full(1, scale),
            backend=backend,
        )

    @jax.jit
    def tiles(
        k: jax.Array, columns: jax.Array, diagonals: jax.Array, start: jax.Array, length: jax.Array
    ) -> Any:
        return lists(
            k, k, columns_BNS=columns, bands_BNM=bands_of(diagonals), most_columns=shape.vertical, layer=jnp.int32(0),
            q_start=start, kv_len_B=length, rotary=rotary, queries=shape.queries,
        )  # fmt: skip

    select = jax.jit(select_lines)
    columns, diagonals = scores(q, k, start, length)
    error = worst_error(q, k, columns, diagonals, rotary, scale)
    lines = select(columns, diagonals, *budgets)
    runs: dict[str, Any] = {
        "scores": (lambda: scores(q, k, start, length), jax.block_until_ready),
        "selection": (lambda: select(columns, diagonals, *budgets), jax.block_until_ready),
        "lists, keys and values of columns": (lambda: tiles(k, *lines, start, length), jax.block_until_ready),
    }
    times = tools.interleaved_medians(runs, rounds)
    times["all"] = sum(times.values())
    common = {"shape": name, "heads": f"{HEADS}/{KV_HEADS}", "vertical": shape.vertical, "slash": shape.slash}
    return [
        {**common, "part": part, "ms": seconds * 1e3, "error of scores": error}
        for part, seconds in times.items()
    ]


def worst_error(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    columns_BNS: jax.Array,
    diagonals_BNS: jax.Array,
    rotary: Rotary,
    scale: float,
) -> float:
    """The largest relative error, in norm, of the scores of the first and the last head."""
    S = k_LBKSH.shape[3]
    i_R = np.arange(S - LAST_QUERIES, S)
    errors = []
    for n in (0, HEADS - 1):
        k_SH = np.asarray(k_LBKSH[0, 0, n // (HEADS // KV_HEADS)].astype(jnp.float32))
        want = exact(np.asarray(q_BTNH[0, -LAST_QUERIES:, n].astype(jnp.float32)), i_R, k_SH, rotary, scale)
        for got, right, forced in zip(
            (columns_BNS, diagonals_BNS), want, (FORCED_COLUMNS, FORCED_DIAGONALS), strict=True
        ):
            errors.append(tools.relative_error(got[0, n, forced:], jnp.asarray(right[forced:])))
    if max(errors) > TOLERANCE:
        raise SystemExit(f"the scores are wrong: relative errors {errors}")
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"shapes, comma separated, of {', '.join(SHAPES)}")
    parser.add_argument("--backend", help="of the scores; default: the first that serves them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/line-scores.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.only.split(",") if arguments.only else SHAPES:
        new = measure(name, SHAPES[name], arguments.backend, arguments.rounds)
        for row in new:
            print(
                f"{row['shape']:12} {row['part']:34} {row['ms']:8.3f} ms  error {row['error of scores']:.1e}",
                flush=True,
            )
        rows += new
        results.write(arguments.out, {"rows": rows})


if __name__ == "__main__":
    main()
