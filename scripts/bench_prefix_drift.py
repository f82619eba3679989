"""How far an answer about a cached prefix drifts from a fresh prefill of the whole, beyond original_max_position_embeddings.

A prefix of P tokens is prefilled under m(P); the rest of the text follows under m(L). The log-probability of each token of the
rest is compared with that of one prefill of all L tokens under m(L). Texts are the demo's pass key tasks with their answers.

    python scripts/bench_prefix_drift.py            # writes benchmarks/prefix_drift.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import results
from flax import nnx

from qwen_jax.build import load
from qwen_jax.cache import init_cache
from qwen_jax.context import capacity_for
from qwen_jax.evals import demo_folder
from qwen_jax.evals.passkey import make_task
from qwen_jax.prefill import Prefiller, default_chunk

# (prefix, whole) in tokens; training length and L0 are 2,048.
CASES = [(1024, 2040), (8128, 8192), (4096, 8192), (2048, 8192), (2048, 16_384)]


def logprobs(prefiller: Prefiller, ids: np.ndarray, prefix: int, prefilled: int) -> np.ndarray:
    """Log-probabilities of the tokens after position `prefix`, the first `prefilled` tokens prefilled on their own."""
    cache = init_cache(prefiller.config, 1, capacity_for(len(ids), len(ids)), jnp.float32)
    if prefilled:
        *_, (_, _, cache) = prefiller.run(ids[None, :prefilled], np.array([prefilled]), cache)
    return prefiller.score(ids, cache, start=prefilled)[prefix - prefilled :].astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/prefix_drift.json"))
    args = parser.parse_args()
    model = load(demo_folder.DEFAULT, dtype=jnp.float32)
    prefiller = Prefiller(*nnx.split(model), model.config, default_chunk(model.config))
    rows = []
    for prefix, whole in CASES:
        drift, answers = [], []
        for seed in range(args.texts):
            task = make_task(np.random.default_rng(seed), whole, 0.4)
            answer = [ord(digit) for digit in task.asked.digits]
            ids = np.asarray([*task.ids, *answer], np.int32)
            reused, fresh = (logprobs(prefiller, ids, prefix, prefilled) for prefilled in (prefix, 0))
            drift.append(np.abs(reused - fresh))
            answers.append((fresh[-len(answer) :].sum(), reused[-len(answer) :].sum()))
        fresh_answer, reused_answer = np.mean(answers, axis=0)
        rows.append(
            {
                "prefix": prefix,
                "whole": whole,
                "mean_abs_difference_nats_a_token": float(np.mean([d.mean() for d in drift])),
                "max_abs_difference_nats": float(max(d.max() for d in drift)),
                "answer_logprob_fresh": float(fresh_answer),
                "answer_logprob_reused": float(reused_answer),
            }
        )
        print(rows[-1])
    results.write(args.out, {"texts": args.texts, "rows": rows})


if __name__ == "__main__":
    main()
