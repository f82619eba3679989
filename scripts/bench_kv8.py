"""What 8-bit caches do to the shipped checkpoint: pass keys found, and how far log-probabilities move; benchmarks/kv8.json.

    python scripts/bench_kv8.py --batch 16       # one minute on an H200
    python scripts/bench_kv8.py --lengths 4096 --trials 1 --score-tokens 4096 --out small.json

Every cache is asked the same depths x trials tasks at each length, and scores the same texts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import results

from qwen_jax import LLM
from qwen_jax.build import load
from qwen_jax.evals import batched, demo, demo_folder
from qwen_jax.evals.passkey import evaluate, grid_tasks

CACHES = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=demo_folder.DEFAULT)
    parser.add_argument(
        "--caches", nargs="+", default=list(CACHES), choices=list(CACHES), help="asked for pass keys"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768], metavar="TOKENS")
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--trials", type=int, default=14, help="tasks at each length and depth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="tasks that run together")
    parser.add_argument("--score-tokens", type=int, default=32_768, help="tokens of each scored text")
    parser.add_argument("--score-texts", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kv8.json"))
    args = parser.parse_args()

    began = time.monotonic()
    depths = np.linspace(0, 1, args.depths).tolist()
    texts = [task.ids for task in grid_tasks(args.score_tokens, [0.5], args.score_texts, args.seed + 1)]
    model = load(args.folder)
    found: dict[str, Any] = {name: {} for name in args.caches}
    for name in args.caches:
        grid = evaluate(
            batched.answerer(model, max(args.lengths), demo.PREFILL_CHUNK, kv_dtype=CACHES[name]),
            args.lengths, depths, args.trials, seed=args.seed, batch=args.batch,
        )  # fmt: skip
        found[name] = {"correct": grid.correct.tolist(), "accuracy_by_length": grid.by_length()}
        print(name, grid.by_length(), f"{time.monotonic() - began:.1f} s", flush=True)
        write(args, depths, found, time.monotonic() - began)
    exact = None
    for name in CACHES if args.score_texts else ():
        llm = LLM(model, max_len=args.score_tokens, prefill_chunk=demo.PREFILL_CHUNK, kv_dtype=CACHES[name])
        scores = np.stack([llm.score(text) for text in texts])
        exact = scores if exact is None else exact
        moved = scores - exact
        drift = {
            "nats_a_token": float(-scores.mean()),
            "drift_nats_a_token": float(-moved.mean()),
            "mean_absolute_drift": float(np.abs(moved).mean()),
            "largest_absolute_drift": float(np.abs(moved).max()),
        }
        found[name] = found.get(name, {}) | drift
        print(name, drift, f"{time.monotonic() - began:.1f} s", flush=True)
        write(args, depths, found, time.monotonic() - began)


def write(args: argparse.Namespace, depths: list[float], found: dict[str, Any], seconds: float) -> None:
    """The result so far."""
    results.write(
        args.out,
        {
            "what": "the shipped checkpoint with bf16, int8 and fp8 caches: log-probabilities of the same texts against "
            "the bf16 cache's, and pass key retrieval, right answers, a row a length, a column a depth",
            "seconds": round(seconds, 1),
            "score_texts": args.score_texts,
            "score_tokens": args.score_tokens,
            "lengths": args.lengths,
            "depths": depths,
            "trials_a_cell": args.trials,
            "seed": args.seed,
            "caches": found,
        },
    )


if __name__ == "__main__":
    main()
