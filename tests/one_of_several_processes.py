"""One of several processes that run one model; prints as JSON what it saw. A program of test_processes.py.

Arguments: a checkpoint, the mesh, the coordinator's host:port, how many processes, which this is, "tokens" to leave out the
scores, which take a program more, and "forever" to go on for ever.
"""

import json
import sys

import numpy as np

from qwen_jax import LLM, SamplingParams
from qwen_jax.cli import options
from qwen_jax.processes import join

GREEDY = SamplingParams(max_new_tokens=6, greedy=True, ignore_eos=True)
PROMPT = np.random.default_rng(0).integers(0, 256, 70).tolist()


def main() -> None:
    folder, mesh, coordinator, processes, process, *wishes = sys.argv[1:]
    join(coordinator, int(processes), int(process))
    llm = LLM(folder, mesh=options.mesh(mesh), max_len=1024, prefill_chunk=1024)
    print(json.dumps(seen(llm, scores="tokens" not in wishes)), flush=True)
    while "forever" in wishes:
        seen(llm, scores=False)


def seen(llm: LLM, *, scores: bool = True) -> dict[str, list]:
    tokens = llm.generate(PROMPT, GREEDY).token_ids
    return {"tokens": tokens} | ({"scores": llm.score(PROMPT).tolist()} if scores else {})


if __name__ == "__main__":
    main()
