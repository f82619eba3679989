"""Checks every GPU backend of attention against float32 on the machine at hand; exits 1 if one is off.

    python scripts/check_gpu.py [--seed 0] [--backends mosaic_gpu] [--only 'ends at']

Inputs are fresh normal values; the key cache beyond the last tile holds NaN, and so does the memory that outputs are likely to
get. Outputs are compared by relative norm: bfloat16 must stay within 1e-2 (2e-3 is usual) and log-sum-exps within 2e-2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention.api import BACKENDS as PREFILL
from qwen_jax.kernels.blocks import EVERYTHING, Blocks, Share
from qwen_jax.kernels.cutoffs.api import BACKENDS as CUTOFFS
from qwen_jax.kernels.cutoffs.ranks import Heavy, rank_of
from qwen_jax.kernels.decode_attention.api import BACKENDS as DECODE
from qwen_jax.kernels.line_scores.api import BACKENDS as LINES
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.kernels.merge import merge
from qwen_jax.kernels.quantised import expand, quantise
from qwen_jax.kernels.rotations.api import BACKENDS as ROTATIONS
from qwen_jax.kernels.sparse_attention.api import BACKENDS as SPARSE
from qwen_jax.kernels.sparse_attention.bands import tile_distances
from qwen_jax.kernels.sparse_attention.computed import computed_keys
from qwen_jax.rope import Rotary, temperature

TOLERANCE = 1e-2
LSE_TOLERANCE = 2e-2
SMALL = DualChunk(chunk_size=1280, local_size=256, original_max_position_embeddings=1024)  # s = 1024
S = SMALL.chunk_len
LARGE = DualChunk(chunk_size=2304, local_size=256)  # s = 2048

# name: (batch, queries, heads, kv heads, head dim, capacity, q_start, kv_len of each row, dual chunk[, slope])
PREFILL_CASES: dict[str, tuple[Any, ...]] = {
    "causal square": (1, 1024, 4, 2, 128, 1024, 0, [1024], None),
    "head 64": (1, 512, 4, 2, 64, 1024, 512, [1024], None),
    "chunk at an offset, G = 7": (1, 512, 28, 4, 128, 4096, 2048, [2560], None),
    "odd offset, ragged queries": (1, 333, 4, 1, 128, 2048, 777, [1110], None),
    "one key": (1, 128, 4, 2, 128, 512, 0, [1], None),
    "a row that sees nothing": (2, 256, 4, 2, 128, 512, 0, [0, 256], None),
    "ragged batch": (3, 256, 8, 4, 128, 2048, 1024, [1280, 1100, 3], SMALL),
    "ends at s - 1": (1, S, 4, 2, 128, 4 * S, 0, [S - 1], SMALL),
    "ends at s": (1, S, 4, 2, 128, 4 * S, 0, [S], SMALL),
    "ends at s + 1": (1, 128, 4, 2, 128, 4 * S, S, [S + 1], SMALL),
    "starts at s": (1, S, 4, 2, 128, 4 * S, S, [2 * S], SMALL),
    "starts at 2s": (1, S, 4, 2, 128, 4 * S, 2 * S, [3 * S], SMALL),
    "in the fourth chunk": (1, 512, 4, 2, 128, 4 * S, 3 * S + 256, [3 * S + 768], SMALL),
    "fourth chunk, head 64, G = 5": (2, 256, 10, 2, 64, 4 * S, 3 * S + 256, [3 * S + 512, 2 * S + 5], SMALL),
    "many items": (2, 2048, 28, 4, 128, 8192, 2 * 2048, [6144, 5000], LARGE),
}  # fmt: skip

# name: as PREFILL_CASES, then the largest number of columns and of bands a head[, devices that the cache is dealt to]
SPARSE_CASES: dict[str, tuple[Any, ...]] = {
    "causal square": (1, 1024, 4, 2, 128, 1024, 0, [1024], None, 60, 4),
    "head 64, many columns": (1, 512, 4, 2, 64, 4096, 3072, [3584], None, 900, 6),
    "G = 7, ragged queries": (1, 333, 28, 4, 128, 4096, 2048, [2381], None, 300, 10),
    "first chunk": (1, S, 4, 2, 128, 4 * S, 0, [S], SMALL, 200, 5),
    "second chunk": (1, S // 2, 4, 2, 128, 4 * S, S, [S + S // 2], SMALL, 200, 8),
    "third chunk": (1, S, 8, 2, 128, 4 * S, 2 * S, [3 * S - 5], SMALL, 500, 12),
    "fourth chunk, off its start": (2, 512, 10, 2, 64, 4 * S, 3 * S + 256, [3 * S + 512, 2 * S + 5], SMALL, 700, 20),
    "ragged batch": (3, 256, 8, 4, 128, 2048, 1024, [1280, 1100, 3], SMALL, 100, 6),
    "off the tile": (2, 333, 14, 2, 128, 4 * S, 3 * S + 77, [3 * S + 410, 3 * S + 300], SMALL, 300, 20),
    "capacity off the tile": (1, 256, 4, 2, 128, 1272, 1024, [1270], SMALL, 100, 6),
    "a row that sees nothing": (2, 256, 4, 2, 128, 512, 0, [0, 256], None, 30, 2),
    "many items": (2, 2048, 28, 4, 128, 8192, 2 * 2048, [6144, 5000], LARGE, 1000, 20),
    "dealt to 2 devices": (1, S, 8, 2, 128, 4 * S, 2 * S, [3 * S - 5], SMALL, 500, 12, 2),
    "dealt to 4 devices, off the tile": (2, 333, 14, 2, 128, 4 * S, 3 * S + 77, [3 * S + 410, 3 * S + 300], SMALL, 300, 20, 4),
    "dealt to 8 devices, few lines": (2, 512, 10, 2, 64, 4 * S, 3 * S + 256, [3 * S + 512, 2 * S + 5], SMALL, 20, 2, 8),
    "plain positions, dealt to 2 devices": (1, 333, 28, 4, 128, 4096, 2048, [2381], None, 300, 10, 2),
    "many items, dealt to 2 devices": (2, 2048, 28, 4, 128, 8192, 2 * 2048, [6144, 5000], LARGE, 1000, 20, 2),
}  # fmt: skip

# name: as PREFILL_CASES, then the number of last queries[, devices that the cache is dealt to, each of which is compared alone]
LINE_CASES: dict[str, tuple[Any, ...]] = {
    "one tile": (1, 64, 4, 2, 128, 128, 0, [64], None, 64),
    "every stage, G = 7": (1, 512, 28, 4, 128, 8 * S, 6 * S, [6 * S + 512], SMALL, 64),
    "G = 8": (1, 128, 8, 1, 128, 4 * S, 3 * S, [3 * S + 100], SMALL, 64),
    "ragged batch": (3, 256, 8, 4, 128, 2048, 1024, [1280, 1100, 3], SMALL, 64),
    "fewer queries than rows": (1, 19, 7, 1, 128, 2048, 1024, [1043], SMALL, 5),
    "head 64, odd ends": (2, 100, 14, 2, 64, 3000, 2900, [3000, 2931], None, 64),
    "many tiles a range": (1, 1024, 4, 4, 128, 1 << 18, (1 << 18) - 2048, [(1 << 18) - 1029], LARGE, 64),
    "dealt to 2 devices, every stage": (1, 512, 28, 4, 128, 8 * S, 6 * S, [6 * S + 512], SMALL, 64, 2),
    "dealt to 4 devices, ragged batch": (3, 256, 8, 4, 128, 4096, 3072, [3328, 3100, 3], SMALL, 64, 4),
    "dealt to 8 devices, head 64, odd ends": (2, 100, 14, 2, 64, 3072, 2900, [3000, 2931], None, 64, 8),
    "dealt to 2 devices, many tiles": (1, 1024, 4, 4, 128, 1 << 18, (1 << 18) - 2048, [(1 << 18) - 1029], LARGE, 64, 2),
}  # fmt: skip

# name: (rows, size, counts); the scores of a row: probabilities, few distinct values, or mostly 0
CUTOFF_CASES: dict[str, tuple[Any, ...]] = {
    "short rows": (3, 52, [0, 1, 40]),
    "many": (4, 50_000, [29, 1000, 40_000, 46_000]),
    "a whole cache": (3, 1 << 20, [20_000, 1, 1_000_000]),
    "heavy ones": (4, 50_000, [29, 1000, 40_000, 300_000], Heavy(47_000, 128)),
}  # fmt: skip

# name: (B, T, N, whether rows of the batch share their sines, dtype of the keys)
ROTATION_CASES: dict[str, tuple[int, int, int, bool, str]] = {
    "a piece": (1, 32_768, 28, True, "bfloat16"),
    "no whole tile": (1, 4104, 40, True, "float16"),
    "a batch, each row with sines of its own": (3, 640, 5, False, "float16"),
    "a batch, one head": (2, 256, 1, True, "bfloat16"),
}

# name: base-2 exponent of key j in every row, beside random ones of about 1. Whatever a kernel takes for a maximum
# early on is then wrong by more than float32's exponents reach.
SLOPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "scores grow by 0.5 a key": lambda j: 0.5 * j,
    "scores grow by 8 a key, from -8000": lambda j: 8.0 * j - 8000,
    "scores fall by 2 a key": lambda j: -2.0 * j,
    "few keys stand out by 400": lambda j: (
        jnp.where((j % 389) == 200, 400.0, 0.0) + jnp.where(j % 389 == 201, 399.0, 0.0)
    ),
    "early keys stand out by 39": lambda j: jnp.where((j > 190) & (j < 200), 39.0, 0.0),
    "the first tile is 3000 below": lambda j: jnp.where(j < 128, -3000.0, 0.0),
    "the last keys are 1000 above": lambda j: jnp.where(j > 1000, 1000.0, 0.0),
}
# Within what queries rounded to 11 bits resolve.
GENTLE_SLOPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "scores grow by 0.05 a key": lambda j: 0.05 * j,
    "scores fall by 2 a key": lambda j: -2.0 * j,
    "few keys stand out by 40": lambda j: jnp.where((j % 389) == 200, 40.0, 0.0),
    "the first tile is 3000 below": SLOPES["the first tile is 3000 below"],
}
PREFILL_CASES |= {
    name: (1, 1024, 4, 2, 128, 1536, 512, [1536], None, slope) for name, slope in SLOPES.items()
}

# name: (heads, kv heads, head dim, capacity, positions, prompt lengths, dual chunk[, cache[, devices or slope]]); the slots
# of a cache may be dealt to devices, and keys may carry a slope
DECODE_CASES: dict[str, tuple[Any, ...]] = {
    "one row": (28, 4, 128, 4096, [4000], [4000], None),
    "positions 0, 1, none": (4, 2, 128, 512, [0, 1, -1], [1, 1, 0], None),
    "every stage and boundary": (
        8, 2, 128, 4 * S, [0, S - 2, S - 1, S, 2 * S - 1, 2 * S, 3 * S + 5], [1, S, 9, S, S, S, 2 * S], SMALL,
    ),
    "head 64, generated keys": (10, 2, 64, 4 * S, [3 * S + 77, S + 3], [2 * S, 100], SMALL),
    "64 rows": (28, 4, 128, 4096, [60 * b + 17 for b in range(64)], [30 * b + 5 for b in range(64)], SMALL),
    "long": (28, 4, 128, 1 << 18, [(1 << 18) - 2], [(1 << 18) - 500], SMALL),
    "int8": (28, 4, 128, 4 * S, [3 * S + 77, S + 3, -1], [2 * S, 100, 0], SMALL, "int8"),
    "fp8": (28, 4, 128, 4 * S, [3 * S + 77, S + 3, -1], [2 * S, 100, 0], SMALL, "float8_e4m3fn"),
    "int8, head 64": (10, 2, 64, 4 * S, [3 * S + 77, 5], [2 * S, 6], SMALL, "int8"),
    "fp8, head 64, odd chunks": (14, 2, 64, 4096, [3 * 960 + 77, 5], [960, 6], DualChunk(1216, 256), "float8_e4m3fn"),
    "int8, G = 8, plain positions": (16, 2, 128, 520, [519, 0, 1, 2], [500, 1, 1, 1], None, "int8"),
    "int8, 64 rows": (28, 4, 128, 4096, [60 * b + 17 for b in range(64)], [30 * b + 5 for b in range(64)], SMALL, "int8"),
    "int8, long": (28, 4, 128, 1 << 18, [(1 << 18) - 2], [(1 << 18) - 500], SMALL, "int8"),
    **{
        f"{name}, every stage and boundary": (
            40, 8, 128, 4 * S, [0, S - 2, S - 1, S, 2 * S - 1, 2 * S, 3 * S + 5], [1, S, 9, S, S, S, 2 * S], SMALL, cache,
        )
        for name, cache in (("int8", "int8"), ("fp8", "float8_e4m3fn"))
    },
    "dealt to 4 devices": (28, 4, 128, 4 * S, [3 * S + 77, S + 3, 100, -1], [2 * S, 100, 9, 0], SMALL, "bfloat16", 4),
    "int8, dealt to 4 devices": (28, 4, 128, 4 * S, [3 * S + 77, S + 3, 100, -1], [2 * S, 100, 9, 0], SMALL, "int8", 4),
    "fp8, dealt to 16 devices": (10, 2, 64, 4 * S, [3 * S + 77, 50], [2 * S, 20], SMALL, "float8_e4m3fn", 16),
    **{
        f"int8, {name}": (14, 2, 128, 1536, [1535, 300], [1500, 200], None, "int8", slope)
        for name, slope in GENTLE_SLOPES.items()
    },
}  # fmt: skip


def leave_nan_behind() -> None:
    """Fills memory that the next outputs are likely to get, so that whatever a kernel leaves unwritten is NaN."""
    jax.block_until_ready(jnp.full(1 << 25, jnp.nan)).delete()


@functools.cache
def _prefill_program(backend: str, rotary: Rotary) -> Callable[..., Any]:
    """Compiled once for all cases of the same shapes."""
    return jax.jit(functools.partial(PREFILL[backend], rotary=rotary))


def check_prefill(backend: str, case: tuple[Any, ...], seed: int, keys: str) -> tuple[float, float, bool]:
    """(worst relative error of out, worst error of lse, are empty rows 0 and -inf)."""
    B, T, N, K, H, capacity, q_start, kv_len, dca, *slope = case
    rotary = dataclasses.replace(tools.rotary(H, dca), mixed=not slope)  # a slope is one channel's
    layers, layer, scale = 2, 1, 1.3 * H**-0.5
    q = tools.random(seed, (B, T, N, H))
    k, v = (tools.random(seed + n, (layers, B, K, capacity, H)) for n in (1, 2))
    if slope:
        # The component that rotates least carries it; powers of two, so that bfloat16 rounds neither factor. Our
        # kernel multiplies queries by scale / ln(2), cuDNN's caller by scale.
        scale = 2.0**-4 * (math.log(2) if backend == "mosaic_gpu" else 1.0)
        q = q.at[..., H // 2 - 1].set(16.0)
        k = k.at[..., H // 2 - 1].set(slope[0](jnp.arange(capacity)).astype(k.dtype))
    end = min(capacity, -(-(q_start + T) // 512) * 512)
    k, v = (x.at[:, :, :, end:].set(jnp.nan) for x in (k.astype(keys), v))

    leave_nan_behind()
    out, lse = _prefill_program(backend, rotary)(
        q, k, v, layer=jnp.int32(layer), q_start=jnp.int32(q_start), kv_len_B=jnp.array(kv_len, jnp.int32),
        scale_B=jnp.full(B, scale, jnp.float32),
    )  # fmt: skip
    worst_out, worst_lse, empty_right = 0.0, 0.0, True
    rows = np.unique(np.linspace(0, T - 1, min(T, 256)).astype(int))
    for b in range(B):
        want, want_lse = tools.exact(
            q[b, rows], q_start + rows, k[layer, b, :, :end], v[layer, b, :, :end],
            kv_len=kv_len[b], rotary=rotary, scale=scale,
        )  # fmt: skip
        empty = np.isneginf(want_lse)
        got, got_lse = out[b, rows], np.asarray(lse[b, rows])
        empty_right &= (
            bool((np.isneginf(got_lse) == empty).all()) and not np.asarray(got, np.float32)[empty].any()
        )
        worst_out = max(worst_out, tools.relative_error(got, want))
        worst_lse = max(worst_lse, _lse_error(got_lse[~empty], np.asarray(want_lse)[~empty]))
    return worst_out, worst_lse, empty_right


def check_sparse(backend: str, case: tuple[Any, ...], seed: int, keys: str) -> tuple[float, float, bool]:
    """Like `check_prefill`, of the real queries, against the keys of the contract."""
    B, T, N, K, H, capacity, q_start, kv_len, dca, most_columns, most_bands, *devices = case
    rotary = tools.rotary(H, dca)
    blocks = Blocks.fitting(*devices, rotary.chunk_len) if devices else None
    layers, layer, scale = 2, 1, 1.3 * H**-0.5
    q = tools.random(seed, (B, T, N, H))
    k, v = (tools.random(seed + n, (layers, B, K, capacity, H)) for n in (1, 2))
    end = min(capacity, -(-(q_start + T) // 512) * 512)
    k, v = (x.at[:, :, :, end:].set(jnp.nan).at[0].set(jnp.nan) for x in (k.astype(keys), v))
    columns, bands = random_lines(
        np.random.default_rng(seed), (B, N), capacity, q_start + T, most_columns, most_bands
    )

    @jax.jit
    def run(*arguments: Any) -> Any:
        q, k, v, columns, bands, layer, q_start, kv_len, scale, *rank = arguments
        return SPARSE[backend](
            q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=most_columns, layer=layer,
            q_start=q_start, kv_len_B=kv_len, rotary=rotary, scale_B=scale,
            **({"share": Share(blocks, *rank)} if blocks else {}),
        )  # fmt: skip

    parts = []
    leave_nan_behind()
    for rank, (k_held, v_held, columns_held) in enumerate(
        zip(held(k, 3, blocks), held(v, 3, blocks), held(columns, 2, blocks), strict=True)
    ):
        parts.append(run(
            q, k_held, v_held, columns_held, bands, jnp.int32(layer), jnp.int32(q_start), jnp.array(kv_len, jnp.int32),
            jnp.full(B, scale, jnp.float32), *[jnp.int32(rank)][: len(devices)],
        ))  # fmt: skip
    finite = all(bool(jnp.isfinite(out).all()) and not bool(jnp.isnan(lse).any()) for out, lse in parts)
    out, lse = parts[0]
    if blocks:
        outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
        finite &= not bool(outs[jnp.isneginf(lses)].any())  # a device without a key gives nothing
        out, lse = merge(outs.astype(jnp.float32), lses, 0)
    worst_out, worst_lse = 0.0, 0.0
    for b in range(B):
        rows = np.unique(np.linspace(0, T - 1, min(T, 256)).astype(int))
        rows = rows[q_start + rows < kv_len[b]]
        if not len(rows):
            continue
        keep = np.stack(
            [computed_keys(columns[b, n, :end], bands[b, n], q_start + rows) for n in range(N)], axis=1
        )
        want, want_lse = tools.exact(
            q[b, rows], q_start + rows, k[layer, b, :, :end], v[layer, b, :, :end],
            kv_len=kv_len[b], rotary=rotary, scale=scale, keep_RNS=keep,
        )  # fmt: skip
        worst_out = max(worst_out, tools.worst_row_error(out[b, rows], want))
        worst_lse = max(worst_lse, float(np.abs(np.asarray(lse[b, rows]) - np.asarray(want_lse)).max()))
    return worst_out, worst_lse, finite


def held(x: Any, axis: int, blocks: Blocks | None) -> list[Any]:
    """What each device holds of an array whose positions are dealt."""
    return jnp.split(blocks.deal(jnp.asarray(x), axis), blocks.count, axis) if blocks else [x]


def random_lines(
    rng: np.random.Generator, heads: tuple[int, int], capacity: int, end: int, columns: int, bands: int
) -> tuple[np.ndarray, np.ndarray]:
    """bool[B, N, S] columns before `end` and bool[B, N, M] bands: none in the first head, as many as allowed in the last."""
    found = np.zeros((*heads, capacity), bool), np.zeros((*heads, tile_distances(capacity)), bool)
    for lines, most, places in zip(
        found, (columns, bands), (min(end, capacity), tile_distances(end)), strict=True
    ):
        counts = rng.integers(0, min(most, places), heads)
        counts[:, 0], counts[:, -1] = 0, min(most, places)
        for b, n in np.ndindex(heads):
            lines[b, n, rng.choice(places, counts[b, n], replace=False)] = True
    return found


def _lse_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, less strictly so where the log-sum-exps are thousands."""
    return float((np.abs(got - want) / (1 + 2e-3 * np.abs(want))).max(initial=0.0))


