"""The linear part of a model's layers, by kind of weights and products: prefill in TFLOP/s, decode in GB/s.

    python scripts/bench_linear.py --out benchmarks/linear-nvidia-h200.json    # the 7B's shapes
    python scripts/bench_linear.py --hidden 256 --mlp 512 --layers 2 --rows 256 --heads 4   # anywhere

The scanned blocks of `Qwen2` run with an attention that hands its queries through, so all that remains is norms, products,
rotation of keys, SwiGLU and, for fp8 products, rounding activations. Weights are products of two uniform numbers. Rates
count the products' FLOP and the bytes of the layers' arrays. Compilation includes XLA's choice among programs (autotuning).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import nnx
from jax import lax

from qwen_jax.build import build
from qwen_jax.cache import KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.convert.synthetic import TINY
from qwen_jax.linear import WEIGHT_DTYPES, quantise
from qwen_jax.params import params

Arrays = dict[str, jax.Array]
# by name: (weight_dtype, matmul)
KINDS: dict[str, tuple[str | None, str | None]] = {
    "bfloat16": (None, None),
    "fp8 products": ("fp8", "fp8"),
    "int8 weights": ("int8", None),
    "fp8 weights": ("fp8", None),
}


@functools.partial(jax.jit, static_argnums=0)
def random_arrays(config: ModelConfig) -> Arrays:
    """bfloat16 parameters; everything but the layers' matrices is one."""
    arrays = {}
    for i, p in enumerate(params(config)):
        shape = ((config.num_layers,) if p.stacked else ()) + p.shape(config)
        if p.is_layer_matrix:
            bits = jax.random.bits(jax.random.fold_in(jax.random.key(0), i), shape, jnp.uint32)
            low, high = ((part / 65536).astype(jnp.float32) for part in (bits & 0xFFFF, bits >> 16))
            arrays[p.path] = (0.08 * (low - 0.5) * (high + 0.5)).astype(jnp.bfloat16)
        else:
            arrays[p.path] = jnp.ones(shape, jnp.bfloat16)
    return arrays


@functools.partial(jax.jit, static_argnums=(0, 2))
def rounded(config: ModelConfig, arrays: Arrays, weight_dtype: str) -> Arrays:
    """The arrays with 8-bit matrices."""
    out = dict(arrays)
    for p in params(config):
        if p.is_layer_matrix:
            axes = range(len(p.out_letters), len(p.letters))
            out[p.path], out[p.scale_path] = lax.map(
                functools.partial(quantise, dtype=WEIGHT_DTYPES[weight_dtype], axes=axes), arrays[p.path]
            )
    return out


def runner(config: ModelConfig, arrays: Arrays, matmul: str | None) -> tuple[Callable[..., Any], nnx.State]:
    """(a compiled function of the state and the stream [B, T, D], the state)."""
    graph, state = nnx.split(build(config, arrays, matmul=matmul))

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        return q + 1e-3 * (k.mean() + v.mean()).astype(q.dtype), cache  # keys and values must be made

    @jax.jit
    def run(state: nnx.State, x_BTD: jax.Array) -> jax.Array:
        positions_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        return nnx.merge(graph, state).run_layers(x_BTD, positions_BT, None, attend)[0]

    return run, state


def timed(run: Callable[..., Any], *args: Any, seconds: float = 0.3, rounds: int = 3) -> tuple[float, float]:
    """(seconds a call, the median of rounds; seconds of the first call)."""

    def calls(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            out = run(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count

    first = calls(1)
    count = max(2, int(seconds / calls(1)))
    return statistics.median(calls(count) for _ in range(rounds)), first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--mlp", type=int, default=18_944)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--layers", type=int, default=28, help="of decode; prefill runs at most 4")
    parser.add_argument("--rows", type=int, default=31_744, help="of a prefill piece")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows of a decode step")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    raw = TINY | {
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_attention_heads": args.heads,
        "num_key_value_heads": 4,
    }

    def shape(layers: int) -> ModelConfig:
        return ModelConfig.from_dict(raw | {"num_hidden_layers": layers})

    matrices = sum(int(np.prod(p.shape(shape(1)))) for p in params(shape(1)) if p.is_layer_matrix)
    plain = random_arrays(shape(args.layers))
    steps = [(min(4, args.layers), 1, args.rows)] + [(args.layers, batch, 1) for batch in args.batch]
    exact: dict[tuple[int, ...], np.ndarray] = {}
    rows = []
    for kind in args.kinds:
        weight_dtype, matmul = KINDS[kind]
        held = plain if weight_dtype is None else rounded(shape(args.layers), plain, weight_dtype)
        for layers, batch, length in steps:
            some = {path: x[:layers] if path.startswith("layers") else x for path, x in held.items()}
            run, state = runner(shape(layers), some, matmul)
            x_BTD = jax.random.normal(jax.random.key(1), (batch, length, args.hidden), jnp.bfloat16)
            seconds, first = timed(run, state, x_BTD)
            y = np.asarray(run(state, x_BTD)[0, :256], np.float32)
            reference = exact.setdefault((layers, batch, length), y)
            nbytes = sum(x.nbytes for path, x in some.items() if path.startswith("layers"))
            row = {
                "kind": kind,
                "rows": batch * length,
                "layers": layers,
                "milliseconds_a_layer": round(seconds * 1e3 / layers, 4),
                "tflops": round(2 * batch * length * matrices * layers / seconds / 1e12, 1),
                "weights_gb_a_second": round(nbytes / seconds / 1e9),
                "error": float(np.sqrt(((y - reference) ** 2).mean()) / reference.std()),
                "first_call_seconds": round(first, 2),
            }
            rows.append(row)
            print(row, flush=True)
    if args.out:
        results.write(
            args.out, {"what": "the layers without attention; error against the first kind", "rows": rows}
        )


if __name__ == "__main__":
    main()
