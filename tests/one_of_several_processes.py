"""One of several processes that run one model; prints as JSON what it saw. A program of test_processes.py.

Arguments: a checkpoint, the mesh, the coordinator's host:port, how many processes, which this is, and "forever" to go on
for ever.
"""

import json
import sys

import numpy as np

from qwen_jax import LLM, SamplingParams
from qwen_jax.cli import options
from qwen_jax.processes import join

GREEDY = SamplingParams(max_new_tokens=6, greedy=True, ignore_eos=True)
PROMPTS = [np.random.default_rng(0).integers(0, 256, n).tolist() for n in (70, 9)]


def main() -> None:
    folder, mesh, coordinator, processes, process, *forever = sys.argv[1:]
    join(coordinator, int(processes), int(process))
    llm = LLM(folder, mesh=options.mesh(mesh), max_len=256, prefill_chunk=128)
    print(json.dumps(seen(llm)), flush=True)
    while forever:
        llm.score(PROMPTS[0])


def seen(llm: LLM) -> dict[str, object]:
    return {
        "tokens": [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)],
        "scores": llm.score(PROMPTS[0]).tolist(),
    }


if __name__ == "__main__":
    main()
