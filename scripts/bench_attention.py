"""Times attention on an NVIDIA GPU against the peers that are installed, in one run, and writes benchmarks/attention-*.json.

    python scripts/bench_attention.py [--only causal-8k,decode-1m] [--heads 28/4,40/8] [--out benchmarks/attention.json]

Every contender's output is checked against float32 on sampled rows before it is timed; contenders take turns, so that none
gets a cooler chip. Peers take no query offset but for FlashAttention-4: for a chunk at the end of a long prompt they run a
rectangle, a square and a merge; and they get rotated queries, where ours rotates them itself. TFLOP/s count the visible pairs
only: 4 * pairs * N * H. Decode counts the bytes of K and V read. Rows of other shapes that the file holds are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib
import json
import pathlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attention_tools as tools
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DualChunk
from qwen_jax.kernels.attention import hopper as prefill
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.decode_attention.api import decode_attend
from qwen_jax.kernels.quantised import expand, quantise
from qwen_jax.rope import temperature

TOLERANCE = 1e-2
_TRACING = threading.Lock()  # contenders are compiled side by side, but traced one by one


@dataclasses.dataclass(frozen=True)
class Shape:
    """Queries start .. start + queries of one prompt, or one query after `start` keys."""

    queries: int
    start: int
    dca: DualChunk | None = None
    cache: str = "bfloat16"
    head_dim: int = 128

    @property
    def keys(self) -> int:
        return self.start + self.queries

    @property
    def pairs(self) -> int:
        return self.queries * self.start + self.queries * (self.queries + 1) // 2


K = 1024
SHAPES = {
    "causal-8k": Shape(8 * K, 0),
    "causal-32k": Shape(32 * K, 0),
    "causal-128k": Shape(128 * K, 0),
    "causal-32k-head-64": Shape(32 * K, 0, head_dim=64),
    "chunk-at-128k": Shape(32 * K, 96 * K),
    "chunk-at-256k": Shape(32 * K, 224 * K),
    "chunk-at-1m": Shape(32 * K, 992 * K),
    "plain-second-chunk": Shape(8 * K, 253_952),
    "dca-second-chunk": Shape(8 * K, 253_952, tools.QWEN_1M),
    "plain-end": Shape(26_960, 983_040),
    "dca-end": Shape(26_960, 983_040, tools.QWEN_1M),
    "decode-128k": Shape(1, 128 * K - 1),
    "decode-1m": Shape(1, 1024 * K - 1),
    "decode-1m-dca": Shape(1, 1024 * K - 1, tools.QWEN_1M),
    "decode-1m-int8": Shape(1, 1024 * K - 1, tools.QWEN_1M, "int8"),
    "decode-1m-fp8": Shape(1, 1024 * K - 1, tools.QWEN_1M, "float8_e4m3fn"),
}


@dataclasses.dataclass
class Inputs:
    """One call's arrays: q [1, T, N, H], k and v [1, 1, K, S, H]."""

    shape: Shape
    q: jax.Array
    k: jax.Array
    v: jax.Array
    scales: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]


Contender = tuple[
    Callable[[], Any], Callable[[Any], None], Callable[[Any], jax.Array]
]  # start, wait, out [T, N, H]


def ours(inputs: Inputs, backend: str, **options: Any) -> Contender:
    """The public call, compiled; `options` go to the backend."""
    rotary = tools.rotary(inputs.head_dim, inputs.shape.dca)
    shape = inputs.shape
    scale = jnp.full(1, inputs.head_dim**-0.5, jnp.float32)
    function = decode_attend if shape.queries == 1 else attend
    if options:
        name = "decode_attention" if shape.queries == 1 else "attention"
        function = getattr(importlib.import_module(f"qwen_jax.kernels.{name}.{backend}"), function.__name__)
    else:
        options = {"backend": backend}
    call = jax.jit(functools.partial(function, rotary=rotary, **options))
    if shape.queries == 1:
        at = jnp.full(1, shape.start, jnp.int32)
        arguments = {"position_B": at, "prompt_len_B": at, "scale_B": scale, "layer": jnp.int32(0)}
        q = inputs.q[:, 0]
    else:
        length = jnp.full(1, shape.keys, jnp.int32)
        arguments = {
            "q_start": jnp.int32(shape.start),
            "kv_len_B": length,
            "scale_B": scale,
            "layer": jnp.int32(0),
        }
        q = inputs.q
    arguments |= inputs.scales
    with _TRACING:
        lowered = call.lower(q, inputs.k, inputs.v, **arguments)
    compiled = lowered.compile()
    return (
        lambda: compiled(q, inputs.k, inputs.v, **arguments),
        jax.block_until_ready,
        lambda result: result[0].reshape(shape.queries, *inputs.q.shape[2:]),
    )


