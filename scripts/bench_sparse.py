"""Times sparse prefill attention on an NVIDIA GPU against our dense kernel, in one run; writes benchmarks/sparse-*.json.

    python scripts/bench_sparse.py [--budgets sparse_attention_config.json] [--only minference-128k,chunk-1m-10]

minference-128k has the lines of MInference's benchmark: 1,000 columns and the 6,096 nearest diagonals. The chunks choose
their lines live from line scores, with diagonals scaled until density, computed pairs over causal pairs, is what the name
says: biases of queries and keys make heads that look near by and at three more distances each, which dual chunk attention
repeats in every older chunk. "density of each chunk" is what the same budgets choose for the same queries in every chunk of
that prompt. Sampled rows are checked against a float32 softmax over their computed keys before anything is timed. TFLOP/s
count the tiles of 128 x 128 that the kernel walks, whole, over the time of a call, which rotates queries and makes lists;
lists, scores and choice (by the published rule, and by bands for as many pairs) are timed alone as well.

With a budget file of a model of 28 heads there are also 32k chunks at the end of 128k and 2^20 with the budgets of its layer
of median slash: diagonals that are the nearest (local), a tenth of them near and the rest in eight runs (mixed), or at random
(scattered); columns at random. "pairs over MInference's" compares with the pairs that MInference's index makes its kernel
compute for the same lines (`docs/algorithms.md` 4.5), the chunk taken as one stage.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
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
from qwen_jax.kernels.line_scores.api import LAST_QUERIES, line_scores
from qwen_jax.kernels.sparse_attention import mosaic_gpu
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import BAND, bands_of, tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys, computed_pairs
from qwen_jax.kernels.sparse_attention.hopper import FIELDS, OWN_KEYS
from qwen_jax.rope import Rotary, inverse_frequencies
from qwen_jax.sparsity import cost_aware
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import LineBudgets

N, K, H = 28, 4, 128
TOLERANCE = 1e-2
KI = 1024
COLUMNS = 1000
MINFERENCE_DIAGONALS, MINFERENCE_BLOCK = 6096, 64
DISTANCES = 3  # at which a head looks, beside its own place
CHOICES = {"choice": None, "choice by bands": 1.0}
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
    """A place and its lines.

    Attributes:
        place: of the queries.
        most_columns: no head has more.
        density: what lines chosen from scores are to reach.
        make: instead, () -> columns [N, S] and diagonals [N, S], bool.
    """

    place: Place
    most_columns: int = COLUMNS
    density: float = 0.0
    make: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None


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
SHAPES = {
    "minference-128k": MINFERENCE,
    "chunk-1m-10": Shape(LONG, density=0.10),
    "chunk-1m-5": Shape(LONG, density=0.05),
}


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
        return Shape(place, max(columns), make=lambda: (at_random(columns, S, 30), diagonals(slashes, S)))

    spread = {"local": nearest, "mixed": mixed, "scattered": lambda counts, S: at_random(counts, S, 100)}
    places = {"128k": Place(32 * KI, 96 * KI, tools.QWEN_1M), "1m": LONG}
    return {
        f"budgets-{where}-{how}": shape(place, diagonals)
        for where, place in places.items()
        for how, diagonals in spread.items()
    }


def minference_pairs(columns_S: np.ndarray, diagonals_S: np.ndarray, start: int, queries: int) -> int:
    """Pairs that MInference computes of one head: per 64 rows, 64 keys a diagonal, merged, and columns outside of these."""
    block = MINFERENCE_BLOCK
    ends: list[list[int]] = []  # of merged ranges, relative to the first row
    for end in block - np.flatnonzero(diagonals_S)[::-1]:
        if not ends or end > ends[-1][1] + block:
            ends.append([int(end) - block, int(end)])
        elif end > ends[-1][1]:
            ends[-1][1] += block
    S = len(columns_S)
    inside = np.zeros(S + block, bool)  # by key, S past the first row
    for first, last in ends:
        inside[max(S + first, 0) : S + last] = True
    before = np.append(0, np.cumsum(inside))
    columns, pairs = np.flatnonzero(columns_S), 0
    for row in range(start, start + queries, block):
        earlier = columns[columns < row]
        keys = int(before[S] - before[S - row]) + int((~inside[S + earlier - row]).sum())
        pairs += block * keys + block * (block + 1) // 2
    return pairs


@jax.jit
def choose(
    sparse: SparsePrefill, columns: jax.Array, diagonals: jax.Array, start: jax.Array, end_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Columns and bands of scores."""
    return sparse.choose(columns, diagonals, layer=0, q_start=start, end_B=end_B)


