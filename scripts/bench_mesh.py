"""One device against several: one random model, one prompt, prefill and decode; do the logits agree, how much faster is it.

    python scripts/bench_mesh.py --shape 7b --layers 8 --tokens 131072 --meshes tensor=2 context=2 --out mesh.json

Weights are random normal, so attention spreads over all keys; the times of dense attention do not depend on that.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from results import write

from qwen_jax.build import build
from qwen_jax.cache import init_cache
from qwen_jax.cli import options
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.decode import BLOCK, NO_TOKEN, Request, decode_block, first_token
from qwen_jax.model import Qwen2
from qwen_jax.params import params
from qwen_jax.prefill import Prefiller, default_chunk
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import full_mesh, shardings

_DCA = DualChunk(262_144, 8_192, 262_144)
_SMALL_DCA = DualChunk(640, 128, 512)
SHAPES = {  # hidden, MLP, query heads, KV heads, head width, vocabulary, layers, dual chunk attention
    "7b": (3584, 18_944, 28, 4, 128, 152_064, 28, _DCA),
    "14b": (5120, 13_824, 40, 8, 128, 152_064, 48, _DCA),
    "small": (256, 512, 8, 4, 32, 512, 2, _SMALL_DCA),
}


def config_of(shape: str, layers: int | None, dtype: str) -> ModelConfig:
    D, F, N, K, H, V, L, dca = SHAPES[shape]
    return ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=layers or L, num_heads=N, num_kv_heads=K, head_dim=H,
        rms_norm_eps=1e-5, rope_theta=1e7, max_position_embeddings=1_010_000, tie_embeddings=False, dtype=dtype,
        dual_chunk=dca, eos_token_ids=(0,),
    )  # fmt: skip


def random_model(config: ModelConfig, mesh: Mesh | None) -> Qwen2:
    """The same numbers on any mesh."""
    where = shardings(config, full_mesh(mesh))
    arrays = {}
    for n, p in enumerate(params(config)):
        shape = ((config.num_layers,) if p.stacked else ()) + p.shape(config)

        def draw(shape: tuple[int, ...] = shape, n: int = n, norm: bool = "norm" in p.path) -> jax.Array:
            if norm:
                return jnp.ones(shape, config.dtype)
            return 0.02 * jax.random.normal(jax.random.key(n), shape, jnp.dtype(config.dtype))

        arrays[p.path] = jax.jit(draw, out_shardings=where[p.path])()
    return build(config, arrays)


def run(config: ModelConfig, mesh: Mesh | None, tokens: np.ndarray, repeats: int) -> dict[str, Any]:
    """Seconds, logits of the last token and greedy tokens behind it."""
    model = random_model(config, mesh)
    graph, state = nnx.split(model)
    spread = model.spread
    whole = spread.round if spread else 1
    prefiller = Prefiller(graph, state, config, default_chunk(config, whole))
    rows = spread.rows if spread else 1
    step = max(256, whole)
    capacity = -(-(tokens.size + 2 * BLOCK) // step) * step
    tokens_BT = np.broadcast_to(tokens, (rows, tokens.size))
    length_B = np.full(rows, tokens.size, np.int32)
    setting = [SamplingParams(greedy=True, ignore_eos=True).resolve()] * rows
    request = Request.of(length_B, np.full(rows, 2 * BLOCK), setting, prefiller.where)
    seconds = []
    for _ in range(1 + repeats):  # the first compiles
        cache = init_cache(config, rows, capacity, config.dtype, full_mesh(mesh))
        start = time.perf_counter()
        *_, (_, last_BD, cache) = prefiller.run(tokens_BT, length_B, cache)
        logits = jax.block_until_ready(prefiller.logits(last_BD))
        seconds.append(time.perf_counter() - start)
    decoding = first_token(graph, state, last_BD, tokens_BT, request)
    out = []
    for _ in range(2):
        start = time.perf_counter()
        out_BT, cache, decoding = decode_block(graph, state, request, cache, decoding, np.int32(BLOCK - 1))
        out += np.asarray(out_BT)[0].tolist()
        decode_seconds = time.perf_counter() - start
    return {
        "prefill_seconds": min(seconds[1:]), "compiling_seconds": seconds[0], "token_ms": decode_seconds / (BLOCK - 1) * 1e3,
        "logits": np.asarray(logits)[0], "tokens": [token for token in out if token != NO_TOKEN],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--meshes", nargs="+", default=["tensor=2", "context=2"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = config_of(args.shape, args.layers, args.dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, args.tokens).astype(np.int32)
    results: dict[str, Any] = {}
    one: dict[str, Any] | None = None
    print(f"{'mesh':24} prefill s   speed-up  decode ms  logits off  same tokens", flush=True)
    for text in [None, *args.meshes]:
        try:
            found = run(config, options.mesh(text), tokens, args.repeats)
        except Exception as error:  # the other meshes are still worth their time
            print(f"{text}: {type(error).__name__}: {error!s:.500}", flush=True)
            continue
        one = one or found
        off = np.linalg.norm(found["logits"] - one["logits"]) / np.linalg.norm(one["logits"])
        same = sum(a == b for a, b in zip(found["tokens"], one["tokens"], strict=True))
        results[text or "one"] = {
            key: found[key] for key in ("prefill_seconds", "compiling_seconds", "token_ms")
        } | {"logits_off": float(off), "tokens_equal": same, "tokens": len(one["tokens"])}
        faster = one["prefill_seconds"] / found["prefill_seconds"]
        print(
            f"{text or 'one device':24} {found['prefill_seconds']:8.2f} {faster:9.2f}x "
            f"{found['token_ms']:9.2f} {off:12.2e} {same:6}/{len(one['tokens'])}",
            flush=True,
        )
    if args.out:
        write(args.out, {"config": dataclasses.asdict(config), "tokens": args.tokens, "meshes": results})


if __name__ == "__main__":
    main()