def check_decode(backend: str, case: tuple[Any, ...], seed: int, keys: str) -> tuple[float, float, bool]:
    """Like `check_prefill`."""
    N, K, H, capacity, positions, prompts, dca, *rest = case
    cache, special = (*rest, *("bfloat16", None)[len(rest) :])
    B = len(positions)
    rotary = tools.rotary(H, dca)
    met = dataclasses.replace(rotary, mixed=cache != "bfloat16")
    layers, layer, scale = 2, 1, 1.3 * H**-0.5
    q = tools.random(seed, (B, N, H))
    k, v = (tools.random(seed + n, (layers, B, K, capacity, H)) for n in (1, 2))
    if callable(special):
        scale = 2.0**-4 * math.log(2)
        q = q.at[..., H // 2 - 1].set(16.0)
        k = k.at[..., H // 2 - 1].set(special(jnp.arange(capacity)).astype(k.dtype))
    k = k.astype(keys) if cache == "bfloat16" else k
    arrays = {"k_LBKSH": k, "v_LBKSH": v}
    if cache != "bfloat16":  # compared with the numbers the cache holds
        (k_run, k_scale), (v_run, v_scale) = (quantise(x, jnp.dtype(cache)) for x in (k, v))
        arrays = {"k_LBKSH": k_run, "v_LBKSH": v_run, "k_scale_LBKS": k_scale, "v_scale_LBKS": v_scale}
        k, v = expand(k_run, k_scale, jnp.float32), expand(v_run, v_scale, jnp.float32)
    devices = special if isinstance(special, int) else 1
    blocks = Blocks.fitting(devices, rotary.chunk_len) if devices > 1 else None

    @jax.jit
    def run(q: Any, arrays: Any, rank: Any, layer: Any, position: Any, prompt: Any, scale: Any) -> Any:
        return DECODE[backend](
            q, **arrays, layer=layer, position_B=position, prompt_len_B=prompt, rotary=met, scale_B=scale,
            share=Share(blocks, rank) if blocks else EVERYTHING,
        )  # fmt: skip

    arguments = jnp.int32(layer), jnp.array(positions), jnp.array(prompts), jnp.full(B, scale, jnp.float32)
    leave_nan_behind()
    dealt = {name: blocks.deal(x, 3) if blocks else x for name, x in arrays.items()}
    parts = [
        run(q, {name: jnp.split(x, devices, axis=3)[rank] for name, x in dealt.items()}, jnp.int32(rank), *arguments)
        for rank in range(devices)
    ]  # fmt: skip
    out, lse = parts[0]
    if blocks:
        outs, lses = zip(*parts, strict=True)
        out, lse = merge(jnp.stack(outs).astype(jnp.float32), jnp.stack(lses), 0)
    original = dca.original_max_position_embeddings if dca else 0
    worst_out, worst_lse, empty_right = 0.0, 0.0, True
    for b in range(B):
        if positions[b] < 0:
            empty_right &= bool(np.isneginf(lse[b]).all()) and not np.asarray(out[b], np.float32).any()
            continue
        j = jnp.arange(capacity)
        want, want_lse = tools.exact(
            q[b][None], np.array([positions[b]]), k[layer, b], v[layer, b],
            kv_len=capacity, rotary=rotary, scale=scale,
            key_factor_S=temperature(jnp.where(j < prompts[b], prompts[b], j + 1), original),
        )  # fmt: skip
        worst_out = max(worst_out, tools.relative_error(out[b], want[0]))
        worst_lse = max(worst_lse, _lse_error(np.asarray(lse[b]), np.asarray(want_lse[0])))
    return worst_out, worst_lse, empty_right


def check_lines(backend: str, case: tuple[Any, ...], seed: int, keys: str) -> tuple[float, float, bool]:
    """(worst relative error of a head's columns, of its diagonals, are heads without queries -inf); against float32."""
    B, T, N, K, H, capacity, q_start, kv_len, dca, last_queries, *devices = case
    rotary = tools.rotary(H, dca)
    blocks = Blocks.fitting(*devices, rotary.chunk_len) if devices else None
    q = tools.random(seed, (B, T, N, H))
    k = tools.random(seed + 1, (2, B, K, capacity, H)).astype(keys)
    end = max(min(q_start + T, n) for n in kv_len)
    k = k.at[0].set(jnp.nan).at[:, :, :, -(-end // 128) * 128 :].set(jnp.nan)

    def run(backend: str, q: jax.Array, k: jax.Array) -> list[Any]:
        """Columns and diagonals of every device, its softmax over its own keys."""

        @jax.jit
        def scores(q: Any, k: Any, layer: Any, q_start: Any, kv_len: Any, scale: Any, rank: Any) -> Any:
            return line_scores(
                q, k, layer=layer, q_start=q_start, kv_len_B=kv_len, rotary=rotary, scale_B=scale,
                last_queries=last_queries, backend=backend, share=Share(blocks, rank) if blocks else None,
            )  # fmt: skip

        scale = jnp.full(B, 1.5 * H**-0.5, jnp.float32)
        arguments = jnp.int32(1), jnp.int32(q_start), jnp.array(kv_len, jnp.int32), scale
        return [
            sums
            for rank, mine in enumerate(held(k, 3, blocks))
            for sums in scores(q, mine, *arguments, jnp.int32(rank))
        ]

    leave_nan_behind()
    got, want = run(backend, q, k), run("xla", q.astype(jnp.float32), jnp.nan_to_num(k.astype(jnp.float32)))
    errors, same_infinities = [], True
    for sums, right in zip(got, want, strict=True):
        sums, right = np.asarray(sums, np.float64), np.asarray(right, np.float64)
        same_infinities &= bool(
            (np.isinf(sums) == np.isinf(right)).all()
            and (sums[np.isinf(sums)] == right[np.isinf(right)]).all()
        )
        sums, right = (np.where(np.isfinite(right), x, 0) for x in (sums, right))
        distance, size = np.linalg.norm(sums - right, axis=-1), np.linalg.norm(right, axis=-1)
        errors.append(float((distance / np.maximum(size, 1e-30))[size > 0].max(initial=0.0)))
    return max(errors[::2]), max(errors[1::2]), same_infinities


def check_cutoffs(backend: str, case: tuple[Any, ...], seed: int) -> tuple[float, float, bool]:
    """(places chosen wrongly, in rows of one array and of another, is neither empty where it should not be); against a sort."""
    rows, size, counts, *heavy = case
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(-10, 5, (rows, size))).astype(np.float32)
    scores[:, : size // 40] = np.inf
    scores[:, size - size // 10 :] = -np.inf
    tied = np.where(rng.random((rows, size)) < 0.1, scores, rng.integers(0, 2, (rows, size))).astype(
        np.float32
    )
    count_AX = np.array([counts[:rows], counts[::-1][:rows]], np.int32)
    find = jax.jit(lambda scores, count: CUTOFFS[backend](scores, count, *heavy))
    weight_S = np.where(np.arange(size) < heavy[0].first, 1, heavy[0].weight) if heavy else np.ones(size, int)
    least_AX, last_AX = find([jnp.asarray(scores), jnp.asarray(tied)], jnp.asarray(count_AX))
    wrong = []
    for x_XS, *cuts in zip((scores, tied), count_AX, np.asarray(least_AX), np.asarray(last_AX), strict=True):
        wrong.append(0)
        for x_S, count, least, last in zip(x_XS, *cuts, strict=True):
            rank = np.asarray(rank_of(jnp.asarray(x_S)))
            kept = (rank > least) | ((rank == least) & (np.arange(size) <= last))
            order = np.argsort(-rank, kind="stable")
            order = order[np.cumsum(weight_S[order]) - weight_S[order] < count]
            wrong[-1] += int((kept != (np.isin(np.arange(size), order) & (rank >= 0))).sum())
    return *wrong, True


def check_rotations(backend: str, case: tuple[Any, ...], seed: int) -> tuple[float, float, bool]:
    """(relative error, that of the worst vector, is it what one rounding makes); against float32."""
    B, T, N, shared, dtype = case
    q = tools.random(seed, (B, T, N, 128)).at[..., 77].multiply(20)
    cos, sin = (tools.random(seed + n, (3, 1 if shared else B, T, 64)).astype(jnp.float32) for n in (1, 2))
    leave_nan_behind()
    got = ROTATIONS[backend](q, cos, sin, dtype=jnp.dtype(dtype))
    want = ROTATIONS["xla"](q.astype(jnp.float32), cos, sin, dtype=jnp.dtype(jnp.float32))
    off = jnp.linalg.norm(got.astype(jnp.float32) - want, axis=-1) / jnp.linalg.norm(want, axis=-1)
    error = tools.relative_error(got, want)
    # Rounded before they are mixed too, they would be off by 0.3 units in the last place, not 0.21.
    return error, float(off.max()), error <= 0.25 * float(jnp.finfo(dtype).eps)


def scratch_bytes(dtype: str) -> dict[str, tuple[int, int]]:
    """Of compiled programs: (bytes of scratch, bytes of one layer's keys), for caches too large to copy unnoticed.

    dtype: of the keys.
    """
    rotary = tools.rotary(128, tools.QWEN_1M)
    cache = jax.ShapeDtypeStruct((4, 1, 4, 1 << 18, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct(cache.shape, jnp.dtype(dtype))
    row, scalar = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    scale = jax.ShapeDtypeStruct((1,), jnp.float32)

    def prefill(q: Any, k: Any, v: Any, layer: Any, start: Any, length: Any, scale: Any) -> Any:
        return PREFILL["mosaic_gpu"](
            q, k, v, layer=layer, q_start=start, kv_len_B=length, rotary=rotary, scale_B=scale
        )

    def decode(q: Any, k: Any, v: Any, layer: Any, position: Any, prompt: Any, scale: Any) -> Any:
        return DECODE["mosaic_gpu"](
            q, k, v, layer=layer, position_B=position, prompt_len_B=prompt, rotary=rotary, scale_B=scale
        )

    def sparse(q: Any, k: Any, v: Any, columns: Any, bands: Any, *rest: Any) -> Any:
        layer, start, length, scale, *rank = rest
        return SPARSE["mosaic_gpu"](
            q, k, v, columns_BNS=columns, bands_BNM=bands, most_columns=1000, layer=layer, q_start=start,
            kv_len_B=length, rotary=rotary, scale_B=scale, **({"share": Share(Blocks(512, 2), *rank)} if rank else {}),
        )  # fmt: skip

    q = jax.ShapeDtypeStruct((1, 2048, 28, 128), jnp.bfloat16)
    columns, bands, more = (jax.ShapeDtypeStruct((1, 28, size), bool) for size in (1 << 18, 1 << 11, 1 << 12))
    q1 = jax.ShapeDtypeStruct((1, 28, 128), jnp.bfloat16)
    programs = {
        "prefill": jax.jit(prefill).lower(q, keys, cache, scalar, scalar, row, scale),
        "sparse": jax.jit(sparse).lower(q, keys, cache, columns, bands, scalar, scalar, row, scale),
        "sparse, dealt to 2 devices": jax.jit(sparse).lower(
            q, keys, cache, columns, more, scalar, scalar, row, scale, scalar
        ),
        "decode": jax.jit(decode).lower(q1, keys, cache, scalar, row, row, scale),
    }
    layer = cache.size * cache.dtype.itemsize // cache.shape[0]
    return {name: (p.compile().memory_analysis().temp_size_in_bytes, layer) for name, p in programs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", default="mosaic_gpu,cudnn", help="comma separated")
    parser.add_argument(
        "--keys",
        default="float16",
        choices=("bfloat16", "float16"),
        help="their dtype beside values of bfloat16",
    )
    parser.add_argument(
        "--only",
        default="",
        help="cases whose kind and name contain one of these, comma separated; the kinds are prefill, sparse, lines, "
        "rotations, cutoffs, decode and scratch (no copy of the cache)",
    )
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    prefill, sparse, lines, decode = (
        functools.partial(check, keys=arguments.keys)
        for check in (check_prefill, check_sparse, check_lines, check_decode)
    )
    failures = 0
    for kind, cases, backends, check, measures in (
        ("prefill", PREFILL_CASES, PREFILL, prefill, ("out", "lse")),
        ("sparse", SPARSE_CASES, SPARSE, sparse, ("out", "lse")),
        ("lines", LINE_CASES, LINES, lines, ("columns", "diagonals")),
        ("rotations", ROTATION_CASES, ROTATIONS, check_rotations, ("out", "worst")),
        ("cutoffs", CUTOFF_CASES, CUTOFFS, check_cutoffs, ("wrong", "wrong with ties")),
        ("decode", DECODE_CASES, DECODE, decode, ("out", "lse")),
    ):
        for backend in arguments.backends.split(","):
            for name, case in cases.items() if backend in backends else ():
                if not any(part in f"{kind} {name}" for part in wanted):
                    continue
                try:
                    *errors, rest_right = check(backend, case, arguments.seed)
                except NotImplementedError as refusal:
                    print(f"refused  {kind:8} {backend:10} {name}: {refusal}")
                    continue
                good = errors[0] <= TOLERANCE and errors[1] <= LSE_TOLERANCE and rest_right
                failures += not good
                verdict = "ok      " if good else "FAILED  "
                found = " ".join(f"{name} {error:.1e}" for name, error in zip(measures, errors, strict=True))
                print(f"{verdict} {kind:8} {backend:10} {name}: {found}", flush=True)
    for kind, (scratch, layer) in (
        scratch_bytes(arguments.keys).items() if any(part in "scratch" for part in wanted) else ()
    ):
        failures += scratch >= layer // 2
        print(f"{kind}: {scratch / 1e6:.1f} MB of scratch; one layer's keys take {layer / 1e6:.1f} MB")
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