def torch_sdpa(inputs: Inputs, kind: str) -> Contender:
    """torch's cuDNN or FlashAttention-2 kernel on the rotated queries."""
    import torch

    rotary = tools.rotary(inputs.head_dim, None)
    shape = inputs.shape
    q = rotary.rotate(inputs.q, shape.start + jnp.arange(shape.queries))
    q_t, k_t, v_t = (torch.from_dlpack(x) for x in (q, inputs.k, inputs.v))
    q_t, k_t, v_t = q_t.transpose(1, 2), k_t[0], v_t[0]
    scale = inputs.head_dim**-0.5

    def part(k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
        if kind == "cudnn":
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                q_t, k, v, None, True, 0.0, causal, False, scale=scale
            )[:2]
        group = q_t.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v)) if group > 1 else (k, v)
        return torch.ops.aten._scaled_dot_product_flash_attention(q_t, k, v, 0.0, causal, False, scale=scale)[
            :2
        ]

    def start() -> Any:
        if shape.queries == 1:
            return part(k_t[:, :, : shape.keys], v_t[:, :, : shape.keys], False)[0]
        new = slice(shape.start, shape.keys)
        out, lse = part(k_t[:, :, new], v_t[:, :, new], True)
        if shape.start == 0:
            return out
        old_out, old_lse = part(k_t[:, :, : shape.start], v_t[:, :, : shape.start], False)
        shape_of = (*out.shape[:3], 1)
        weight = torch.sigmoid(old_lse.reshape(shape_of) - lse.reshape(shape_of))
        return torch.lerp(out.float(), old_out.float(), weight).to(out.dtype)

    return (
        start,
        lambda _: torch.cuda.synchronize(),
        lambda out: jnp.asarray(out[0].transpose(0, 1).float().cpu().numpy()),
    )


def flash_attention_4(inputs: Inputs) -> Contender:
    """FlashAttention-4 (package flash-attn-4); it takes queries at the end of the keys, as they are."""
    import torch
    from flash_attn.cute import flash_attn_func

    rotary = tools.rotary(inputs.head_dim, None)
    shape = inputs.shape
    q = rotary.rotate(inputs.q, shape.start + jnp.arange(shape.queries))
    k, v = (jnp.swapaxes(x[0], 1, 2)[:, : shape.keys] for x in (inputs.k, inputs.v))
    q_t, k_t, v_t = (torch.from_dlpack(x) for x in (q, k, v))

    def start() -> Any:
        return flash_attn_func(q_t, k_t, v_t, softmax_scale=inputs.head_dim**-0.5, causal=True)[0]

    with _TRACING:  # the first call compiles
        start()

    return start, lambda _: torch.cuda.synchronize(), lambda out: jnp.asarray(out[0].float().cpu().numpy())


def jax_cudnn(inputs: Inputs) -> Contender:
    """jax.nn's cuDNN attention where it applies (from position 0), else our merge of cuDNN parts."""
    shape = inputs.shape
    if shape.start and shape.queries > 1:
        return ours(inputs, "cudnn")
    rotary = tools.rotary(inputs.head_dim, None)
    q = rotary.rotate(inputs.q, shape.start + jnp.arange(shape.queries))
    k, v = (jnp.swapaxes(x[0], 1, 2)[:, : shape.keys] for x in (inputs.k, inputs.v))
    call = jax.jit(
        functools.partial(
            jax.nn.dot_product_attention,
            scale=inputs.head_dim**-0.5,
            is_causal=shape.queries > 1,
            implementation="cudnn",
        )
    )
    compiled = call.lower(q, k, v).compile()
    return lambda: compiled(q, k, v), jax.block_until_ready, lambda out: out[0]


