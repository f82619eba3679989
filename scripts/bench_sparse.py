"""Times sparse prefill attention on an NVIDIA GPU against our dense kernel, in one run; writes benchmarks/sparse-*.json.

    python scripts/bench_sparse.py [--only minference-128k,chunk-1m-10] [--out benchmarks/sparse-nvidia-h200.json]
        [--budgets sparse_attention_config.json]

minference-128k has the lines of MInference's benchmark: 1,000 columns and the 6,096 nearest diagonals. The chunks choose
their lines live from line scores, with diagonals scaled until density, computed pairs over causal pairs, is what the name says:
biases of queries and keys make heads that look near by and at three more distances each, which dual chunk attention repeats
in every older chunk. Sampled rows are checked against a float32 softmax over their computed keys before anything is timed.
TFLOP/s count the tiles of 128 x 128 that the kernel walks, whole, over the time of a call, which rotates queries and makes
lists; lists, scores and choice are timed alone as well.

With a budget file of a model of 28 heads there are also 32k chunks at the end of 128k and 2^20 with the budgets of its layer of
median slash: diagonals that are the nearest (local), a tenth of them near and the rest in eight runs (mixed), or at
random (scattered); columns at random.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import results
from jax import lax

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.kernels.sparse_attention import mosaic_gpu
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import BAND, bands_of
from qwen_jax.kernels.sparse_attention.computed import computed_keys, computed_pairs
from qwen_jax.kernels.sparse_attention.hopper import FIELDS
from qwen_jax.rope import Rotary, inverse_frequencies
from qwen_jax.sparsity import cost_aware
from qwen_jax.sparsity.selection import select_lines

N, K, H = 28, 4, 128
TOLERANCE = 1e-2
KI = 1024
COLUMNS = 1000
MINFERENCE_DIAGONALS, MINFERENCE_BLOCK = 6096, 64
DISTANCES = 3  # at which a head looks, beside its own place
LOGIT, NOISE = 8.0, 0.3  # score of a key at such a distance; spread of what is not bias


@dataclasses.dataclass(frozen=True)
class Place:
    """Queries start .. start + queries of one prompt."""

    queries: int
    start: int
    dca: DualChunk | None = None

    @property
    def keys(self) -> int:
        return self.start + self.queries

    @property
    def rotary(self) -> Rotary:
        return tools.rotary(H, self.dca)

    @property
    def causal(self) -> int:
        """Pairs of one head in dense attention."""
        return self.queries * self.start + self.queries * (self.queries + 1) // 2

    def pairs(self, columns_NS: np.ndarray, bands_NM: np.ndarray) -> int:
        """Computed pairs of all heads."""
        piece = {"q_start": self.start, "queries": self.queries, "kv_len": self.keys}
        return sum(computed_pairs(*lines, **piece) for lines in zip(columns_NS, bands_NM, strict=True))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A place and its lines: chosen from scores to reach a density, or made beforehand."""

    place: Place
    density: float | None = None
    make: Callable[[], tuple[np.ndarray, np.ndarray]] | None = (
        None  # () -> columns [N, S] and diagonals [N, S], bool
    )