@jax.jit
def pairs_of(columns: jax.Array, bands: jax.Array, start: jax.Array, end_B: jax.Array) -> jax.Array:
    """Computed pairs of all heads, float32."""
    return cost_aware.computed_pairs(columns, bands, cost_aware.Piece(start, end_B)).sum()


def rule(slash_N: jax.Array, bands: float | None = None) -> SparsePrefill:
    """A rule that keeps COLUMNS columns and so many diagonals a head."""
    budgets = LineBudgets(jnp.full((1, N), COLUMNS, jnp.int32), slash_N[None], COLUMNS)
    return SparsePrefill(budgets, threshold=0, last_queries=LAST_QUERIES, bands=bands)


@functools.partial(jax.jit, static_argnames="place")
def budgets(place: Place, density: jax.Array, columns: jax.Array, diagonals: jax.Array) -> jax.Array:
    """int32[N]: diagonals a head, unlike between heads, that give the density."""
    share_N = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, N) * place.keys, jnp.float32)
    where = jnp.int32(place.start), jnp.full(1, place.keys, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        lines = choose(rule((middle * share_N).astype(jnp.int32)), columns, diagonals, *where)
        enough = pairs_of(*lines, *where) >= density * float(N * place.causal)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    high = lax.fori_loop(0, 12, halve, (jnp.float32(0), jnp.float32(1)))[1]
    return (high * share_N).astype(jnp.int32)


class Programs:
    """The compiled programs of all shapes: each is compiled once, as many side by side as there are cores."""

    def __init__(self, shapes: Iterable[Shape]):
        self._pool = concurrent.futures.ThreadPoolExecutor()
        self._futures: dict[Any, concurrent.futures.Future[Any]] = {}
        for shape in shapes:
            place, rotary = shape.place, shape.place.rotary
            q, k, v = jax.eval_shape(functools.partial(inputs, place))
            integer, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
            scale = jax.ShapeDtypeStruct((1,), jnp.float32)
            common = {"layer": integer, "q_start": integer, "kv_len_B": row}
            marks = {
                "columns_BNS": jax.ShapeDtypeStruct((1, N, place.keys), bool),
                "bands_BNM": jax.ShapeDtypeStruct((1, N, tile_distances(place.keys)), bool),
            }
            most = {"most_columns": shape.most_columns}
            self._add("inputs", shape, inputs, place)
            sparse = functools.partial(attend_lines, rotary=rotary, backend="mosaic_gpu", **most)
            self._add("sparse", shape, jax.jit(sparse), q, k, v, scale_B=scale, **common, **marks)
            lists = functools.partial(mosaic_gpu.lists, rotary=rotary, queries=place.queries, **most)
            self._add("lists", shape, jax.jit(lists), k, v, **common, **marks)
            dense = functools.partial(attend, rotary=rotary, backend="mosaic_gpu")
            self._add("dense", shape, jax.jit(dense), q, k, v, scale_B=scale, **common)
            if shape.density:
                scores = functools.partial(line_scores, rotary=rotary)
                self._add("scores", shape, jax.jit(scores), q, k, scale_B=scale, **common)
                found = (jax.ShapeDtypeStruct((1, N, place.keys), jnp.float32),) * 2
                slash_N = jax.ShapeDtypeStruct((N,), jnp.int32)
                self._add("budgets", shape, budgets, place, scale.update(shape=()), *found)
                for name, bands in CHOICES.items():
                    rules = jax.eval_shape(functools.partial(rule, bands=bands), slash_N)
                    self._add(name, shape, choose, rules, *found, integer, row)

    def _add(self, name: str, shape: Shape, program: Any, *args: Any, **kwargs: Any) -> None:
        key = self._key(name, shape)
        if key not in self._futures:
            self._futures[key] = self._pool.submit(lambda: program.lower(*args, **kwargs).compile())

    def _key(self, name: str, shape: Shape) -> Any:
        return name, shape.place, shape.most_columns if name in ("sparse", "lists") else 0

    def __call__(self, name: str, shape: Shape) -> Callable[..., Any]:
        """The program of that name and shape, compiled."""
        return self._futures[self._key(name, shape)].result()


def measure(name: str, shape: Shape, programs: Programs, rounds: int) -> dict[str, Any]:
    """One shape: checked, then timed."""
    place = shape.place
    q, k, v = programs("inputs", shape)()
    common = {
        "layer": jnp.int32(0), "q_start": jnp.int32(place.start), "kv_len_B": jnp.full(1, place.keys, jnp.int32),
    }  # fmt: skip
    scale = {"scale_B": jnp.full(1, H**-0.5, jnp.float32)}
    runs: dict[str, Callable[[], Any]] = {}
    row: dict[str, Any] = {"shape": name}
    if shape.make:
        made, diagonals = shape.make()
        columns, bands = made[None], np.asarray(bands_of(jnp.asarray(diagonals[None])))
    else:
        scores = functools.partial(programs("scores", shape), q, k, **common, **scale)
        found = scores()
        slash_N = programs("budgets", shape)(jnp.float32(shape.density), *found)
        where = common["q_start"], common["kv_len_B"]
        runs = {"scores": scores}
        for each, by_bands in CHOICES.items():
            runs[each] = functools.partial(programs(each, shape), rule(slash_N, by_bands), *found, *where)
        columns, bands = (np.asarray(x) for x in runs["choice"]())
        row |= densities(shape, programs, q, k, slash_N, common | scale)
    marks = {"columns_BNS": jnp.asarray(columns), "bands_BNM": jnp.asarray(bands)}
    runs |= {
        "sparse": lambda: programs("sparse", shape)(q, k, v, **common, **scale, **marks),
        "lists": lambda: programs("lists", shape)(k, v, **common, **marks),
        "dense": lambda: programs("dense", shape)(q, k, v, **common, **scale),
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
    row |= {
        "density": pairs / (N * place.causal), "most columns": int(columns.sum(-1).max()),
        "fewest separate bands": min(by_head), "most separate bands": max(by_head),
        "error": tools.worst_row_error(out[0, rows], want),
        "lse error": float(np.abs(np.asarray(lse[0, rows]) - np.asarray(want_lse)).max()),
    }  # fmt: skip
    if row["error"] > TOLERANCE:
        return row | {"reason": "wrong"}
    items = np.asarray(runs["lists"]()[0].items, np.int64).reshape(-1, FIELDS)
    walked = items[items[:, OWN_KEYS] > 0, -1].sum()
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
        chosen += seconds["choice by bands"] - seconds["choice"]
        row["the same, chosen by bands"] = (chosen + seconds["lists"]) / attention
    if shape.make:
        lines = zip(made, diagonals, strict=True)
        row["pairs over MInference's"] = pairs / sum(
            minference_pairs(*each, place.start, place.queries) for each in lines
        )
    return row


def densities(
    shape: Shape, programs: Programs, q: jax.Array, k: jax.Array, slash_N: jax.Array, common: dict[str, Any]
) -> dict[str, Any]:
    """Density of every chunk of the prompt with the same queries and budgets, and of the whole prompt."""
    place, pairs, causal = shape.place, list[float](), list[int]()
    for start in range(0, place.keys, place.queries):
        chunk = {"q_start": jnp.int32(start), "kv_len_B": jnp.full(1, start + place.queries, jnp.int32)}
        found = programs("scores", shape)(q, k, **common | chunk)
        lines = programs("choice", shape)(rule(slash_N), *found, *chunk.values())
        pairs.append(float(pairs_of(*lines, *chunk.values())))
        causal.append(N * Place(place.queries, start).causal)
    return {
        "density of each chunk": [round(x / y, 4) for x, y in zip(pairs, causal, strict=True)],
        "density of the prompt": sum(pairs) / sum(causal),
    }


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
    if arguments.only:
        shapes = {name: shapes[name] for name in arguments.only.split(",")}
    programs = Programs(shapes.values())
    rows = []
    for name, shape in shapes.items():
        rows.append(measure(name, shape, programs, arguments.rounds))
        for key, value in rows[-1].items():
            print(f"{key:40} {value:.4g}" if isinstance(value, float) else f"{key:40} {value}", flush=True)
        if arguments.out:
            common = {"command": "python scripts/bench_sparse.py", "rounds": arguments.rounds}
            results.write(arguments.out, common | {"heads": f"{N}/{K}", "head_dim": H, "rows": rows})


if __name__ == "__main__":
    main()
