"""Whole programs through the TPU's compiler; `scripts/aot_report.py` compiles more of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.cache import in_place
from qwen_jax.devices import parse_devices
from scripts import aot_report, tpu_topology

needs_compiler = pytest.mark.skipif(
    tpu_topology.why_no_compiler() is not None, reason=tpu_topology.why_no_compiler() or ""
)


@needs_compiler
def test_a_decode_step_of_7b_at_a_million_tokens_fits_four_v5p_as_the_plan_says() -> None:
    job = aot_report.Job("7B", "v5p:2x2x1")
    program = job.decode_step()
    assert job.axes == "tensor=4"
    assert program.kernels == 1  # the layers are scanned, and attention runs in the kernel on every device
    assert program.temporaries < 0.01 * job.plan.kv_bytes  # no copy of the cache
    assert program.total == pytest.approx(job.plan.weight_bytes + job.plan.kv_bytes, rel=0.1)
    assert program.total < parse_devices("v5p:2x2x1").kind.memory
    counts, size = program.collectives()
    assert counts["all-reduce"] <= 4
    assert size < 2**20  # a decode step exchanges activations of one token


@needs_compiler
def test_a_decode_step_with_heads_of_64_copies_nothing_of_the_cache() -> None:
    job = aot_report.Job("0.5B", "v5e:2x2", 131_072)
    program = job.decode_step()
    assert job.config.head_dim == 64
    assert program.kernels == 1
    assert program.temporaries < 0.01 * job.plan.kv_bytes
    assert program.total == pytest.approx(job.plan.weight_bytes + job.plan.kv_bytes, rel=0.1)


@needs_compiler
@pytest.mark.parametrize("generation", list(tpu_topology.SMALLEST))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_caches_arrive_in_the_layout_that_is_pinned(generation: str, head_dim: int) -> None:
    cache = jax.ShapeDtypeStruct((2, 1, 2, 512, head_dim), jnp.bfloat16)
    compiled = tpu_topology.compile_for_one(
        tpu_topology.SMALLEST[generation], lambda x: in_place(2 * x), cache
    )
    assert "copy(" not in compiled.as_text()


def test_a_row_takes_the_place_of_its_program() -> None:
    page = "# Title\n\n| model | topology | program | total |\n|---|---|---|---|\n| 7B | v5p | decode | 1 |\n\n- note\n"
    again = aot_report.with_row(page, "| 7B | v5p | decode | 2 |")
    assert again == page.replace("| 1 |", "| 2 |")
    more = aot_report.with_row(again, "| 14B | v5p | decode | 3 |")
    assert more == again.replace("| 2 |\n", "| 2 |\n| 14B | v5p | decode | 3 |\n")
