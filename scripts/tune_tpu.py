"""Chooses the block sizes of the TPU prefill kernel by the compiler's schedule, and writes them to kernels/attention/tuned/.

    uv run --group aot python -m scripts.tune_tpu [v5e v5p v6e tpu7x]

The choice is the fewest bundles for 32,768 causal tokens: plain tiles, masked tiles and what every query tile pays once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from qwen_jax.kernels.attention.tpu import Tiling
from scripts import tpu_schedule, tpu_topology

_CANDIDATES = (
    Tiling(1024, 1024, 512),
    Tiling(1024, 2048, 1024),
    Tiling(512, 1024, 512),
)
_TOKENS = 32_768
_TUNED = Path(__file__).parent.parent / "kernels" / "attention" / "tuned"


def causal_bundles(schedule: tpu_schedule.Schedule, tiling: Tiling) -> int:
    """Bundles of one head over _TOKENS causal tokens, as the kernel walks them."""
    plain, masked = (b.bundles for b in schedule.bodies(tiling.block_q * tiling.block_kv // 1024)[:2])
    once = schedule.whole.bundles - plain - masked  # holds the last tile of every walk
    total = 0
    for first in range(0, _TOKENS, tiling.block_q):
        tiles = -(-(first + tiling.block_q) // tiling.block_kv)
        unmasked = min(max((first + 1) // tiling.block_kv - 1, 0), tiles - 1)
        total += once + unmasked * plain + (tiles - 1 - unmasked) * masked
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generations", nargs="*", default=list(tpu_topology.SMALLEST))
    if reason := tpu_topology.why_no_compiler():
        raise SystemExit(reason)
    tpu_schedule.dump_schedules()
    for generation in parser.parse_args().generations:
        entries = []
        for head_dim in (128, 64):
            costs = {}
            for tiling in _CANDIDATES:
                costs[tiling] = causal_bundles(
                    tpu_schedule.prefill_schedule(generation, tiling, head_dim), tiling
                )
                print(generation, head_dim, dataclasses.astuple(tiling), costs[tiling], flush=True)
            best = min(costs, key=lambda tiling: costs[tiling])
            entries.append(
                {"head_dim": head_dim, "causal_32k_bundles": costs[best], "tiling": dataclasses.asdict(best)}
            )
        rows = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        (_TUNED / f"tpu_{generation}.json").write_text(f'{{\n "prefill": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
