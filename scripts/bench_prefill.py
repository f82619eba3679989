"""Prefill of a whole long prompt through the real shapes of Qwen2.5-7B or 14B on the GPUs there are, then decoding behind it.

Weights are drawn at random with heads that look where trained ones do (`structured_model`); a sparse run scales the slash
budget until the density of the whole prompt, computed pairs over causal pairs, is what was asked. Each run is of the whole
prompt and checks itself: attention rows at the ends of pieces around s, 2s, 3s and the end, in the first and in the last
layer, are recomputed in float32 from the cache. Prints and writes seconds by part, density, peak memory, decode speed.

    python scripts/bench_prefill.py --model 7b --density 0.1 --out benchmarks/prefill-7b-sparse.json
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import nnx
from structured_model import SINKS, structured_model
from trace_parts import traced

from qwen_jax.attention import prefill_layer
from qwen_jax.balance import balanced
from qwen_jax.cache import KVCache, init_cache, is_8_bit, read_layer
from qwen_jax.config import ModelConfig
from qwen_jax.context import capacity_for
from qwen_jax.decode import BLOCK, Request, decode_block, first_token
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece, Prefiller, default_chunk
from qwen_jax.sampling import SamplingControls, SamplingParams, row_keys, seen_tokens
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import Budget, LineBudgets
from qwen_jax.sparsity.cost_aware import Piece as Rows
from qwen_jax.sparsity.cost_aware import computed_pairs

SHAPES = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4},
    "14b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8},
}  # fmt: skip
KV_DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
VERTICAL = 1000  # columns a head keeps, as most entries of the published files have it


def config_of(model: str, layers: int | None) -> ModelConfig:
    """Qwen2.5-7B- or 14B-Instruct-1M, with fewer layers while developing."""
    raw = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152_064, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e7, "max_position_embeddings": 1_010_000, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 151_643, "eos_token_id": 151_645,
        "dual_chunk_attention_config": {
            "chunk_size": 262_144, "local_size": 8_192, "original_max_position_embeddings": 262_144,
        },
    } | SHAPES[model]  # fmt: skip
    return ModelConfig.from_dict(raw | ({"num_hidden_layers": layers} if layers else {}))


class Kept(NamedTuple):
    """What a piece leaves for the checks: of its first and last real row R, in the first and last layer L.

    q_LRNH, out_LRNH: queries, not rotated, and attention output. columns_LNS, bands_LNM: the lines, packed to bits.
    pairs_L: float32, computed pairs of every layer, all heads.
    """

    q_LRNH: jax.Array
    out_LRNH: jax.Array
    columns_LNS: jax.Array
    bands_LNM: jax.Array
    pairs_L: jax.Array


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def probe_piece(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    start: jax.Array,
    last: jax.Array,
    length_B: jax.Array,
    cache: KVCache,
    sparse: SparsePrefill | None,
) -> tuple[Kept, KVCache]:
    """A piece of the prefilled prompt once more, keeping what the checks and the density need.

    What a piece sees lies before it, so it computes again what it computed in its turn, the same lines too. `last` is its
    last real row.
    """
    model: Qwen2 = nnx.merge(graph, params)
    c = model.config
    T, S = tokens_BT.shape[1], cache.capacity
    scale_B = model.score_scale(length_B, length_B)
    rows_R = jnp.stack([jnp.int32(0), last])
    M = tile_distances(S)
    row_LRNH = jnp.zeros((2, 2, c.num_heads, c.head_dim), model.embed.weight[...].dtype)
    kept = Kept(
        row_LRNH,
        row_LRNH,
        jnp.zeros((2, c.num_heads, -(-S // 8)), jnp.uint8),
        jnp.zeros((2, c.num_heads, -(-M // 8)), jnp.uint8),
        jnp.zeros(c.num_layers, jnp.float32),
    )

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, state: Any, layer: jax.Array) -> Any:
        cache, kept = state
        out_BTNH, cache = prefill_layer(
            None, q_BTNH, k_BTKH, v_BTKH, cache, sparse,
            layer=layer, start=start, first=jnp.int32(0), prompt_len_B=length_B, scale_B=scale_B, rotary=model.rotary,
            backend=None,
        )  # fmt: skip
        new = {"q_LRNH": q_BTNH[0, rows_R], "out_LRNH": out_BTNH[0, rows_R]}
        pairs_L = kept.pairs_L
        if sparse is not None:
            end_B = jnp.minimum(start + T, length_B)
            k_LBKSH, _, at = read_layer(cache, layer, q_BTNH.dtype)
            scores = line_scores(
                q_BTNH,
                k_LBKSH,
                layer=at,
                q_start=start,
                kv_len_B=length_B,
                rotary=model.rotary,
                scale_B=scale_B,
            )
            columns_BNS, bands_BNM = sparse.choose(*scores, layer=layer, q_start=start, end_B=end_B)
            new |= {
                "columns_LNS": jnp.packbits(columns_BNS[0], axis=-1),
                "bands_LNM": jnp.packbits(bands_BNM[0], axis=-1),
            }
            pairs_L = pairs_L.at[layer].set(computed_pairs(columns_BNS, bands_BNM, Rows(start, end_B)).sum())
        at_L = layer == jnp.array([0, c.num_layers - 1])
        news = {
            name: jnp.where(at_L.reshape(-1, *[1] * x.ndim), x, getattr(kept, name))
            for name, x in new.items()
        }
        return out_BTNH, (cache, kept._replace(pairs_L=pairs_L, **news))

    positions_BT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), tokens_BT.shape)
    _, (cache, kept) = model.run_layers(model.embed(tokens_BT), positions_BT, (cache, kept), attend)
    return kept, cache


def timed_prefill(
    prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, only: list[Piece] | None = None
) -> tuple[float, jax.Array, KVCache]:
    """(Seconds of a prefill, last hidden state, cache): `Prefiller.run`, as `LLM` runs it, of the prompt or of some pieces."""
    T = tokens_BT.shape[1]
    spans = [(0, T)] if only is None else [(piece.start, piece.start + piece.length) for piece in only]
    jax.block_until_ready(cache)
    begin = time.perf_counter()
    for start, end in spans:
        pieces = prefiller.run(tokens_BT[:, start:end], np.array([T]), cache, start)
        for n, (done, last_BD, newest) in enumerate(pieces):
            cache = newest
            if n % 8 == 7:  # a wait that costs nothing beside eight pieces
                last_BD.block_until_ready()
                print(f"  {start + done} tokens after {time.perf_counter() - begin:.1f} s", flush=True)
    last_BD.block_until_ready()
    return time.perf_counter() - begin, last_BD, cache


def probe(
    prefiller: Prefiller,
    tokens_BT: np.ndarray,
    cache: KVCache,
    sparse: SparsePrefill | None,
    plan: list[Piece],
) -> tuple[list[tuple[Piece, Kept]], KVCache]:
    """What the pieces of `plan` keep, and the cache."""
    length_B = jnp.array([tokens_BT.shape[1]], jnp.int32)
    out = []
    for piece in plan:
        rows = np.zeros((1, piece.padded), np.int32)
        rows[:, : piece.length] = tokens_BT[:, piece.start : piece.start + piece.length]
        kept, cache = probe_piece(
            prefiller.graph, prefiller.params, jnp.asarray(rows), jnp.int32(piece.start), jnp.int32(piece.length - 1),
            length_B, cache, sparse,
        )  # fmt: skip
        out.append((piece, jax.tree.map(np.asarray, kept)))
    return out, cache


def with_slash(config: ModelConfig, slash: int) -> SparsePrefill:
    """Every head with VERTICAL columns and `slash` diagonals."""
    heads = [[Budget(VERTICAL, slash)] * config.num_heads] * config.num_layers
    return SparsePrefill(LineBudgets.of(heads), threshold=32_768, last_queries=64)


def density_of(
    config: ModelConfig, plan: list[Piece], probed: list[tuple[Piece, Kept]]
) -> tuple[float, dict[int, float]]:
    """Computed pairs over causal pairs: of the whole plan, and of each probed piece by its first position.

    The computed pairs of a row in the other pieces lie on the line between those of their neighbours.
    """
    heads = config.num_heads * config.num_layers
    a_row = [float(kept.pairs_L.sum(dtype=np.float64)) / heads / piece.length for piece, kept in probed]
    ends = [piece.start + piece.length for piece, _ in probed]
    causal = [piece.start + (piece.length + 1) / 2 for piece in plan]  # of a row, on average
    lengths = [piece.length for piece in plan]
    found = np.interp([piece.start + piece.length for piece in plan], ends, a_row)
    each = {
        piece.start: round(pairs / (piece.start + (piece.length + 1) / 2), 4)
        for pairs, (piece, _) in zip(a_row, probed, strict=True)
    }
    return float(np.minimum(found, causal) @ lengths / (np.array(causal) @ lengths)), each


def separate_bands(kept: Kept) -> int:
    """Median over the heads of the first and last layer: runs of neighbouring tile distances."""
    bands = np.unpackbits(kept.bands_LNM, axis=-1).astype(np.int8)
    starts = (np.diff(bands, axis=-1, prepend=0) == 1).sum(-1)
    return int(np.median(starts))


@functools.partial(jax.jit, static_argnames="capacity")
def computed_keys(columns_NS: jax.Array, bands_NM: jax.Array, i_R: jax.Array, capacity: int) -> jax.Array:
    """bool[R, N, S] of packed columns and bands, straight from the contract of `attend_lines`."""
    columns_NS = jnp.unpackbits(columns_NS, axis=-1, count=capacity).astype(bool)
    bands_NM = jnp.unpackbits(bands_NM, axis=-1).astype(bool)
    apart_RS = i_R[:, None] // BAND - jnp.arange(capacity) // BAND
    in_band_NRS = (bands_NM[:, jnp.maximum(apart_RS, 0)] & (apart_RS > 0)) | (apart_RS == 0)
    return jnp.moveaxis(in_band_NRS, 0, 1) | columns_NS


def worst_error(
    model: Qwen2,
    cache: KVCache,
    probed: list[tuple[Piece, Kept]],
    tokens: int,
    sparse: bool,
) -> float:
    """Largest relative error of attention in the first and last row of the probed pieces, in the first and the last layer.

    Against float32 from what the cache holds: an 8-bit cache is expanded.
    """
    scale = float(model.score_scale(*[jnp.array([tokens])] * 2)[0])
    worst = 0.0
    for piece, kept in probed:
        i_R = np.array([piece.start, piece.start + piece.length - 1])
        for at, layer in enumerate((0, model.config.num_layers - 1)):
            k_LBKSH, v_LBKSH, index = read_layer(cache, jnp.int32(layer), jnp.float32)
            k_KSH, v_KSH = k_LBKSH[index, 0], v_LBKSH[index, 0]
            keep_RNS = None
            if sparse:
                keep_RNS = computed_keys(
                    kept.columns_LNS[at], kept.bands_LNM[at], jnp.asarray(i_R), k_KSH.shape[1]
                )
            want, _ = tools.exact(
                jnp.asarray(kept.q_LRNH[at]),
                i_R,
                k_KSH,
                v_KSH,
                kv_len=tokens,
                rotary=model.rotary,
                scale=scale,
                keep_RNS=keep_RNS,
            )
            worst = max(worst, tools.worst_row_error(jnp.asarray(kept.out_LRNH[at]), want))
    return worst


def decode_seconds(
    prefiller: Prefiller, last_BD: jax.Array, cache: KVCache, tokens_BT: np.ndarray, blocks: int = 4
) -> tuple[float, KVCache]:
    """Median seconds a token of greedy decoding behind the prompt, and the cache."""
    length_B = jnp.array([tokens_BT.shape[1]], jnp.int32)
    settings = [SamplingParams(greedy=True, ignore_eos=True, max_new_tokens=BLOCK * (blocks + 1)).resolve()]
    seen_BV = seen_tokens(jnp.asarray(tokens_BT), length_B, prefiller.config.vocab_size)
    request = Request(
        length_B, length_B * 0 + BLOCK * (blocks + 1), jnp.full((1, 1), -1, jnp.int32),
        SamplingControls.stack(settings), row_keys(settings),
    )  # fmt: skip
    state = first_token(prefiller.logits(last_BD), request, seen_BV)
    times = []
    for _ in range(blocks):
        begin = time.perf_counter()
        tokens_BN, cache, state = decode_block(
            prefiller.graph, prefiller.params, request, cache, state, jnp.int32(BLOCK)
        )
        tokens_BN.block_until_ready()
        times.append((time.perf_counter() - begin) / BLOCK)
    return float(np.median(times[1:])), cache  # the first one compiles


def peak_bytes() -> int:
    """Largest number of bytes in use on a device so far."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0))


