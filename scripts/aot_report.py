"""Compiles the whole programs of the 1M models for TPUs that are not there, and writes what they take to docs/aot.md.

    JAX_PLATFORMS=cpu uv run --group aot python -m scripts.aot_report [--model 7B] [--topology v5p:2x2x1] [--program decode]

A prefill chunk of 31,744 tokens (or what the mesh allows), dense and sparse, and a decode step, at 1,010,000 tokens in
bfloat16, on the mesh that `qwen-jax plan` takes. "plan" is what it says the prefill needs. Every program's row is written when
it is there, in the place of the one that was; rows of programs that are not compiled again stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax import prefill
from qwen_jax.cache import KVCache, abstract_cache, cache_shardings
from qwen_jax.config import ModelConfig
from qwen_jax.context import capacity_for
from qwen_jax.kernels.line_scores.api import LAST_QUERIES
from qwen_jax.model import Qwen2
from qwen_jax.plan import plan
from qwen_jax.sharding import full_mesh, shardings
from qwen_jax.sparsity.attention import ALL_SPARSE, SparsePrefill
from qwen_jax.sparsity.budgets import LineBudgets
from qwen_jax.spread import Spread
from scripts import tpu_topology
from tests.released_configs import old_form

CONTEXT = 1_010_000
COLUMNS = 4096
MODELS = {"0.5B": "Qwen2.5-0.5B", "7B": "Qwen2.5-7B-Instruct-1M", "14B": "Qwen2.5-14B-Instruct-1M"}
REPORTED = ("7B", "14B")
TOPOLOGIES = ("v5p:2x2x1", "v5p:4x4x4", "v6e:4x4", "tpu7x:2x2x1")
PROGRAMS = ("prefill", "sparse prefill", "decode")
_TABLE = Path(__file__).parent.parent / "docs" / "aot.md"
_COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SIZES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and the seconds that took."""

    compiled: Any
    seconds: float

    @property
    def arguments(self) -> int:
        """Bytes on a device."""
        return self.compiled.memory_analysis().argument_size_in_bytes

    @property
    def temporaries(self) -> int:
        """Bytes on a device."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def total(self) -> int:
        """Bytes on a device; results that take an argument's place count once."""
        m = self.compiled.memory_analysis()
        return self.arguments + self.temporaries + m.output_size_in_bytes - m.alias_size_in_bytes

    @functools.cached_property
    def text(self) -> str:
        """The program as the compiler left it."""
        return self.compiled.as_text()

    @property
    def kernels(self) -> int:
        """Pallas kernels in the program; the layers' once."""
        return self.text.count('custom_call_target="tpu_custom_call"')

    def collectives(self) -> tuple[Counter[str], int]:
        """How often each stands in the program, the layers' once, and the bytes of their results on a device."""
        counts: Counter[str] = Counter()
        size = 0
        for shapes, kind in _COLLECTIVE.findall(self.text):
            counts[kind] += 1
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
                size += math.prod(int(dim) for dim in dims.split(",") if dim) * _SIZES.get(dtype, 4)
        return counts, size


