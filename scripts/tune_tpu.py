"""Picks the sizes of the TPU prefill kernel by the compiler's schedule and writes them where the kernel looks them up.

    JAX_PLATFORMS=cpu uv run --group aot python -m scripts.tune_tpu [--write] [v5e v5p v6e tpu7x]

No TPU is needed and none has confirmed a choice. A size's cost is bundles, of a piece of CHUNK tokens after KEYS keys, for
every useful 1024 x 1024 scores: loop bodies as often as they run, everything else once a query tile; keys behind a query and
rows of padding are waste.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from qwen_jax.kernels.attention.tpu import Tiling
from scripts import tpu_schedule, tpu_topology

CHUNK = 31_744
KEYS = 253_952  # a chunk of dual chunk attention
# Query tiles of 512 rows are left out: they read the keys twice as often, which bundles do not show.
CANDIDATES = [
    Tiling(block_q, block_kv, block_compute)
    for block_q, block_kv, block_compute in (
        (1024, 1024, 512), (1024, 2048, 512), (1024, 2048, 1024), (1024, 4096, 1024), (2048, 1024, 512), (2048, 2048, 1024),
    )
]  # fmt: skip
_TUNED = Path(__file__).parent.parent / "kernels" / "attention" / "tuned"


def cost(schedule: tpu_schedule.Schedule, tiling: Tiling) -> float:
    """Bundles for 1024 x 1024 useful scores.

    Raises:
        ValueError: the schedule has no two loop bodies of this size.
    """
    bodies = schedule.bodies(tiling.block_q * tiling.block_kv // 1024)
    plain, masked = sorted(body.bundles for body in bodies)[:2]
    rest = schedule.whole.bundles - plain - masked
    total = 0
    for first in range(KEYS, KEYS + CHUNK, tiling.block_q):
        # As `attention.mosaic_tpu` counts them; the last key tile is no step of the loop.
        walked = -(-(first + tiling.block_q) // tiling.block_kv)
        whole = (first + 1) // tiling.block_kv
        total += (whole - 1) * plain + (walked - whole) * masked + rest
    return total / (CHUNK * (KEYS + CHUNK / 2) / 2**20)


def tune(generation: str, head_dim: int) -> dict[str, object]:
    """The entry to write: the cheapest candidate that compiles."""
    costs = {}
    for tiling in CANDIDATES:
        sizes = f"{generation}, head {head_dim}, {tiling.block_q} x {tiling.block_kv}, {tiling.block_compute}"
        try:
            costs[tiling] = cost(tpu_schedule.prefill_schedule(generation, tiling, head_dim), tiling)
            print(f"{sizes}: {costs[tiling]:.0f}", flush=True)
        except Exception as error:  # too large for VMEM, as a rule
            print(f"{sizes}: {str(error).splitlines()[0][:160]}", flush=True)
    best = min(costs, key=lambda tiling: costs[tiling])
    return {
        "head_dim": head_dim,
        "tuned_on": f"{CHUNK} tokens after {KEYS} keys, by schedule",
        "bundles": round(costs[best]),
        "tiling": dataclasses.asdict(best),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generations", nargs="*", default=list(tpu_topology.SMALLEST))
    parser.add_argument("--write", action="store_true", help="write the choice under kernels/attention/tuned")
    chosen = parser.parse_args()
    if reason := tpu_topology.why_no_compiler():
        raise SystemExit(reason)
    tpu_schedule.dump_schedules()
    for generation in chosen.generations:
        found = {"prefill": [tune(generation, head_dim) for head_dim in (128, 64)]}
        print(json.dumps(found))
        if chosen.write:
            (_TUNED / f"tpu_{generation}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
