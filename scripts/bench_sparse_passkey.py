"""Pass key accuracy of the shipped checkpoint with sparse prefill: benchmarks/sparse-passkey.json.

    python scripts/bench_sparse_passkey.py --modes dense first refined bands bands:0.5     # on a GPU

Three steps, each kept in --out as soon as it is done, so that a run that was broken off goes on where it was: the search makes
first budgets on texts of the first length of --budgets, refinement raises them on texts of the second (of other seeds than
the tasks), and every cell asks depths x trials tasks, the same ones in every mode; "right" holds a digit for each. "bands"
chooses by attention per key computed within the refined budgets, "bands:0.5" for half their pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import results

from qwen_jax.build import load
from qwen_jax.evals import batched, demo, demo_folder
from qwen_jax.evals.passkey import grid_tasks, make_task
from qwen_jax.model import Qwen2
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import Budget, LineBudgets
from qwen_jax.sparsity.progress_file import ProgressFile
from qwen_jax.sparsity.refinement import refine
from qwen_jax.sparsity.search import search

LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]  # 2 to 64 times the training length
THRESHOLD = 2048  # all of these are sparse
LAST_QUERIES = 64


def calibration(length: int, count: int) -> list[np.ndarray]:
    """Pass key texts of seeds that no task has."""
    return [
        make_task(np.random.default_rng((99, length, n)), length, (n + 0.5) / count).ids for n in range(count)
    ]


def entries(budgets: list[list[Budget]]) -> list[list[list[float]]]:
    return [[[b.vertical, b.slash, b.score] for b in layer] for layer in budgets]


def budgets_of(raw: list[list[list[float]]]) -> list[list[Budget]]:
    return [[Budget(int(v), int(s), r) for v, s, r in layer] for layer in raw]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--modes", nargs="+", default=["dense", "first", "refined", "bands"])
    parser.add_argument("--budgets", type=int, nargs=2, default=[16384, 130816], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=2, help="calibration texts of each length")
    parser.add_argument("--keys", type=float, default=1024, help="keys a query that first budgets may cost")
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--step", type=int, default=2048, help="smallest raise, lines")
    parser.add_argument("--cap", type=int, default=24576)
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--trials", type=int, default=42, help="tasks at each length and depth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=56, help="tasks that run together")
    parser.add_argument("--dtype", help="of weights and cache; default: the checkpoint's, bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/sparse-passkey.json"))
    args = parser.parse_args()
    settings = {
        name: value for name, value in vars(args).items() if name not in ("out", "lengths", "modes", "batch")
    }
    result: dict[str, Any] = {"cells": {}, "right": {}}
    if args.out.exists():
        result = json.loads(args.out.read_text())
        if result["settings"] != settings:
            raise SystemExit(f"{args.out} was made with other settings: remove it")
    result |= {
        "what": "pass key retrieval with sparse prefill, digits generated greedily; right answers of `asked` at each length",
        "command": "python scripts/bench_sparse_passkey.py",
        "trained_on": demo_folder.DUAL_CHUNK.chunk_size, "prefill_piece": demo.PREFILL_CHUNK, "settings": settings,
        "asked": args.depths * args.trials,
    }  # fmt: skip
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    model = load(demo_folder.DEFAULT, dtype=args.dtype)
    common = {"chunk": demo.PREFILL_CHUNK, "last_queries": LAST_QUERIES}
    if "first" not in result and set(args.modes) - {"dense"}:
        found = search(
            model, calibration(args.budgets[0], args.texts), ProgressFile(args.out.with_suffix(".first"), settings),
            keys=args.keys, **common, on_piece=lambda at, piece: say(f"search, text {at}, from {piece.start}"),
        )  # fmt: skip
        result["first"] = entries(found.budgets)
        results.write(args.out, result)
    if "refined" not in result and set(args.modes) - {"dense", "first"}:

        def round_done(number: int, found: Any) -> None:
            result.setdefault("rounds", []).append(
                {"recall": np.round(found.recall_LN, 4).tolist(), "keys": np.round(found.keys_LN).tolist(),
                 "vertical": found.vertical_LN.tolist(), "slash": found.slash_LN.tolist()}
            )  # fmt: skip
            results.write(args.out, result)
            say(
                f"round {number}: recall {np.round(found.recall_LN, 3).tolist()} keys {found.keys_LN.mean():.0f}"
            )

        result.pop("rounds", None)
        last = refine(
            model, calibration(args.budgets[1], args.texts), budgets_of(result["first"]),
            ProgressFile(args.out.with_suffix(".refined"), settings),
            threshold=args.threshold, cap=args.cap, step=args.step, on_round=round_done, **common,
        )  # fmt: skip
        result["refined"] = entries(last.budgets())
        results.write(args.out, result)
    # Short texts first, and every mode at a length before the next length.
    for length in args.lengths:
        for mode in args.modes:
            right = result["right"].setdefault(mode, {})
            if str(length) not in right:
                right[str(length)] = cell(model, mode, length, result, args)
                count = right[str(length)].count("1")
                result["cells"].setdefault(mode, {})[str(length)] = count
                results.write(args.out, result)
                dense = result["right"].get("dense", {}).get(str(length), right[str(length)])
                lost, gained = (
                    sum(pair == other for pair in zip(dense, right[str(length)], strict=True))
                    for other in (("1", "0"), ("0", "1"))
                )
                say(
                    f"{mode:10s} {length:7d}  {count}/{result['asked']}, against dense {lost} lost, {gained} gained"
                )


def cell(model: Qwen2, mode: str, length: int, result: dict[str, Any], args: argparse.Namespace) -> str:
    """The tasks of one length, a digit each: 1 is a right answer."""
    sparse = None
    if mode != "dense":
        name, _, share = mode.partition(":")
        bands = float(share or 1) if name == "bands" else None
        budgets = budgets_of(result["refined" if bands else name])
        arrays = LineBudgets.of(budgets)
        most = max(args.cap, arrays.most_vertical)  # the same for all modes: they share programs
        arrays = LineBudgets(arrays.vertical_LN, arrays.slash_LN, most)
        sparse = SparsePrefill(arrays, THRESHOLD, LAST_QUERIES, bands)
    answer = batched.answerer(model, max(args.lengths), demo.PREFILL_CHUNK, sparse)
    depths = np.linspace(0, 1, args.depths).tolist()
    tasks = grid_tasks(length, depths, args.trials, args.seed)
    groups = [tasks[n : n + args.batch] for n in range(0, len(tasks), args.batch)]
    answers = [text for group in groups for text in answer(group)]
    return "".join(str(int(task.is_answer(text))) for task, text in zip(tasks, answers, strict=True))


if __name__ == "__main__":
    main()
