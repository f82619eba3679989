"""What 8-bit weights and fp8 products cost in accuracy: log-probabilities and pass keys of the shipped checkpoint.

    python scripts/bench_w8.py --batch 16                                  # on a GPU; writes benchmarks/w8.json
    python scripts/bench_w8.py --lengths 4096 --trials 1 --out small.json  # on a CPU

Drift: each next token's log-probability against that of the unrounded model in the same dtype, over pass key texts with their
answers; the mean difference is the change of the loss. Pass keys: depths x trials tasks a length, digits generated greedily,
the same tasks for every kind of weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import results
from flax import nnx

from qwen_jax.build import load
from qwen_jax.cache import init_cache
from qwen_jax.context import capacity_for
from qwen_jax.evals import batched, demo, demo_folder
from qwen_jax.evals.passkey import evaluate, make_task
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Prefiller

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "fp8 products": {"matmul": "fp8"},
    "int8 weights": {"weight_dtype": "int8"},
    "fp8 weights": {"weight_dtype": "fp8"},
}


def texts(length: int, count: int) -> list[np.ndarray]:
    """Pass key texts and their answers, int32[length + digits]."""
    tasks = [make_task(np.random.default_rng((7, seed)), length, 0.4) for seed in range(count)]
    return [np.asarray([*t.ids, *map(ord, t.asked.digits)], np.int32) for t in tasks]


def scores(model: Qwen2, rows: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities of every next token, float64[texts, T - 1]."""
    prefiller = Prefiller(*nnx.split(model), model.config, demo.PREFILL_CHUNK)
    out = []
    for ids in rows:
        cache = init_cache(model.config, 1, capacity_for(len(ids), len(ids)), prefiller.dtype)
        out.append(prefiller.score(ids, cache))
    return np.stack(out).astype(np.float64)


def drift(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far log-probabilities moved, in nats a token; the answer is the last digits."""
    moved = found - reference
    return {
        "mean_abs_nats_a_token": float(np.abs(moved).mean()),
        "mean_nats_a_token": float(moved.mean()),
        "max_abs_nats": float(np.abs(moved).max()),
        "loss": float(-found.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32_768], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--trials", type=int, default=14, help="tasks at each length and depth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="tasks that run together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/w8.json"))
    args = parser.parse_args()

    began = time.monotonic()
    rows: dict[str, Any] = {name: {"drift": {}, "pass_keys": {}} for name in KINDS}
    asked = args.depths * args.trials
    reference: dict[int, np.ndarray] = {}
    for name, settings in KINDS.items():
        model = load(demo_folder.DEFAULT, dtype=jnp.bfloat16, **settings)
        for length in args.lengths:
            found = scores(model, texts(length, args.texts))
            rows[name]["drift"][length] = drift(found, reference.setdefault(length, found))
            print(f"{name:13s} {length:6d} {rows[name]['drift'][length]}", flush=True)
        answer = batched.answerer(model, max(args.lengths), demo.PREFILL_CHUNK)
        depths = np.linspace(0, 1, args.depths).tolist()
        for length in args.lengths:
            grid = evaluate(answer, [length], depths, args.trials, seed=args.seed, batch=args.batch)
            rows[name]["pass_keys"][length] = int(grid.correct.sum())
            seconds = time.monotonic() - began
            print(f"{name:13s} {length:6d} {grid.correct.sum()}/{asked}  {seconds:.0f} s", flush=True)
    results.write(
        args.out,
        {
            "what": "the shipped checkpoint with 8-bit weights and fp8 products; drift against bfloat16 over the same texts",
            "lengths": args.lengths,
            "texts": args.texts,
            "pass_keys_asked_a_length": asked,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