class Job:
    """One model on one topology, at `context` tokens in bfloat16.

    Attributes:
        plan: what the planner says of it, its mesh included.
        axes: that mesh in words.
        chunk: tokens of a prefill chunk.
    """

    def __init__(self, name: str, topology: str, context: int = CONTEXT):
        self.config = ModelConfig.from_dict(old_form(MODELS[name]))
        self.plan = plan(self.config, context, topology, weight_dtype="bfloat16")
        self.axes = ",".join(f"{axis}={size}" for axis, size in self.plan.mesh.items() if size > 1)
        self.mesh = full_mesh(tpu_topology.mesh(topology, **self.plan.mesh))
        model = nnx.eval_shape(lambda: Qwen2(self.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        model.spread = Spread.of(self.config, self.mesh)
        self.graph, params = nnx.split(model)
        where = shardings(self.config, self.mesh)
        self.params = nnx.from_flat_state(
            [
                (path, leaf.replace(_struct(leaf, where[".".join(map(str, path))])))
                for path, leaf in nnx.to_flat_state(params)
            ]
        )
        multiple = model.spread.round if model.spread else 1
        self.chunk = prefill.default_chunk(self.config, multiple)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # a TPU's keys are of another dtype
            cache = abstract_cache(self.config, 1, capacity_for(context, context, multiple), jnp.bfloat16)
        self.cache = jax.tree.map(_struct, cache, cache_shardings(self.mesh, jnp.bfloat16))

    def prefill_chunk(self, *, sparse: bool = False) -> Program:
        """A whole chunk; sparse: all prompts are, with at most COLUMNS columns a head."""
        last = jax.ShapeDtypeStruct((1, self.config.hidden_size), jnp.bfloat16, sharding=self._everywhere)
        i, chosen = self._integers, self._sparse() if sparse else None
        return self._compile(
            prefill._prefill_piece, self.graph, self.params, i(1, self.chunk), i(), i(1), self.cache, last, chosen, i()
        )  # fmt: skip

    def decode_step(self) -> Program:
        """One token of one row."""

        def step(params: Any, token_B: Any, cache: KVCache, position_B: Any, prompt_B: Any) -> Any:
            return nnx.merge(self.graph, params).step(token_B, cache, position_B, prompt_B)

        i = self._integers
        return self._compile(jax.jit(step, donate_argnums=2), self.params, i(1), self.cache, i(1), i(1))

    def _sparse(self) -> SparsePrefill:
        heads = self._integers(self.config.num_layers, self.config.num_heads)
        return SparsePrefill(LineBudgets(heads, heads, COLUMNS), ALL_SPARSE, LAST_QUERIES)

    def _compile(self, jitted: Any, *args: Any) -> Program:
        begun = time.perf_counter()
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            compiled = jitted.lower(*args).compile()
        return Program(compiled, time.perf_counter() - begun)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _integers(self, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._everywhere)


def _struct(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def row(name: str, topology: str, kind: str) -> str:
    """The table's row of one program; it says why where the program does not compile."""
    job = Job(name, topology)
    planned = "" if kind == "decode" else f"{job.plan.total_bytes / 1e9:.2f} GB"
    title = "decode step" if kind == "decode" else f"{kind}, {job.chunk:,} tokens"
    start = f"| {name} | {topology}, {job.axes} | {title} | "
    try:
        program = job.decode_step() if kind == "decode" else job.prefill_chunk(sparse=kind != "prefill")
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200].replace("|", "/")
        return f"{start}does not compile: {reason} | | | {planned} | | | | |"
    counts, size = program.collectives()
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"
    return (
        f"{start}{program.arguments / 1e9:.2f} GB | {program.temporaries / 1e9:.2f} GB "
        f"| {program.total / 1e9:.2f} GB | {planned} | {program.kernels} | {listed} | {size / 1e6:.1f} MB "
        f"| {program.seconds:.0f} s |"
    )


def with_row(page: str, row: str) -> str:
    """The page with this row in its table, in the place of the one of the same program, else last."""
    lines = page.splitlines()
    program = row.split("|")[1:4]
    table = [n for n, line in enumerate(lines) if line.startswith("|")]
    same = [n for n in table if lines[n].split("|")[1:4] == program]
    if same:
        lines[same[0]] = row
    else:
        lines.insert(table[-1] + 1, row)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=REPORTED)
    parser.add_argument("--topology", choices=TOPOLOGIES)
    parser.add_argument("--program", choices=PROGRAMS)
    chosen = parser.parse_args()
    if reason := tpu_topology.why_no_compiler():
        raise SystemExit(reason)
    for kind in [chosen.program] if chosen.program else PROGRAMS:
        for topology in [chosen.topology] if chosen.topology else TOPOLOGIES:
            for name in [chosen.model] if chosen.model else REPORTED:
                found = row(name, topology, kind)
                print(found, flush=True)
                _TABLE.write_text(with_row(_TABLE.read_text(), found))


if __name__ == "__main__":
    main()
