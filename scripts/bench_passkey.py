"""Pass key accuracy of the shipped checkpoint, digits generated: benchmarks/passkey.json and a picture.

    python scripts/bench_passkey.py --batch 16       # three minutes on an H200
    python scripts/bench_passkey.py --lengths 1024 2048 4096 --trials 2 --out small.json

Every length is asked depths x trials tasks, the same ones in every mode.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import results

from qwen_jax.build import load
from qwen_jax.evals import batched, demo, demo_folder, plot
from qwen_jax.evals.passkey import evaluate

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]  # 0.5 to 32 times the training length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=demo_folder.DEFAULT)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--modes", nargs="+", default=list(demo.MODES), choices=list(demo.MODES))
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--trials", type=int, default=14, help="tasks at each length and depth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="tasks that run together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/passkey.json"))
    parser.add_argument("--plot", type=Path, help="also draw length x depth")
    args = parser.parse_args()

    began = time.monotonic()
    grids = {}
    for mode in args.modes:

        def report(length: int, done: int, right: int, mode: str = mode) -> None:
            if done == args.depths * args.trials:
                seconds = time.monotonic() - began
                print(f"{mode:18s} {length:6d} tokens  {right}/{done}  {seconds:6.1f} s", flush=True)

        model = load(args.folder, dca=demo.MODES[mode])
        grids[mode] = evaluate(
            batched.answerer(model, max(args.lengths), demo.PREFILL_CHUNK),
            args.lengths, np.linspace(0, 1, args.depths).tolist(), args.trials,
            seed=args.seed, batch=args.batch, report=report,
        )  # fmt: skip
    results.write(
        args.out,
        {
            "what": "pass key retrieval, digits generated greedily; right answers, a row a length, a column a depth",
            "seconds": round(time.monotonic() - began, 1),
            "trained_on": demo_folder.DUAL_CHUNK.chunk_size,
            "lengths": args.lengths,
            "depths": np.linspace(0, 1, args.depths).tolist(),
            "trials_a_cell": args.trials,
            "seed": args.seed,
            "correct": {mode: grid.correct.tolist() for mode, grid in grids.items()},
            "accuracy_by_length": {mode: grid.by_length() for mode, grid in grids.items()},
        },
    )
    if args.plot:
        plot.save(grids, args.plot, trained_on=demo_folder.DUAL_CHUNK.chunk_size)


if __name__ == "__main__":
    main()