@functools.partial(jax.jit, static_argnames="place")
def inputs(place: Place) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [1, T, N, H], not rotated, and keys, rotated, and values [1, 1, K, S, H], bfloat16, of heads with biases.

    In the pairs f that turn once in 1/128 to 2 chunks a key is 1, a query a sum of exp(-i d theta_f) over its distances
    d: their score is highest d apart.
    """
    rotary = place.rotary
    rng = np.random.default_rng(0)
    reach = place.dca.chunk_len if place.dca else place.keys
    speed_F, _ = inverse_frequencies(rotary.theta, H)
    some_F = (speed_F * reach > np.pi) & (speed_F * reach < 256 * np.pi)
    at_ND = np.append(np.zeros((N, 1)), rng.uniform(0.3, 1.0, (N, DISTANCES)) * reach, axis=1)
    size = (LOGIT * H**0.5 / some_F.sum()) ** 0.5
    turn_NDF = np.exp(-1j * at_ND[..., None] * speed_F[some_F])
    overlap_NDE = np.einsum("NDF,NEF->NDE", turn_NDF, turn_NDF.conj()).real / some_F.sum()
    weight_ND = np.linalg.solve(overlap_NDE, np.ones((*at_ND.shape, 1)))[
        ..., 0
    ]  # equal scores at all distances
    q_NF = np.zeros((N, H // 2), complex)
    q_NF[:, some_F] = size * np.einsum("ND,NDF->NF", weight_ND, turn_NDF)
    key_H = size * np.append(some_F, np.zeros(H // 2))
    query_NH = np.concatenate([q_NF.real, q_NF.imag], -1)
    seeds = jax.random.split(jax.random.key(0), 3)
    q = jnp.asarray(query_NH, jnp.float32) + NOISE * jax.random.normal(seeds[0], (1, place.queries, N, H))
    k = jnp.asarray(key_H, jnp.float32) + NOISE * jax.random.normal(seeds[1], (1, place.keys, K, H))
    k = rotary.rotate_keys(k, jnp.arange(place.keys, dtype=jnp.int32))
    v = jax.random.normal(seeds[2], (1, 1, K, place.keys, H))
    return (*(x.astype(jnp.bfloat16) for x in (q, jnp.swapaxes(k, 1, 2)[None], v)),)


def at_random(counts: Any, S: int, first: int) -> np.ndarray:
    """bool[N, S]: the first ones and others at random, counts[n] in all."""
    rng = np.random.default_rng(0)
    marks = np.zeros((N, S), bool)
    marks[:, :first] = True
    for n, count in enumerate(counts):
        marks[n, first + rng.choice(S - first, max(min(count, S) - first, 0), replace=False)] = True
    return marks


def nearest(counts: Any, S: int) -> np.ndarray:
    """bool[N, S]: the first counts[n]."""
    return np.arange(S) < np.asarray(counts)[:, None]


def mixed(counts: Any, S: int, runs: int = 8) -> np.ndarray:
    """bool[N, S]: a tenth of counts[n] first, the rest in runs at random places."""
    rng = np.random.default_rng(0)
    marks = nearest(np.asarray(counts) // 10, S)
    for n, count in enumerate(counts):
        for start in rng.integers(0, S, runs):
            marks[n, start : start + (count - count // 10) // runs] = True
    return marks


MINFERENCE = Shape(
    Place(128 * KI, 0),
    make=lambda: (at_random([COLUMNS] * N, 128 * KI, 30), nearest([MINFERENCE_DIAGONALS] * N, 128 * KI)),
)
LONG = Place(32 * KI, 992 * KI, tools.QWEN_1M)
SHAPES = {"minference-128k": MINFERENCE, "chunk-1m-10": Shape(LONG, 0.10), "chunk-1m-5": Shape(LONG, 0.05)}


def budget_shapes(path: Path) -> dict[str, Shape]:
    """The shapes of a budget file."""
    layers = [[head[1:3] for head in layer.values()] for layer in json.loads(path.read_text())]
    middle = sorted(layers, key=lambda heads: sum(slash for _, slash in heads))[len(layers) // 2]
    columns = [
        130 if vertical == 30 else vertical for vertical, _ in middle
    ]  # as the released engine reads it
    slashes = [slash for _, slash in middle]

    def shape(place: Place, diagonals: Callable[..., np.ndarray]) -> Shape:
        S = place.keys
        return Shape(place, make=lambda: (at_random(columns, S, 30), diagonals(slashes, S)))

    spread = {"local": nearest, "mixed": mixed, "scattered": lambda counts, S: at_random(counts, S, 100)}
    places = {"128k": Place(32 * KI, 96 * KI, tools.QWEN_1M), "1m": LONG}
    return {
        f"budgets-{where}-{how}": shape(place, diagonals)
        for where, place in places.items()
        for how, diagonals in spread.items()
    }


def minference_pairs(columns_S: np.ndarray, queries: int) -> int:
    """Pairs that MInference computes for its local lines: per 64 rows, keys back to the first one's farthest diagonal."""
    first = np.arange(queries) // MINFERENCE_BLOCK * MINFERENCE_BLOCK
    lowest = np.maximum(first - (MINFERENCE_DIAGONALS - 1), 0)
    before = np.append(0, np.cumsum(columns_S))
    return int((np.arange(queries) - lowest + 1 + before[lowest]).sum())


