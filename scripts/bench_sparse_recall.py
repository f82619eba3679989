"""Recall against density of both rules of sparse prefill: benchmarks/sparse-recall.json and docs/sparse-recall.png.

    python scripts/bench_sparse_recall.py

At every density the published rule gets the largest budgets, columns to diagonals as 1 to 1.5, that it computes no more with,
head by head; `--sparsity bands` then gets the same budgets, and computes no more pairs with them. Recall is the attention on
the computed keys, averaged over the queries of a piece. Heads: all of the shipped checkpoint on a pass key text, in two
pieces, and synthetic ones whose structure is known: local, sinks, scattered slashes, and all of them together with columns.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import nnx

from qwen_jax.build import load
from qwen_jax.cache import KVCache, init_cache, write_chunk
from qwen_jax.evals import demo, demo_folder
from qwen_jax.evals.passkey import make_task
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.line_scores.api import FORCED_COLUMNS, FORCED_DIAGONALS, line_scores
from qwen_jax.kernels.sparse_attention.bands import BAND, bands_of
from qwen_jax.kernels.sparse_attention.computed import computed_pairs
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import LineBudgets

DENSITIES = (0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 0.9)
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)  # of the plot
SLASHES_A_COLUMN = 1.5
LAST_QUERIES = 64


class Head(NamedTuple):
    """One head in one piece: its attention float32[T, S] from position `start` on, and the scores of the last queries, [S]."""

    kind: str
    start: int
    a_TS: np.ndarray
    columns_S: np.ndarray
    diagonals_S: np.ndarray


def softmax(scores_TS: np.ndarray, start: int) -> np.ndarray:
    i_T = start + np.arange(len(scores_TS))
    scores_TS = np.where(np.arange(scores_TS.shape[1]) <= i_T[:, None], scores_TS, -np.inf)
    p_TS = np.exp(scores_TS - scores_TS.max(1, keepdims=True))
    return p_TS / p_TS.sum(1, keepdims=True)


def shipped(length: int, starts: list[int]) -> Iterator[Head]:
    """Every head of the shipped checkpoint on one text, with dual chunk attention."""
    model = load(demo_folder.DEFAULT, dtype=jnp.float32)
    graph, params = nnx.split(model)
    config, rotary, T = model.config, model.rotary, demo.PREFILL_CHUNK
    ids = make_task(np.random.default_rng(5), length, 0.3).ids
    S = -(-length // T) * T
    ids = np.pad(ids, (0, S - length))
    cache = init_cache(config, 1, S, jnp.float32)
    lengths = jnp.array([length], jnp.int32)

    @functools.partial(jax.jit, donate_argnames="cache")
    def run(
        params: nnx.State, tokens_1T: jax.Array, cache: KVCache, start: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, KVCache]:
        model = nnx.merge(graph, params)
        scale = model.score_scale(lengths, lengths)

        def layer_of(q: jax.Array, k: jax.Array, v: jax.Array, carry: tuple, layer: jax.Array) -> tuple:
            cache, kept = carry
            cache = write_chunk(cache, k, v, layer=layer, start=start)
            call = {"layer": layer, "q_start": start, "kv_len_B": lengths, "rotary": rotary, "scale_B": scale}
            scores = line_scores(q, cache.k, last_queries=LAST_QUERIES, **call)
            kept = tuple(x.at[layer].set(y[0]) for x, y in zip(kept, (q, *scores), strict=True))
            return attend(q, cache.k, cache.v, **call)[0], (cache, kept)

        L, N, H = config.num_layers, config.num_heads, config.head_dim
        empty = (jnp.zeros((L, T, N, H)), jnp.zeros((L, N, S)), jnp.zeros((L, N, S)))
        positions = (start + jnp.arange(T, dtype=jnp.int32))[None]
        _, (cache, kept) = model.run_layers(model.embed(tokens_1T), positions, (cache, empty), layer_of)
        return *kept, scale, cache

    for start in range(0, max(starts) + 1, T):
        q, columns, diagonals, scale, cache = run(
            params, jnp.asarray(ids[None, start : start + T]), cache, jnp.int32(start)
        )
        if start not in starts:
            continue
        end = start + T
        i_T = jnp.arange(start, end, dtype=jnp.int32)
        ranges = rotary.stage_ranges(jnp.int32(start), jnp.int32(end))
        for layer, n in np.ndindex(config.num_layers, config.num_heads):
            k_SH = np.asarray(cache.k[layer, 0, n // config.group_size])
            scores_TS = np.full((T, S), -np.inf, np.float32)
            for stage, (lo, hi) in ranges.items():
                rotated = np.asarray(rotary.rotate_queries(q[layer, :, n : n + 1], i_T, stage))[:, 0]
                scores_TS[:, int(lo) : int(hi)] = rotated @ k_SH[int(lo) : int(hi)].T * float(scale[0])
            line = (np.asarray(x[layer, n]) for x in (columns, diagonals))
            yield Head("shipped checkpoint", start, softmax(scores_TS, start), *line)


def synthetic(S: int, T: int, heads: int) -> Iterator[Head]:
    """Heads whose queries repeat some keys: their own neighbourhood, the first ones, those at some distances."""
    H, start = 64, S - T
    for kind in ("local", "sink", "scattered", "mixed"):
        for seed in range(heads):
            rng = np.random.default_rng((len(kind), seed))
            noise = rng.standard_normal((S + 8, H)).astype(np.float32)
            k_SH = (
                sum(noise[n : n + S] for n in range(8)) / 8**0.5
            )  # alike along the text, as trained keys are
            q_TH = 0.35 * rng.standard_normal((T, H)).astype(np.float32)
            i_T = start + np.arange(T)
            if kind in ("local", "mixed"):
                for distance in (1, 4, 16, 64, 150):
                    q_TH += (0.6 if kind == "local" else 0.45) * k_SH[i_T - distance]
            if kind in ("sink", "mixed"):
                q_TH += (0.3 if kind == "sink" else 0.25) * k_SH[:4].sum(0)
            if kind in ("scattered", "mixed"):
                for distance in rng.integers(300, start, 16):
                    q_TH += rng.uniform(0.6, 0.8) * k_SH[i_T - distance]
            if kind == "mixed":
                for column in rng.integers(100, start, 12):
                    q_TH += 0.6 * k_SH[column]
            a_TS = softmax(q_TH @ k_SH.T * (1.4 / H**0.5), start)
            columns_S = a_TS[-LAST_QUERIES:].sum(0)
            diagonals_S = np.zeros(S, np.float32)
            for u in range(LAST_QUERIES):
                row = a_TS[T - 1 - u, : S - u]
                diagonals_S[: S - u] += row[::-1]
            columns_S[:FORCED_COLUMNS], diagonals_S[:FORCED_DIAGONALS] = np.inf, np.inf
            yield Head(kind, start, a_TS, columns_S, diagonals_S)


class Meter:
    """Recall and cost of lines of one head, from its attention summed over query tiles."""

    def __init__(self, head: Head):
        self.head = head
        self.T, self.S = head.a_TS.shape
        self.end = head.start + self.T
        assert head.start % BAND == self.T % BAND == self.S % BAND == 0
        self.tiles_CS = head.a_TS.reshape(-1, BAND, self.S).sum(1)
        self.blocks_CM = self.tiles_CS.reshape(len(self.tiles_CS), -1, BAND).sum(-1)
        order = (np.argsort(-x, kind="stable") for x in (head.columns_S, head.diagonals_S))
        self.order_columns, self.order_diagonals = (x[: self.end] for x in order)

    def recall(self, columns_S: np.ndarray, bands_M: np.ndarray) -> float:
        kept = 0.0
        columns_MW = columns_S.reshape(-1, BAND)
        for c in range(len(self.tiles_CS)):
            tile = self.head.start // BAND + c
            in_band_M = np.zeros(len(bands_M), bool)
            in_band_M[: tile + 1] = bands_M[tile::-1]
            in_band_M[tile] = True
            kept += self.blocks_CM[c][in_band_M].sum()
            singly = columns_MW & ~in_band_M[:, None]
            kept += self.tiles_CS[c][singly.reshape(-1)].sum()
        return float(kept / self.T)

    def pairs(self, columns_S: np.ndarray, bands_M: np.ndarray) -> int:
        return computed_pairs(columns_S, bands_M, q_start=self.head.start, queries=self.T, kv_len=self.end)

    def published(self, columns: int, diagonals: int) -> tuple[np.ndarray, np.ndarray]:
        columns_S, diagonals_S = np.zeros((2, self.S), bool)
        columns_S[self.order_columns[: max(columns, FORCED_COLUMNS)]] = True
        diagonals_S[self.order_diagonals[: max(diagonals, FORCED_DIAGONALS)]] = True
        return columns_S, np.array(_bands_of(diagonals_S))

    def at_density(self, density: float) -> tuple[int, int] | None:
        """The largest published budgets within a density, columns and diagonals; None if the forced lines alone cost more."""
        causal = self.T * self.head.start + self.T * (self.T + 1) // 2
        low, high = 0, self.S
        if self.pairs(*self.published(0, 0)) > density * causal:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.pairs(*self.published(middle, round(SLASHES_A_COLUMN * middle))) <= density * causal
            low, high = (middle, high) if fits else (low, middle)
        return low, round(SLASHES_A_COLUMN * low)

    def bands(self, columns: int, diagonals: int) -> tuple[np.ndarray, np.ndarray]:
        """What `--sparsity bands` chooses with these budgets."""
        sizes = (max(columns, FORCED_COLUMNS), max(diagonals, FORCED_DIAGONALS))
        budgets = LineBudgets(*(jnp.full((1, 1), size, jnp.int32) for size in sizes), self.S)
        found = _choose(
            SparsePrefill(budgets, threshold=0, last_queries=LAST_QUERIES, bands=1.0),
            jnp.asarray(self.head.columns_S)[None, None], jnp.asarray(self.head.diagonals_S)[None, None],
            layer=0, q_start=self.head.start, end_B=jnp.array([self.end], jnp.int32),
        )  # fmt: skip
        return np.asarray(found[0][0, 0]), np.asarray(found[1][0, 0])


_bands_of = jax.jit(bands_of)
_choose = jax.jit(SparsePrefill.choose)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16128, help="of the text; 9 pieces of 1,792")
    parser.add_argument("--heads", type=int, default=4, help="synthetic heads of each kind")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/sparse-recall.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/sparse-recall.png"))
    args = parser.parse_args()
    piece = demo.PREFILL_CHUNK
    last = args.tokens // piece - 1
    points: dict[str, list[list[tuple[float, float, float, float]]]] = {}
    heads = (*shipped(args.tokens, [last // 2 * piece, last * piece]), *synthetic(16384, 2048, args.heads))
    for number, head in enumerate(heads):
        meter, found = Meter(head), []
        causal = meter.T * head.start + meter.T * (meter.T + 1) // 2
        for density in DENSITIES:
            budgets = meter.at_density(density)
            if budgets is None:
                break
            lines, chosen = meter.published(*budgets), meter.bands(*budgets)
            pairs = meter.pairs(*lines)
            cost = meter.pairs(*chosen)
            assert cost <= pairs
            found.append((pairs / causal, meter.recall(*lines), cost / causal, meter.recall(*chosen)))
        points.setdefault(head.kind, []).append(found)
        print(
            f"{number:3d} {head.kind:20s}",
            *(f"{d:.3f}: {a:.3f} {b:.3f} " for d, a, _, b in found),
            flush=True,
        )
    curves = {kind: curve(each) for kind, each in points.items()}
    for kind, rows in curves.items():
        for row in rows:
            print(f"{kind:20s}", row)
    results.write(
        args.out,
        {
            "what": "recall of both rules at equal computed density, mean over heads; published budgets 1 : 1.5",
            "command": "python scripts/bench_sparse_recall.py",
            "tokens": args.tokens, "piece": piece, "heads": {kind: len(each) for kind, each in points.items()},
            "curves": curves,
        },
    )  # fmt: skip
    draw(curves, args.plot)


def curve(heads: list[list[tuple[float, float, float, float]]]) -> list[dict[str, float]]:
    """Means over heads at every density that all of them have, and the density at which bands recall what published does."""
    array = np.array([head[: min(map(len, heads))] for head in heads])
    density, published, cost, bands = array.mean(0).T
    gain = array[..., 3] - array[..., 1]
    return [
        {
            "density": round(float(density[n]), 4), "published": round(float(published[n]), 4),
            "bands": round(float(bands[n]), 4), "bands_density": round(float(cost[n]), 4),
            "bands_density_at_published_recall": round(float(np.interp(published[n], bands, cost)), 4),
            "heads_better": int((gain[:, n] > 1e-3).sum()), "heads_worse": int((gain[:, n] < -1e-3).sum()),
            "largest_gain": round(float(gain[:, n].max()), 4), "largest_loss": round(float(-gain[:, n].min()), 4),
        }
        for n in range(len(density))
    ]  # fmt: skip


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (kind, rows) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        density = [row["density"] for row in rows]
        ax.plot(density, [row["published"] for row in rows], "o--", color="tab:gray", label="published")
        cost = [row["bands_density"] for row in rows]
        ax.plot(cost, [row["bands"] for row in rows], "s-", color="tab:blue", label="bands")
        ax.set_title(kind, fontsize=10)
        ax.set_xscale("log")
        ax.set_xticks(TICKS, [f"{d:.0%}" for d in TICKS], fontsize=7)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.set_xlabel("computed density")
    figure.axes[0].set_ylabel("recall")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