def contenders(inputs: Inputs, wanted: list[str]) -> dict[str, Callable[[], Contender]]:
    """Everything that can be timed on these inputs, by name."""
    decode = inputs.shape.queries == 1
    found: dict[str, Callable[[], Contender]] = {"mosaic_gpu": lambda: ours(inputs, "mosaic_gpu")}
    if decode and inputs.shape.cache == "bfloat16":
        found["xla"] = lambda: ours(inputs, "xla")
    if not inputs.shape.dca:
        found["torch_cudnn"] = lambda: torch_sdpa(inputs, "cudnn")
        found["torch_flash"] = lambda: torch_sdpa(inputs, "flash")
        found["jax_cudnn"] = lambda: jax_cudnn(inputs)
        if not decode:
            found["flash_attention_4"] = lambda: flash_attention_4(inputs)
    if (
        not inputs.shape.dca and inputs.shape.queries >= 32 * K and inputs.shape.start >= 128 * K
    ):  # what the wait of blocks for each other is worth
        tiling = prefill.Tiling(pace=0)
        found["mosaic_gpu_unpaced"] = lambda: ours(inputs, "mosaic_gpu", tiling=tiling)
    return {name: make for name, make in found.items() if not wanted or name in wanted}


@dataclasses.dataclass
class Prepared:
    """One shape, compiled and checked: a row for each contender, and what runs those that were right."""

    shape: Shape
    kv_heads: int
    head_dim: int
    rows: list[dict[str, Any]]
    runs: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]


def measure(
    name: str, shape: Shape, heads: tuple[int, int], make: Any, rounds: int, head_dim: int | None = None
) -> list[dict[str, Any]]:
    """One shape: every contender checked, then timed in turn; a row each, with the reason where one could not run."""
    return timed(prepare(name, shape, heads, make, head_dim), rounds, float("inf"))


