"""Sparse against dense prefill attention, both in XLA: `python scripts/bench_sparse_cpu.py` (measured on a CPU).

Two query heads over one KV head, 32k tokens in one piece. Keys are smooth along the text and each query repeats keys at
eight distances and the first four keys, as trained heads look at sinks and at bands. Lines are selected live from scores,
and every budget is scaled by one factor until density (computed pairs over causal pairs, whole prompt) is at the target. The
sparse time holds scores, selection and attention; times are medians of contenders that take turns, for others may use the
machine. A sample of rows is checked against a float64 softmax over the keys computed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import results

from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import bands_of
from qwen_jax.kernels.sparse_attention.computed import computed_keys, computed_pairs
from qwen_jax.rope import Rotary
from qwen_jax.sparsity.selection import select_lines

N, K, H = 2, 1, 128
DISTANCES = (0.03, 0.09, 0.18, 0.28, 0.4, 0.52, 0.66, 0.8)  # of the prompt
VERTICAL, SLASH = 500, 600  # lines a head, before scaling
SCALE = H**-0.5


def structured(rotary: Rotary, S: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unrotated queries [S, N, H], rotated keys [S, H] and values [S, H], float32."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((S + 8, H))
    k = sum(noise[n : n + S] for n in range(8)) / 8**0.5
    cos, sin = (np.asarray(x, np.float64) for x in rotary.cos_sin(jnp.arange(S, dtype=jnp.int32)))

    def turn(x: np.ndarray, sign: int) -> np.ndarray:
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - sign * b * sin, b * cos + sign * a * sin], -1)

    keys = turn(k, 1)
    q = np.zeros((S, N, H))
    for n in range(N):
        rotated = 0.3 * rng.standard_normal((S, H)) + 0.4 * keys[:4].sum(0)
        for share in DISTANCES:
            distance = int(share * S * rng.uniform(0.9, 1.1))
            rotated[distance:] += rng.uniform(0.5, 0.8) * keys[: S - distance]
        q[:, n] = turn(rotated, -1)
    return q.astype(np.float32), keys.astype(np.float32), rng.standard_normal((S, H)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--piece", type=int, default=32_768)
    parser.add_argument("--density", type=float, default=0.10)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    S, T = args.tokens, args.piece
    starts = range(0, S, T)
    rotary = Rotary(1e6, H, S)
    q_SNH, k_SH, v_SH = structured(rotary, S, 0)
    q, k, v = (
        jnp.asarray(q_SNH)[None],
        jnp.asarray(k_SH)[None, None, None],
        jnp.asarray(v_SH)[None, None, None],
    )
    common = {"layer": 0, "rotary": rotary, "scale_B": jnp.full(1, SCALE), "kv_len_B": jnp.array([S])}

    @jax.jit
    def select(
        columns: jax.Array, diagonals: jax.Array, vertical_N: jax.Array, slash_N: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        lines = select_lines(columns, diagonals, vertical_N, slash_N)
        return lines.columns, bands_of(lines.diagonals)

    @jax.jit
    def scores(q: jax.Array, start: jax.Array) -> Any:
        return line_scores(q, k, q_start=start, **common)

    @functools.partial(jax.jit, static_argnames="most")
    def sparse(q: jax.Array, start: jax.Array, vertical_N: jax.Array, slash_N: jax.Array, most: int) -> Any:
        columns, bands = select(*line_scores(q, k, q_start=start, **common), vertical_N, slash_N)
        return attend_lines(
            q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=most, q_start=start, **common
        )

    @jax.jit
    def dense(q: jax.Array, start: jax.Array) -> Any:
        return attend(q, k, v, q_start=start, backend="xla", **common)

    scored = [scores(q[:, start : start + T], start) for start in starts]

    def budgets(factor: float) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.full(N, round(factor * size), np.int32) for size in (VERTICAL, SLASH))  # type: ignore[return-value]

    def chosen(factor: float) -> tuple[list[Any], np.ndarray]:
        """Every piece's lines and its computed pairs."""
        lines = [jax.tree.map(np.asarray, select(*s, *budgets(factor))) for s in scored]
        pairs = [
            sum(
                computed_pairs(columns[0, n], bands[0, n], q_start=start, queries=T, kv_len=S)
                for n in range(N)
            )
            for start, (columns, bands) in zip(starts, lines, strict=True)
        ]
        return lines, np.array(pairs, np.float64)

    causal = np.array([N * (T * start + T * (T + 1) / 2) for start in starts])
    low, high = 0.0, 8.0
    for _ in range(12):
        factor = (low + high) / 2
        lines, pairs = chosen(factor)
        low, high = (factor, high) if pairs.sum() < args.density * causal.sum() else (low, factor)
    density = pairs.sum() / causal.sum()
    if abs(density - args.density) > 0.05 * args.density:
        raise SystemExit(
            f"density {density:.4f} is not the {args.density} asked for: the forced lines alone cost more"
        )
    bands = [int((np.diff(np.flatnonzero(lines[-1][1][0, n])) > 1).sum()) + 1 for n in range(N)]

    vertical_N, slash_N = (jnp.asarray(x) for x in budgets(factor))
    most = int(vertical_N.max())
    pieces = [(q[:, start : start + T], jnp.int32(start)) for start in starts]
    runs: dict[str, Callable[[], Any]] = {
        "sparse": lambda: [sparse(*p, vertical_N, slash_N, most) for p in pieces],
        "scores": lambda: [scores(*p) for p in pieces],
        "dense": lambda: [dense(*p) for p in pieces],
    }
    got = runs["sparse"]()
    seconds = tools.interleaved_medians(
        {name: (run, jax.block_until_ready) for name, run in runs.items()}, args.times
    )
    sparse_s, scores_s, dense_s = (seconds[name] for name in ("sparse", "scores", "dense"))
    result = {
        "what": "one layer's prefill attention in XLA, float32, sparse against dense",
        "tokens": S, "piece": T, "query_heads": N, "kv_heads": K, "head_dim": H,
        "columns_a_head": int(vertical_N[0]), "diagonals_a_head": int(slash_N[0]), "bands_a_head_last_piece": bands,
        "density": round(float(density), 4), "density_by_piece": [round(float(x), 4) for x in pairs / causal],
        "dense_s": round(dense_s, 3), "sparse_s": round(sparse_s, 3), "line_scores_s": round(scores_s, 3),
        "speed_up": round(dense_s / sparse_s, 2),
        "dense_gflop_s": round(4 * H * causal.sum() / dense_s / 1e9, 1),
        "sparse_gflop_s": round(4 * H * pairs.sum() / sparse_s / 1e9, 1),
        "largest_error": worst(got, lines, q_SNH, k_SH, v_SH, rotary, T),
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:26} {value}")
    if args.out:
        results.write(args.out, result)


def worst(
    got: list[Any],
    lines: list[Any],
    q_SNH: np.ndarray,
    k_SH: np.ndarray,
    v_SH: np.ndarray,
    rotary: Rotary,
    T: int,
) -> float:
    """Largest error of 16 rows a piece and head against float64 attention over exactly the keys computed."""
    largest, S = 0.0, len(k_SH)
    q = np.asarray(rotary.rotate(jnp.asarray(q_SNH), jnp.arange(S, dtype=jnp.int32)), np.float64)
    for number, (out, _) in enumerate(got):
        columns, bands = lines[number]
        for n in range(N):
            i_T = np.unique(np.linspace(0, T - 1, 16).astype(int)) + number * T
            for i, keys_S in zip(i_T, computed_keys(columns[0, n], bands[0, n], i_T), strict=True):
                j = np.flatnonzero(keys_S)
                p = k_SH[j].astype(np.float64) @ q[i, n] * SCALE
                p = np.exp(p - p.max())
                want = p / p.sum() @ v_SH[j].astype(np.float64)
                error = np.abs(np.asarray(out[0, i - number * T, n], np.float64) - want).max()
                largest = max(largest, float(error))
    return largest


if __name__ == "__main__":
    main()