@jax.jit
def choose(columns: jax.Array, diagonals: jax.Array, slash_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns and bands of scores."""
    lines = select_lines(columns, diagonals, jnp.full(N, COLUMNS), slash_N)
    return lines.columns, bands_of(lines.diagonals)


@functools.partial(jax.jit, static_argnames="place")
def budgets(place: Place, density: jax.Array, columns: jax.Array, diagonals: jax.Array) -> jax.Array:
    """int32[N]: diagonals a head, unlike between heads, that give the density."""
    share_N = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, N) * place.keys, jnp.float32)
    piece = cost_aware.Piece(jnp.int32(place.start), jnp.full(1, place.keys, jnp.int32))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        lines = choose(columns, diagonals, (middle * share_N).astype(jnp.int32))
        enough = cost_aware.computed_pairs(*lines, piece).sum() >= density * float(N * place.causal)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    high = lax.fori_loop(0, 12, halve, (jnp.float32(0), jnp.float32(1)))[1]
    return (high * share_N).astype(jnp.int32)


@functools.cache
def programs(place: Place, most_columns: int) -> dict[str, Callable[..., Any]]:
    """What is timed, jitted once for all shapes that share it."""
    rotary = place.rotary
    sparse = functools.partial(attend_lines, rotary=rotary, most_columns=most_columns, backend="mosaic_gpu")
    lists = functools.partial(
        mosaic_gpu.lists, rotary=rotary, most_columns=most_columns, queries=place.queries
    )
    dense = functools.partial(attend, rotary=rotary, backend="mosaic_gpu")
    scores = functools.partial(line_scores, rotary=rotary)
    return {
        "sparse": jax.jit(sparse), "lists": jax.jit(lists), "dense": jax.jit(dense), "scores": jax.jit(scores)
    }  # fmt: skip


def measure(name: str, shape: Shape, rounds: int) -> dict[str, Any]:
    """One shape: checked, then timed."""
    place = shape.place
    q, k, v = inputs(place)
    common = {
        "layer": jnp.int32(0), "q_start": jnp.int32(place.start), "kv_len_B": jnp.full(1, place.keys, jnp.int32),
        "scale_B": jnp.full(1, H**-0.5, jnp.float32),
    }  # fmt: skip
    runs: dict[str, Callable[[], Any]] = {}
    if shape.make:
        made, diagonals = shape.make()
        columns, bands = made[None], np.asarray(bands_of(jnp.asarray(diagonals[None])))
    else:
        scores = functools.partial(programs(place, COLUMNS)["scores"], q, k, **common)
        found = scores()
        slash_N = budgets(place, jnp.float32(shape.density or 0.0), *found)
        runs = {"scores": scores, "choice": lambda: choose(*found, slash_N)}
        columns, bands = (np.asarray(x) for x in runs["choice"]())
    most = int(columns.sum(-1).max())
    marks = {"columns_BNS": jnp.asarray(columns), "bands_BNM": jnp.asarray(bands)}
    to_list = {key: x for key, x in common.items() if key != "scale_B"} | marks
    program = programs(place, most)
    runs |= {
        "sparse": lambda: program["sparse"](q, k, v, **common, **marks),
        "lists": lambda: program["lists"](k, v, **to_list),
        "dense": lambda: program["dense"](q, k, v, **common),
    }

    out, lse = runs["sparse"]()
    rows = np.unique(np.linspace(0, place.queries - 1, 4).astype(int))
    keep = np.stack([computed_keys(columns[0, n], bands[0, n], place.start + rows) for n in range(N)], axis=1)
    want, want_lse = tools.exact(
        q[0, rows], place.start + rows, k[0, 0], v[0, 0], kv_len=place.keys, rotary=place.rotary, scale=H**-0.5,
        keep_RNS=keep,
    )  # fmt: skip
    pairs = place.pairs(columns[0], bands[0])
    by_head = [int((np.diff(np.flatnonzero(bands[0, n])) > 1).sum()) + 1 for n in range(N)]
    row: dict[str, Any] = {
        "shape": name, "density": pairs / (N * place.causal), "most columns": most,
        "fewest separate bands": min(by_head), "most separate bands": max(by_head),
        "error": tools.worst_row_error(out[0, rows], want),
        "lse error": float(np.abs(np.asarray(lse[0, rows]) - np.asarray(want_lse)).max()),
    }  # fmt: skip
    if row["error"] > TOLERANCE:
        return row | {"reason": "wrong"}
    walked = np.asarray(runs["lists"]()[0].items, np.int64).reshape(-1, FIELDS)[:, -1].sum()
    seconds = tools.interleaved_medians(
        {contender: (run, jax.block_until_ready) for contender, run in runs.items()}, rounds
    )
    row |= {f"{contender} ms": s * 1e3 for contender, s in seconds.items()}
    chosen = seconds.get("scores", 0.0) + seconds.get("choice", 0.0)
    row |= {
        "TFLOP/s": 4 * H * BAND**2 * int(walked) / seconds["sparse"] / 1e12,
        "dense TFLOP/s": 4 * H * N * place.causal / seconds["dense"] / 1e12,
        "speed-up": seconds["dense"] / (seconds["sparse"] + chosen),
    }
    if shape.density:
        attention = seconds["sparse"] - seconds["lists"]
        row["scores, choice and lists over attention"] = (chosen + seconds["lists"]) / attention
    if shape is MINFERENCE:
        theirs = sum(minference_pairs(columns[0, n], place.queries) for n in range(N))
        row["pairs over MInference's"] = pairs / theirs
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="shapes, comma separated; default: all")
    parser.add_argument("--budgets", type=Path, help="a budget file of a model of 28 heads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shapes = SHAPES | (budget_shapes(arguments.budgets) if arguments.budgets else {})
    rows = []
    for name in arguments.only.split(",") if arguments.only else shapes:
        rows.append(measure(name, shapes[name], arguments.rounds))
        for key, value in rows[-1].items():
            print(f"{key:40} {value:.4g}" if isinstance(value, float) else f"{key:40} {value}", flush=True)
        if arguments.out:
            results.write(arguments.out, {"heads": f"{N}/{K}", "head_dim": H, "rows": rows})


if __name__ == "__main__":
    main()