def prepare(
    name: str, shape: Shape, heads: tuple[int, int], make: Any, head_dim: int | None = None
) -> Prepared:
    """Compiles every contender and checks its output."""
    N, kv_heads = heads
    head_dim = head_dim or shape.head_dim
    capacity = -(-shape.keys // 8) * 8
    inputs = Inputs(
        shape,
        tools.random(1, (1, shape.queries, N, head_dim)),
        *(tools.random(n, (1, 1, kv_heads, capacity, head_dim)) for n in (2, 3)),
    )
    dense = inputs.k, inputs.v
    if shape.cache != "bfloat16":  # compared with the numbers the cache holds
        (k, k_scale), (v, v_scale) = (quantise(x, jnp.dtype(shape.cache)) for x in dense)
        inputs = dataclasses.replace(
            inputs, k=k, v=v, scales={"k_scale_LBKS": k_scale, "v_scale_LBKS": v_scale}
        )
        dense = expand(k, k_scale, jnp.float32), expand(v, v_scale, jnp.float32)
    factors = None
    if shape.queries == 1 and shape.dca:  # in decode each key carries its temperature
        j = jnp.arange(capacity)
        original = shape.dca.original_max_position_embeddings
        factors = temperature(jnp.where(j < shape.start, shape.start, j + 1), original)
    sample = np.unique(np.linspace(0, shape.queries - 1, 4).astype(int))
    want, _ = tools.exact(
        inputs.q[0, sample], shape.start + sample, dense[0][0, 0], dense[1][0, 0],
        kv_len=shape.keys, rotary=tools.rotary(head_dim, shape.dca), scale=head_dim**-0.5, key_factor_S=factors,
    )  # fmt: skip
    del dense
    rows, runs = [], {}
    with ThreadPoolExecutor() as pool:  # contenders compile side by side
        started = {contender: pool.submit(start) for contender, start in make(inputs).items()}
    for contender, future in started.items():
        row: dict[str, Any] = {"shape": name, "heads": f"{N}/{kv_heads}", "contender": contender}
        rows.append(row)
        try:
            run, wait, output = future.result()
            result = run()
            wait(result)
            row["error"] = tools.worst_row_error(output(result)[sample], want)
            if row["error"] <= TOLERANCE:
                runs[contender] = (run, wait)
            else:
                row["reason"] = f"wrong: relative error {row['error']:.1e}"
        except (
            Exception
        ) as problem:  # a peer that cannot run must not end the run; its reason is part of the result
            row["reason"] = (
                f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
            )
    return Prepared(shape, kv_heads, head_dim, rows, runs)


def timed(prepared: Prepared, rounds: int, at_most_s: float) -> list[dict[str, Any]]:
    """The rows with times and rates, and their ratios to the faster cuDNN."""
    shape, kv_heads, head_dim, rows = prepared.shape, prepared.kv_heads, prepared.head_dim, prepared.rows
    N = int(rows[0]["heads"].split("/")[0])
    for contender, seconds in tools.interleaved_medians(prepared.runs, rounds, at_most_s=at_most_s).items():
        row = next(r for r in rows if r["contender"] == contender)
        row["ms"] = seconds * 1e3
        if shape.queries == 1:
            element = jnp.dtype(shape.cache).itemsize
            row["GB/s"] = (
                2 * shape.keys * kv_heads * (head_dim * element + 4 * (element == 1)) / seconds / 1e9
            )
        else:
            row["TFLOP/s"] = 4 * shape.pairs * N * head_dim / seconds / 1e12
    cudnn = min((r["ms"] for r in rows if "cudnn" in r["contender"] and "ms" in r), default=None)
    for row in rows:
        if cudnn and "ms" in row:
            row["ratio to cuDNN"] = cudnn / row["ms"]
    return rows


def table_line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    name = f"{row['shape']:20} {row['heads']:5} {row['contender']:24}"
    if "ms" not in row:
        return f"{name} {row['reason']}"
    rate = f"{row['TFLOP/s']:7.1f} TFLOP/s" if "TFLOP/s" in row else f"{row['GB/s']:7.0f} GB/s   "
    ratio = f"{row['ratio to cuDNN']:.3f} x cuDNN" if "ratio to cuDNN" in row else ""
    return f"{name} {row['ms']:9.3f} ms {rate} error {row['error']:.1e} {ratio}"


def environment() -> dict[str, Any]:
    """Device and versions."""
    found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    try:
        import torch

        found |= {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"shapes, comma separated, of {', '.join(SHAPES)}")
    parser.add_argument("--heads", default="28/4,40/8", help="query heads / KV heads, comma separated")
    parser.add_argument("--contenders", default="", help="comma separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-most", type=float, default=60, help="seconds of a shape after which rounds end")
    parser.add_argument(
        "--ahead",
        type=int,
        default=1,
        help="shapes to compile side by side, then time; memory must hold them",
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/attention.json"))
    arguments = parser.parse_args()
    wanted = [name for name in arguments.contenders.split(",") if name]
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    shapes = arguments.only.split(",") if arguments.only else list(SHAPES)
    cases = [(name, pair) for pair in arguments.heads.split(",") for name in shapes]

    def prepared(case: tuple[str, str]) -> Prepared:
        name, pair = case
        N, kv_heads = map(int, pair.split("/"))
        return prepare(name, SHAPES[name], (N, kv_heads), lambda x: contenders(x, wanted))

    for first in range(0, len(cases), arguments.ahead):
        group = cases[first : first + arguments.ahead]
        with ThreadPoolExecutor() as pool:
            ready = list(pool.map(prepared, group))
        for name, pair in group:
            new = timed(ready.pop(0), arguments.rounds, arguments.at_most)
            print("\n".join(map(table_line, new)), flush=True)
            rows = [row for row in rows if (row["shape"], row["heads"]) != (name, pair)]
            rows += [row | {"date": str(datetime.date.today())} for row in new]
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