def flops(config: ModelConfig, tokens: int, density: float) -> tuple[float, float]:
    """Of the linear layers and of attention over computed pairs."""
    c = config
    width = (
        (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.num_heads * c.head_dim + 3 * c.intermediate_size
    )
    linear = 2.0 * tokens * c.num_layers * c.hidden_size * width
    return linear, 4.0 * density * tokens * (tokens + 1) / 2 * c.num_heads * c.head_dim * c.num_layers


def find_slash(
    prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, wanted: float
) -> tuple[int, KVCache]:
    """The slash budget that gives the wanted density by every sixth piece of the prefilled prompt, and the cache."""
    plan = prefiller.pieces(0, tokens_BT.shape[1], cache.capacity)
    slash = int(wanted * tokens_BT.shape[1] / 2)
    prefiller.sparse = with_slash(prefiller.config, slash)
    _, _, cache = timed_prefill(prefiller, tokens_BT, cache)
    for _ in range(4):
        probed, cache = probe(prefiller, tokens_BT, cache, with_slash(prefiller.config, slash), plan[1::6])
        density, _ = density_of(prefiller.config, plan, probed)
        print(f"  slash budget {slash}: density {density:.4f} by every sixth piece", flush=True)
        if abs(density - wanted) < 0.01 * wanted:
            break
        slash = int(slash * wanted / density)
    return slash, cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers, while developing")
    parser.add_argument("--tokens", type=int, default=1_010_000)
    parser.add_argument("--density", type=float, help="of a sparse run; without it attention is dense")
    parser.add_argument("--slash", type=int, help="slash budget that is known to give the density")
    parser.add_argument("--kv-dtype", choices=sorted(KV_DTYPES), default="bf16")
    parser.add_argument("--trace", action="store_true", help="trace two pieces: seconds by part")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = config_of(args.model, args.layers)
    begin = time.perf_counter()
    model = structured_model(config, farthest=min(200_000, args.tokens // 3))
    kv_dtype = KV_DTYPES[args.kv_dtype]
    if is_8_bit(kv_dtype):
        model = balanced(model)  # as LLM does
    graph, params = nnx.split(model)
    capacity = capacity_for(args.tokens + 5 * BLOCK, config.max_position_embeddings + 5 * BLOCK)
    cache = jax.block_until_ready(init_cache(config, 1, capacity, kv_dtype))
    weights, cached = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, cache))
    print(f"weights and cache made in {time.perf_counter() - begin:.1f} s", flush=True)
    prefiller = Prefiller(graph, params, config, default_chunk(config))
    tokens_BT = np.random.default_rng(0).integers(SINKS, config.vocab_size, (1, args.tokens), dtype=np.int32)
    tokens_BT[0, :SINKS] = range(SINKS)
    plan = prefiller.pieces(0, args.tokens, capacity)

    begin = time.perf_counter()
    if args.density:
        slash = args.slash
        if slash is None:
            slash, cache = find_slash(prefiller, tokens_BT, cache, args.density)
        prefiller.sparse = with_slash(config, slash)
    sparse = prefiller.sparse
    # Every piece of a long prompt runs the same program.
    _, _, cache = timed_prefill(prefiller, tokens_BT, cache, plan[:1])
    print(f"compiled, and budgets found, in {time.perf_counter() - begin:.1f} s", flush=True)
    seconds, last_BD, cache = timed_prefill(prefiller, tokens_BT, cache)
    result: dict[str, Any] = {
        "command": "bench_prefill.py", "model": args.model, "layers": config.num_layers, "tokens": args.tokens,
        "kv_dtype": args.kv_dtype, "seconds": seconds, "weight_bytes": weights, "cache_bytes": cached,
        "peak_beyond_weights_and_cache_bytes": peak_bytes() - weights - cached,
    }  # fmt: skip
    report(args.out, result)
    decode, cache = decode_seconds(prefiller, last_BD, cache, tokens_BT)
    report(args.out, result, decode_ms_a_token=1e3 * decode)

    edges = {*range(0, args.tokens, model.rotary.chunk_len or args.tokens), args.tokens}
    at_edges = [piece for piece in plan if edges & {piece.start, piece.start + piece.length}]
    checked = at_edges if sparse else at_edges[-2:]  # dense pieces take as long again
    probing = sorted({*checked, *plan[1::6]}, key=lambda p: p.start) if sparse else checked
    probed, cache = probe(prefiller, tokens_BT, cache, sparse, probing)
    density, by_piece = density_of(config, plan, probed) if sparse else (1.0, {})
    linear, attention = flops(config, args.tokens, density)
    if sparse:
        result |= {
            "slash": slash,
            "vertical": VERTICAL,
            "separate_bands_a_head": separate_bands(probed[-1][1]),
        }
    report(
        args.out,
        result,
        density=density,
        density_by_piece=by_piece,
        tflops=(linear + attention) / seconds / 1e12,
    )
    error = worst_error(model, cache, [p for p in probed if p[0] in checked], args.tokens, sparse is not None)
    report(args.out, result, worst_row_error=error)
    if args.trace:
        pieces = plan[len(plan) // 2 :: len(plan) // 2 - 1]
        with traced() as parts:
            seconds, _, cache = timed_prefill(prefiller, tokens_BT, cache, pieces)
        starts = [piece.start for piece in pieces]
        report(
            args.out,
            result,
            traced={"starts": starts, "wall": seconds, **parts.seconds},
            longest=parts.longest,
        )
    if not error <= 1e-2:
        raise SystemExit(f"attention is wrong: row error {error}")


def report(out: Path | None, result: dict[str, Any], **more: Any) -> None:
    """Adds to the result, prints what was added, and writes all that is known: a run that is cut short leaves that."""
    result |= more
    print(more or result, flush=True)
    if out:
        results.write(out, result)


if __name__ == "__main__":
    main()
