"""Prefill of a whole long prompt through the real shapes of Qwen2.5-7B or 14B on the GPUs there are, then decoding behind it.

Weights are drawn at random with heads that look where trained ones do (`structured_model`); a sparse run scales the slash
budget until the density of the whole prompt, computed pairs over causal pairs, is what was asked. Each run is of the whole
prompt, but for `--sample`, which says so, and checks itself: attention rows at the ends of pieces around s, 2s, 3s and the
end, in the first and in the last layer, are recomputed in float32 from the cache. Prints and writes seconds by part, density,
peak memory, decode speed.

    python scripts/bench_prefill.py --model 7b --density 0.1 --out benchmarks/prefill-7b-sparse.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
from jax import lax
from prefill_probe import compile_probe, density_of, probe, row_errors, separate_bands
from structured_model import SINKS, structured_model
from trace_parts import traced

from qwen_jax.balance import balanced
from qwen_jax.cache import KVCache, init_cache, is_8_bit
from qwen_jax.cli import options
from qwen_jax.config import ModelConfig
from qwen_jax.context import capacity_for
from qwen_jax.decode import BLOCK, Decoding, Request, decode_block, decode_program, first_token
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece, Prefiller, default_chunk
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import full_mesh
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import Budget, LineBudgets
from qwen_jax.spread import Spread

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


@functools.partial(jax.jit, donate_argnums=0)
def filled(cache: KVCache) -> KVCache:
    """Random normal keys and values, where not every piece is computed."""

    def layer(n: jax.Array, cache: KVCache) -> KVCache:
        def fill(x: jax.Array) -> jax.Array:
            new = jax.random.normal(jax.random.fold_in(jax.random.key(0), n), (1, *x.shape[1:]), x.dtype)
            return lax.dynamic_update_slice_in_dim(x, new, n, 0)

        return jax.tree.map(fill, cache)

    return lax.fori_loop(0, len(cache.k), layer, cache)


def stretched(plan: list[Piece], sampled: list[Piece], seconds: list[float]) -> list[float]:
    """Seconds of every piece of a dense prefill: a row's are a line over its position, through those of the sampled pieces."""
    middle = [piece.start + piece.length / 2 for piece in sampled]
    line = np.polyfit(middle, [x / piece.length for x, piece in zip(seconds, sampled, strict=True)], 1)
    return [float(np.polyval(line, piece.start + piece.length / 2)) * piece.length for piece in plan]


def decode_start(prefiller: Prefiller, last_BD: jax.Array, tokens_BT: np.ndarray) -> tuple[Request, Decoding]:
    """A request for greedy decoding behind the prompt, and its first token."""
    length_B = np.array([tokens_BT.shape[1]])
    settings = [SamplingParams(greedy=True, ignore_eos=True, max_new_tokens=DECODED).resolve()]
    request = Request.of(length_B, np.array([DECODED]), settings, prefiller.where)
    return request, first_token(prefiller.graph, prefiller.params, last_BD, tokens_BT, request)


def decode_seconds(
    prefiller: Prefiller, last_BD: jax.Array, cache: KVCache, tokens_BT: np.ndarray
) -> tuple[list[float], KVCache]:
    """Seconds a token of every block of greedy decoding behind the prompt, and the cache."""
    request, state = decode_start(prefiller, last_BD, tokens_BT)
    times = []
    for _ in range(DECODED // BLOCK):
        begin = time.perf_counter()
        tokens_BN, cache, state = decode_block(
            prefiller.graph, prefiller.params, request, cache, state, np.int32(BLOCK)
        )
        tokens_BN.block_until_ready()
        times.append((time.perf_counter() - begin) / BLOCK)
    return times, cache


def compile_all(prefillers: dict[str, Prefiller], tokens_BT: np.ndarray, cache: KVCache) -> dict[str, float]:
    """Compiles what the runs need, side by side: seconds until each program was there."""
    begin = time.perf_counter()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache)

    def prefill(prefiller: Prefiller) -> None:
        prefiller.compile(np.array([tokens_BT.shape[1]]), abstract)

    def decode(prefiller: Prefiller) -> None:
        request, state = decode_start(prefiller, prefiller.nothing_yet(1), tokens_BT)
        graph, params = prefiller.graph, prefiller.params
        program = decode_program(params)
        program.lower(graph, params, request, abstract, state, np.int32(BLOCK)).compile()

    def checks(prefiller: Prefiller) -> None:
        plan = prefiller.pieces(0, tokens_BT.shape[1], cache.capacity)
        compile_probe(prefiller, tokens_BT, abstract, plan[0])

    def timed(work: Callable[[Prefiller], None], matmul: str) -> tuple[str, float]:
        work(prefillers[matmul])
        return f"{matmul} {work.__name__}", time.perf_counter() - begin

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(timed, work, m) for work in (prefill, decode, checks) for m in prefillers]
        return dict(job.result() for job in jobs)


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


