"""Prefill of a whole long prompt through the real shapes of Qwen2.5-7B or 14B on the GPUs there are, then decoding behind it.

Weights are drawn at random with heads that look where trained ones do (`structured_model`); a sparse run scales the slash
budget until the density of the whole prompt, computed pairs over causal pairs, is what was asked. Each run is of the whole
prompt and checks itself: attention rows at the ends of pieces around s, 2s, 3s and the end, in the first and in the last
layer, are recomputed in float32 from the cache. Prints and writes seconds by part, density, peak memory, decode speed.

    python scripts/bench_prefill.py --model 7b --density 0.1 --out benchmarks/prefill-7b-sparse.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import nnx
from prefill_probe import compile_probe, density_of, probe, separate_bands, worst_error
from structured_model import SINKS, structured_model
from trace_parts import traced

from qwen_jax.balance import balanced
from qwen_jax.cache import KVCache, init_cache, is_8_bit
from qwen_jax.cli import options
from qwen_jax.config import ModelConfig
from qwen_jax.context import capacity_for
from qwen_jax.decode import BLOCK, Decoding, Request, decode_block, first_token
from qwen_jax.prefill import Piece, Prefiller, default_chunk
from qwen_jax.sampling import SamplingControls, SamplingParams, row_keys, seen_tokens
from qwen_jax.sharding import mesh_of
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import Budget, LineBudgets

SHAPES = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4},
    "14b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8},
}  # fmt: skip
KV_DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
DECODED = 4 * BLOCK  # tokens behind the prompt
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


class Timed(NamedTuple):
    """A prefill: seconds of each piece, the first with what starts the rest; last hidden state; the cache."""

    seconds: list[float]
    last_BD: jax.Array
    cache: KVCache


def timed_prefill(
    prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, only: list[Piece] | None = None
) -> Timed:
    """`Prefiller.run`, as `LLM` runs it, of the whole prompt or of some pieces; the device is never left idle."""
    T = tokens_BT.shape[1]
    spans = [(0, T)] if only is None else [(piece.start, piece.start + piece.length) for piece in only]
    jax.block_until_ready(cache)
    ends = [time.perf_counter()]
    queued: jax.Array | None = None
    for start, end in spans:
        for _, last_BD, newest in prefiller.run(tokens_BT[:, start:end], np.array([T]), cache, start):
            cache = newest
            if queued is not None:
                queued.block_until_ready()
                ends.append(time.perf_counter())
            queued = last_BD
    last_BD.block_until_ready()
    ends.append(time.perf_counter())
    return Timed(np.diff(ends).tolist(), last_BD, cache)


def with_slash(config: ModelConfig, slash: int) -> SparsePrefill:
    """Every head with VERTICAL columns and `slash` diagonals."""
    heads = [[Budget(VERTICAL, slash)] * config.num_heads] * config.num_layers
    return SparsePrefill(LineBudgets.of(heads), threshold=32_768, last_queries=64)


def decode_start(prefiller: Prefiller, last_BD: jax.Array, tokens_BT: np.ndarray) -> tuple[Request, Decoding]:
    """A request for greedy decoding behind the prompt, and its first token."""
    length_B = jnp.array([tokens_BT.shape[1]], jnp.int32)
    settings = [SamplingParams(greedy=True, ignore_eos=True, max_new_tokens=DECODED).resolve()]
    seen_BV = seen_tokens(jnp.asarray(tokens_BT), length_B, prefiller.config.vocab_size)
    request = Request(
        length_B, length_B * 0 + DECODED, jnp.full((1, 1), -1, jnp.int32),
        SamplingControls.stack(settings), row_keys(settings),
    )  # fmt: skip
    return request, first_token(prefiller.logits(last_BD), request, seen_BV)


def decode_seconds(
    prefiller: Prefiller, last_BD: jax.Array, cache: KVCache, tokens_BT: np.ndarray
) -> tuple[list[float], KVCache]:
    """Seconds a token of every block of greedy decoding behind the prompt, and the cache."""
    request, state = decode_start(prefiller, last_BD, tokens_BT)
    times = []
    for _ in range(DECODED // BLOCK):
        begin = time.perf_counter()
        tokens_BN, cache, state = decode_block(
            prefiller.graph, prefiller.params, request, cache, state, jnp.int32(BLOCK)
        )
        tokens_BN.block_until_ready()
        times.append((time.perf_counter() - begin) / BLOCK)
    return times, cache


def compile_all(
    prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache
) -> tuple[dict[str, float], KVCache]:
    """Compiles what the run needs, side by side: (seconds until each was there, the cache with the first piece)."""
    begin = time.perf_counter()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache)
    plan = prefiller.pieces(0, tokens_BT.shape[1], cache.capacity)
    blank_BD = jnp.zeros((1, prefiller.config.hidden_size), prefiller.dtype)

    def prefill() -> None:
        prefiller.compile(np.array([tokens_BT.shape[1]]), abstract)

    def decode() -> None:
        request, state = decode_start(prefiller, blank_BD, tokens_BT)
        decode_block.lower(
            prefiller.graph, prefiller.params, request, abstract, state, jnp.int32(BLOCK)
        ).compile()

    def checks() -> None:
        compile_probe(prefiller, tokens_BT, abstract, plan[0])

    seconds: dict[str, float] = {}

    def timed(work: Callable[[], None]) -> None:
        work()
        seconds[work.__name__] = time.perf_counter() - begin

    with ThreadPoolExecutor() as pool:
        list(pool.map(timed, (prefill, decode, checks)))
    cache = timed_prefill(prefiller, tokens_BT, cache, plan[:1]).cache
    return seconds | {"first piece": time.perf_counter() - begin}, cache


def held_bytes(tree: Any) -> int:
    """Bytes that one device holds of the arrays of a pytree."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def peak_bytes() -> int:
    """Largest number of bytes in use on a device so far."""
    return max(int((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) for device in jax.devices())


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
    cache = timed_prefill(prefiller, tokens_BT, cache).cache
    for _ in range(4):
        prefiller.sparse = with_slash(prefiller.config, slash)
        probed, cache = probe(prefiller, tokens_BT, cache, plan[1::6])
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
    parser.add_argument("--matmul", choices=["fp8"], help="products of the linear layers")
    parser.add_argument("--mesh", help="sizes of context and tensor, as in tensor=2; default: one device")
    parser.add_argument("--trace", type=int, default=0, help="pieces to trace: seconds by part")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = config_of(args.model, args.layers)
    begin = time.perf_counter()
    farthest = min(200_000, args.tokens // 3)
    model = structured_model(config, farthest=farthest, matmul=args.matmul, mesh=options.mesh(args.mesh))
    kv_dtype = KV_DTYPES[args.kv_dtype]
    if is_8_bit(kv_dtype):
        model = balanced(model)  # as LLM does
    graph, params = nnx.split(model)
    whole = model.spread.round if model.spread else 1
    chunk = default_chunk(config, whole)
    most = max(args.tokens, config.max_position_embeddings) + DECODED + 1
    capacity = capacity_for(args.tokens + DECODED + 1, most, whole, chunk)
    mesh = mesh_of(model.embed.weight[...])
    cache = jax.block_until_ready(init_cache(config, 1, capacity, kv_dtype, mesh))
    weights, cached = held_bytes(params), held_bytes(cache)
    print(f"weights and cache made in {time.perf_counter() - begin:.1f} s", flush=True)
    prefiller = Prefiller(graph, params, config, chunk)
    tokens_BT = np.random.default_rng(0).integers(SINKS, config.vocab_size, (1, args.tokens), dtype=np.int32)
    tokens_BT[0, :SINKS] = range(SINKS)
    plan = prefiller.pieces(0, args.tokens, capacity)
    result: dict[str, Any] = {
        "command": "bench_prefill.py", "model": args.model, "layers": config.num_layers, "tokens": args.tokens,
        "kv_dtype": args.kv_dtype, "matmul": args.matmul, "mesh": args.mesh, "weight_bytes": weights, "cache_bytes": cached,
    }  # fmt: skip
    if args.density:
        slash = args.slash
        if slash is None:
            slash, cache = find_slash(prefiller, tokens_BT, cache, args.density)
        prefiller.sparse = with_slash(config, slash)
        result |= {"vertical": VERTICAL, "slash": slash}
    sparse = prefiller.sparse
    compiled, cache = compile_all(prefiller, tokens_BT, cache)
    report(args.out, result, compiled_after_seconds=compiled)

    seconds, last_BD, cache = timed_prefill(prefiller, tokens_BT, cache)
    peak = peak_bytes() - weights - cached
    report(
        args.out,
        result,
        seconds=sum(seconds),
        piece_seconds=seconds,
        peak_beyond_weights_and_cache_bytes=peak,
    )
    decode, cache = decode_seconds(prefiller, last_BD, cache, tokens_BT)
    report(args.out, result, decode_ms_a_token=[1e3 * x for x in decode])

    if args.trace:
        pieces = plan[-1 :: -max(1, len(plan) // args.trace)][: args.trace]
        with traced() as parts:
            found = timed_prefill(prefiller, tokens_BT, cache, pieces)
        cache = found.cache
        traces = {"starts": [piece.start for piece in pieces], "wall": sum(found.seconds), **parts.seconds}
        report(args.out, result, traced=traces, longest=parts.longest)

    edges = {*range(0, args.tokens, model.rotary.chunk_len or args.tokens), args.tokens}
    checked = [piece for piece in plan if edges & {piece.start, piece.start + piece.length}]
    if sparse is None:
        checked = checked[-2:]  # dense pieces take as long again
    probed, cache = probe(prefiller, tokens_BT, cache, checked)
    density, by_piece = density_of(config, plan, probed) if sparse else (1.0, {})
    if sparse:
        result |= {"separate_bands_a_head": separate_bands(probed[-1][1])}
    rate = sum(flops(config, args.tokens, density)) / sum(seconds) / 1e12
    report(args.out, result, density=density, density_by_piece=by_piece, tflops=rate)
    error = worst_error(model, cache, probed, args.tokens, sparse is not None)
    report(args.out, result, worst_row_error=error)
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