def first_token_seconds(
    prefiller: Prefiller, tokens_BT: np.ndarray, cache: KVCache, repeats: int
) -> tuple[list[float], KVCache]:
    """Seconds from the prompt on the host to its first token there, `repeats` times, and the cache."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        *_, (_, last_BD, cache) = prefiller.run(tokens_BT, np.array([tokens_BT.shape[1]]), cache)
        _, state = decode_start(prefiller, last_BD, tokens_BT)
        np.asarray(state.token_B)
        times.append(time.perf_counter() - begin)
    return times, cache


@dataclasses.dataclass
class Bench:
    """One way to run one model, called `name`; what it measures goes to `report`, bit by bit."""

    name: str
    args: argparse.Namespace
    model: Qwen2
    prefiller: Prefiller
    tokens_BT: np.ndarray
    report: Callable[..., None]

    def compare_logits(self, logits_V: np.ndarray) -> None:
        """Keeps the last token's logits for other runs of the same prompt, and tells how far those of --against are."""
        if self.args.logits:
            self.args.logits.mkdir(parents=True, exist_ok=True)
            np.save(self.args.logits / f"{self.name}.npy", logits_V)
        if self.args.against:
            other_V = np.load(self.args.against / f"{self.name}.npy")
            self.report(
                logits_off=float(np.linalg.norm(logits_V - other_V) / np.linalg.norm(other_V)),
                same_first_token=bool(logits_V.argmax() == other_V.argmax()),
            )

    def run(self, cache: KVCache, others: int) -> KVCache:
        """Prefill, decoding, trace and checks; gives the cache back. `others`: bytes that other models hold."""
        args, prefiller, config = self.args, self.prefiller, self.prefiller.config
        plan = prefiller.pieces(0, args.tokens, cache.capacity)
        held = {"weight_bytes": held_bytes(prefiller.params), "cache_bytes": held_bytes(cache)}
        cache = timed_prefill(prefiller, self.tokens_BT, cache, plan[:1]).cache  # starts libraries
        only = None
        if args.sample:
            cache, only = filled(cache), plan[-1 :: -(len(plan) // args.sample)][: args.sample]
        seconds, last_BD, cache = timed_prefill(prefiller, self.tokens_BT, cache, only)
        if only is not None:
            self.report(sampled=dict(zip([piece.start for piece in only], seconds, strict=True)))
            seconds = stretched(plan, only, seconds)
        beyond = peak_bytes() - sum(held.values()) - others
        self.report(seconds=sum(seconds), piece_seconds=seconds, peak_beyond_bytes=beyond, **held)
        self.compare_logits(np.asarray(prefiller.logits(last_BD))[0])
        decode, cache = decode_seconds(prefiller, last_BD, cache, self.tokens_BT)
        self.report(decode_ms_a_token=[1e3 * x for x in decode])
        if args.first_token:
            first, cache = first_token_seconds(prefiller, self.tokens_BT, cache, args.first_token)
            self.report(first_token_seconds=first)
        assert config.dual_chunk
        edges = {*range(0, args.tokens, config.dual_chunk.chunk_len), args.tokens}
        checked = [piece for piece in plan if edges & {piece.start, piece.start + piece.length}]
        sparse = prefiller.sparse is not None
        if not sparse:  # dense pieces take as long again
            checked = checked[:2] if args.sample else checked[-2:]
        probed, cache = probe(prefiller, self.tokens_BT, cache, checked)
        density, by_piece = density_of(config, plan, probed) if sparse else (1.0, {})
        if sparse:
            self.report(separate_bands_a_head=separate_bands(probed[-1][1]), density_by_piece=by_piece)
        rate = sum(flops(config, args.tokens, density)) / sum(seconds) / 1e12
        self.report(density=density, tflops=rate)
        errors = row_errors(self.model, cache, probed, args.tokens, sparse)
        worst = max(error for rows in errors.values() for error in rows.values())
        rounded = {
            layer: {at: round(error, 5) for at, error in rows.items()} for layer, rows in errors.items()
        }
        self.report(worst_row_error=worst, row_errors=rounded)
        if args.trace:
            pieces = plan[-1 :: -max(1, len(plan) // args.trace)][: args.trace]
            with traced() as parts:
                found = timed_prefill(prefiller, self.tokens_BT, cache, pieces)
            cache = found.cache
            starts = [piece.start for piece in pieces]
            self.report(
                traced={"starts": starts, "wall": sum(found.seconds), **parts.seconds}, longest=parts.longest
            )
        return cache


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
    parser.add_argument(
        "--matmul", nargs="+", choices=["bf16", "fp8"], default=["bf16"], help="of linear layers, in turn"
    )
    parser.add_argument("--mesh", help="sizes of context and tensor, as in tensor=2; default: one device")
    parser.add_argument("--first-token", type=int, default=0, help="times to measure it, for short prompts")
    parser.add_argument(
        "--sample", type=int, default=0, help="dense: compute only so many pieces, the cache random"
    )
    parser.add_argument("--trace", type=int, default=0, help="pieces to trace: seconds by part")
    parser.add_argument("--logits", type=Path, metavar="FOLDER", help="keep the last token's logits here")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with logits kept there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = config_of(args.model, args.layers)
    begin = time.perf_counter()
    kv_dtype = KV_DTYPES[args.kv_dtype]

    def model_of(matmul: str) -> Qwen2:
        model = structured_model(
            config,
            farthest=min(200_000, args.tokens // 3),
            matmul=None if matmul == "bf16" else matmul,
            mesh=mesh,
        )
        return balanced(model) if is_8_bit(kv_dtype) else model  # as LLM does

    mesh = full_mesh(options.mesh(args.mesh))
    spread = Spread.of(config, mesh)
    whole = spread.round if spread else 1
    chunk = default_chunk(config, whole)
    most = max(args.tokens, config.max_position_embeddings) + DECODED + 1
    capacity = capacity_for(args.tokens + DECODED + 1, most, whole, chunk)
    # Before the weights: it needs the largest stretches of memory.
    cache = jax.block_until_ready(init_cache(config, 1, capacity, kv_dtype, mesh))
    models = {matmul: model_of(matmul) for matmul in args.matmul}
    print(f"weights and cache made in {time.perf_counter() - begin:.1f} s", flush=True)
    tokens_BT = np.random.default_rng(0).integers(SINKS, config.vocab_size, (1, args.tokens), dtype=np.int32)
    tokens_BT[0, :SINKS] = range(SINKS)
    result: dict[str, Any] = {
        "command": "bench_prefill.py", "model": args.model, "layers": config.num_layers, "tokens": args.tokens,
        "kv_dtype": args.kv_dtype, "mesh": args.mesh, "runs": {},
    }  # fmt: skip
    prefillers = {matmul: Prefiller(*nnx.split(model), config, chunk) for matmul, model in models.items()}
    if args.density:
        slash = args.slash
        if slash is None:
            slash, cache = find_slash(prefillers[args.matmul[0]], tokens_BT, cache, args.density)
        for prefiller in prefillers.values():
            prefiller.sparse = with_slash(config, slash)
        result |= {"vertical": VERTICAL, "slash": slash}
    if args.first_token:
        first, cache = first_token_seconds(prefillers[args.matmul[0]], tokens_BT, cache, 1)
        result["first_token_with_compilation_seconds"] = first[0]
    result["compiled_after_seconds"] = compile_all(prefillers, tokens_BT, cache)
    print(result, flush=True)
    wrong = []
    for matmul, prefiller in prefillers.items():
        mine: dict[str, Any] = result["runs"].setdefault(matmul, {})

        def report(mine: dict[str, Any] = mine, matmul: str = matmul, **more: Any) -> None:
            """Prints what was added, and writes all that is known: a run that is cut short leaves that."""
            mine |= more
            print(matmul, more, flush=True)
            if args.out:
                results.write(args.out, result)

        others = sum(held_bytes(p.params) for p in prefillers.values() if p is not prefiller)
        bench = Bench(matmul, args, models[matmul], prefiller, tokens_BT, report)
        cache = bench.run(cache, others)
        if not mine["worst_row_error"] <= 1e-2:
            wrong.append(matmul)
    if wrong:
        raise SystemExit(f"attention is wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
