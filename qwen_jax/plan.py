"""Will it fit, and how long can it take at best: arithmetic on shapes, before anything is allocated.

`footprint` has the formulas; here a mesh is chosen, the verdict given, and what would fit found by trying.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qwen_jax.config import ModelConfig
from qwen_jax.devices import FRACTION_VARIABLES, DeviceSet, client_memory_fraction, parse_devices
from qwen_jax.errors import QwenJaxError
from qwen_jax.footprint import DTYPE_BYTES, Footprint
from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.linear import check_weight_dtype
from qwen_jax.prefill import default_chunk
from qwen_jax.sharding import AXES, CONTEXT, DATA, TENSOR, widest_tensor

_MOST_FRACTION = 0.95  # of a GPU's memory: the rest is the driver's and the compiled programs'
_SMALL_CHUNK = 4096
_MOST_DEVICES = 4096
_HOPPER = ("h100", "h200")


class PlanError(QwenJaxError):
    """A plan that cannot be made, or that does not fit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run one model.

    Attributes:
        context: tokens of prompt and answer a row, and `batch` rows.
        kv_dtype, weight_dtype: what the cache and the weights are stored in.
        matmul: "fp8" for products of fp8 in prefill, or None.
        prefill_chunk: tokens of a prefill piece.
        density: share of the causal attention that prefill computes.
        devices: what it runs on. mesh: size of the axes data, context and tensor.
        weight_bytes, kv_bytes, activation_bytes: of one device; activations are those of one prefill piece.
        memory_fraction: the share of a device's memory that JAX may use.
        usable_bytes: of one device, that share of its memory.
        prefill_linear_seconds, prefill_attention_seconds: floors for the whole prompt.
        decode_seconds: floor for one token of every row, at the full context.
        warnings: what to know before believing it. remedies: if it does not fit, what would, smallest change first.
    """

    context: int
    batch: int
    kv_dtype: str
    weight_dtype: str
    matmul: str | None
    prefill_chunk: int
    density: float
    devices: DeviceSet
    mesh: Mapping[str, int]
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    memory_fraction: float
    prefill_linear_seconds: float
    prefill_attention_seconds: float
    decode_seconds: float
    warnings: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Needed on one device."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def usable_bytes(self) -> int:
        """Available on one device."""
        return int(self.devices.kind.memory * self.memory_fraction)

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.total_bytes <= self.usable_bytes

    @property
    def prefill_seconds(self) -> float:
        """Floor for the whole prompt."""
        return self.prefill_linear_seconds + self.prefill_attention_seconds

    def check(self) -> None:
        """Raises PlanError, with what would fit, if this does not."""
        if not self.fits:
            raise PlanError(
                self.verdict + (f"; what would: {'; '.join(self.remedies)}" if self.remedies else "")
            )

    @property
    def verdict(self) -> str:
        """One sentence."""
        share = (
            ""
            if self.memory_fraction == 1
            else f" ({self.memory_fraction:.0%} of {_gb(self.devices.kind.memory)})"
        )
        return (
            f"{'fits' if self.fits else 'does not fit'}: needs {_gb(self.total_bytes)} of "
            f"{_gb(self.usable_bytes)}{share} on each of {self.devices.count} {self.devices.kind.name}"
        )


def plan(
    config: ModelConfig,
    context: int,
    devices: str | DeviceSet,
    *,
    batch: int = 1,
    kv_dtype: str | None = None,
    weight_dtype: str | None = None,
    matmul: str | None = None,
    prefill_chunk: int | None = None,
    density: float = 1.0,
    mesh: Mapping[str, int] | str | None = None,
    memory_fraction: float | None = None,
) -> Plan:
    """Plans to run a model.

    Args:
        config: the model.
        context: tokens of prompt and answer together.
        devices: see `devices.parse_devices`.
        batch: rows at once.
        kv_dtype: "bfloat16", "float16", "float32", or 8 bits with float32 scales: "int8", "fp8". None: that of
            the weights, the config's when they have 8 bits.
        weight_dtype: the same names; 8 bits hold the layers' matrices, the rest stays in the config's dtype. None:
            the config's.
        matmul: "fp8": fp8 weights, and products of fp8 in prefill, as `load` takes it.
        prefill_chunk: tokens of a prefill piece, default `prefill.default_chunk`.
        density: share of the causal attention that a sparse prefill computes, in (0, 1].
        mesh: sizes of data, context and tensor, as a mapping or "context=2,tensor=4". None: the widest tensor axis
            that divides the model, context for the rest.
        memory_fraction: share of a GPU's memory for JAX; None: what the environment says, else JAX's default of 75%.

    Raises:
        PlanError: a value outside its range, or a mesh that does not suit the devices or the model. A plan that does
            not fit is no error here: see `Plan.check`.
        QwenJaxError: `matmul` of another name, or with other weights than fp8.
        DeviceError: devices that are not understood.
    """
    chosen = parse_devices(devices) if isinstance(devices, str) else devices
    if matmul:
        check_weight_dtype(weight_dtype, matmul)
        if not chosen.kind.fp8_flops:
            raise PlanError(
                f"matmul={matmul!r} gains nothing on {chosen.kind.name}: weight_dtype='fp8' alone saves the memory"
            )
    weight_dtype = matmul or weight_dtype or config.dtype
    kv_dtype = kv_dtype or (config.dtype if DTYPE_BYTES.get(weight_dtype) == 1 else weight_dtype)
    prefill_chunk = default_chunk(config) if prefill_chunk is None else prefill_chunk
    _check_counts(context=context, batch=batch, prefill_chunk=prefill_chunk)
    for name, dtype in (("weight_dtype", weight_dtype), ("kv_dtype", kv_dtype)):
        if dtype not in DTYPE_BYTES:
            raise PlanError(f"{name} {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    if not 0 < density <= 1:
        raise PlanError(f"density must be above 0 and at most 1, got {density}")
    if memory_fraction is None:
        memory_fraction = client_memory_fraction(chosen.kind)
    if not 0 < memory_fraction <= 1:
        raise PlanError(f"memory_fraction must be above 0 and at most 1, got {memory_fraction}")
    wish = Footprint(
        config=config,
        context=context,
        devices=chosen,
        batch=batch,
        kv_dtype=kv_dtype,
        weight_dtype=weight_dtype,
        matmul=matmul,
        chunk=min(prefill_chunk, context),
        density=float(density),
        mesh=_mesh(config, chosen, mesh),
        fraction=memory_fraction,
    )
    made = _made(wish)
    return made if made.fits else dataclasses.replace(made, remedies=_remedies(wish))


def _made(f: Footprint) -> Plan:
    linear, attention = f.prefill_seconds()
    return Plan(
        context=f.context,
        batch=f.batch,
        kv_dtype=f.kv_dtype,
        weight_dtype=f.weight_dtype,
        matmul=f.matmul,
        prefill_chunk=f.chunk,
        density=f.density,
        devices=f.devices,
        mesh=f.mesh,
        weight_bytes=f.weight_bytes(),
        kv_bytes=f.kv_bytes(),
        activation_bytes=f.activation_bytes(),
        memory_fraction=f.fraction,
        prefill_linear_seconds=linear,
        prefill_attention_seconds=attention,
        decode_seconds=f.decode_seconds(),
        warnings=_warnings(f),
    )


def _reads_shares(f: Footprint) -> bool:
    """Whether the kernels of sparse prefill read a cache that is dealt over the context axis."""
    blocks = Blocks.fitting(f.mesh[CONTEXT], f.config.dual_chunk.chunk_len if f.config.dual_chunk else None)
    return f.devices.kind.name in _HOPPER and blocks.size % BAND == 0


def _warnings(f: Footprint) -> tuple[str, ...]:
    found = []
    limit = f.config.max_position_embeddings
    if f.context > limit:
        found.append(f"the context is longer than the {limit:,} positions the model is made for")
    if f.mesh[DATA] > f.batch:
        found.append(f"data={f.mesh[DATA]} is more than the {f.batch} rows: devices stay idle")
    if f.density < 1 and f.mesh[CONTEXT] > 1 and not _reads_shares(f):
        found.append(
            "over a context axis the lines of a sparse prefill are computed by XLA, far slower than along tensor"
        )
    if f.density < 1:
        found.append("scoring and choosing the lines of a sparse prefill is not counted")
    return tuple(found)


def _mesh(config: ModelConfig, devices: DeviceSet, wanted: Mapping[str, int] | str | None) -> dict[str, int]:
    widest = widest_tensor(config)
    best = math.gcd(devices.count, widest)
    s = config.dual_chunk.chunk_len if config.dual_chunk else 0
    context = math.gcd(devices.count // best, s)
    works = {DATA: devices.count // best // context, CONTEXT: context, TENSOR: best}
    if wanted is None:
        return works
    sizes = dict.fromkeys(AXES, 1) | (_parse_mesh(wanted) if isinstance(wanted, str) else dict(wanted))
    text, hint = _mesh_text(sizes), f"{_mesh_text(works)} works"
    for axis, size in sizes.items():
        if axis not in AXES:
            raise PlanError(f"mesh axis {axis!r} is not one of {', '.join(AXES)}")
        if not isinstance(size, int) or size < 1:
            raise PlanError(f"mesh axis {axis} must be a positive integer, got {size!r}")
    if math.prod(sizes.values()) != devices.count:
        raise PlanError(f"mesh {text} does not use the {devices.count} devices of {devices.text}; {hint}")
    if widest % sizes[TENSOR]:
        raise PlanError(
            f"mesh {text}: tensor={sizes[TENSOR]} does not divide {config.num_heads} query heads, "
            f"{config.num_kv_heads} KV heads, the MLP and the vocabulary; {hint}"
        )
    if s % sizes[CONTEXT]:
        raise PlanError(
            f"mesh {text}: context={sizes[CONTEXT]} does not divide the chunk length {s} of dual chunk attention; {hint}"
        )
    return sizes


def _mesh_text(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size != 1) or "tensor=1"


def _parse_mesh(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        raise PlanError(f"mesh {text!r} is not understood; write it as context=2,tensor=4") from None


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise PlanError(f"{name} must be a positive integer, got {value!r}")


def _remedies(wish: Footprint) -> tuple[str, ...]:
    """What would fit, smallest change first: settings, then more devices, then a shorter context."""
    more_memory: dict[str, Any] = {}
    if wish.devices.kind.is_gpu and wish.fraction < _MOST_FRACTION:
        more_memory["fraction"] = _MOST_FRACTION
    small_chunk: dict[str, Any] = {"chunk": _SMALL_CHUNK} if wish.chunk > _SMALL_CHUNK else {}
    small_cache: dict[str, Any] = {"kv_dtype": "int8"} if DTYPE_BYTES[wish.kv_dtype] > 1 else {}
    settings = [more_memory, small_chunk, small_cache]
    settings += [
        more_memory | small_chunk,
        more_memory | small_cache,
        more_memory | small_cache | small_chunk,
    ]
    found: list[str] = []
    for change in settings:
        if change and _made(dataclasses.replace(wish, **change)).fits:
            found.append(_in_words(change))
            break
    found += [text for text in (_more_devices(wish), _shorter(wish)) if text]
    return tuple(found)


def _in_words(change: Mapping[str, Any]) -> str:
    words = {
        "fraction": f"{FRACTION_VARIABLES[0]}={_MOST_FRACTION} in the environment",
        "chunk": f"a prefill chunk of {_SMALL_CHUNK:,}",
        "kv_dtype": "an 8-bit cache",
    }
    return " with ".join(words[name] for name in sorted(change, key=list(words).index, reverse=True))


def _more_devices(wish: Footprint) -> str | None:
    kind, count = wish.devices.kind, 2 * wish.devices.count
    while count <= _MOST_DEVICES:
        devices = DeviceSet(kind, count, f"{kind.name}:{count}")
        mesh = _mesh(wish.config, devices, None)
        if _made(dataclasses.replace(wish, devices=devices, mesh=mesh)).fits:
            chips = "" if kind.per_chip == 1 else f" ({count // kind.per_chip} chips)"
            return f"{count} {kind.name} devices{chips}, {_mesh_text(mesh)}"
        count *= 2
    return None


def _shorter(wish: Footprint) -> str | None:
    """The longest context that fits, by bisection: bytes grow with it."""
    fits, fails = 0, wish.context
    while fails - fits > 1:
        middle = (fits + fails) // 2
        changed = dataclasses.replace(wish, context=middle, chunk=min(wish.chunk, middle))
        fits, fails = (middle, fails) if _made(changed).fits else (fits, middle)
    tokens = fits // 1000 * 1000 or fits
    return f"a context of {tokens:,} tokens" if tokens else None


def render(made: Plan) -> RenderableType:
    """The plan as a table for a terminal."""
    kind = made.devices.kind
    rows = f"{made.batch} x " if made.batch > 1 else ""
    sparse = "" if made.density == 1 else f" at {made.density:.0%} density"
    linear = f"linear in {made.matmul}" if made.matmul else "linear"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "devices", str(made.devices.count), f"{kind.name} ({kind.source} figures), {_mesh_text(made.mesh)}"
    )
    table.add_row("context", f"{rows}{made.context:,}", "tokens")
    table.add_row("weights", _gb(made.weight_bytes), f"{made.weight_dtype}, per device")
    table.add_row("KV cache", _gb(made.kv_bytes), f"{made.kv_dtype}, per device")
    table.add_row(
        "activations", _gb(made.activation_bytes), f"one prefill chunk of {made.prefill_chunk:,} tokens"
    )
    table.add_row("total", _gb(made.total_bytes), f"of {_gb(made.usable_bytes)} usable")
    table.add_row(
        "prefill",
        f">= {_seconds(made.prefill_seconds)}",
        f"{_seconds(made.prefill_linear_seconds)} {linear} + {_seconds(made.prefill_attention_seconds)} attention{sparse}",
    )
    table.add_row(
        "per token",
        f">= {_seconds(made.decode_seconds)}",
        "at the full context, reading weights and cache once",
    )
    lines = [Text(f"note: {warning}", style="yellow") for warning in made.warnings]
    lines.append(Text(made.verdict, style="bold green" if made.fits else "bold red"))
    lines += [Text(f"  would fit: {remedy}") for remedy in made.remedies]
    return Group(table, *lines)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 0.1e9 else f"{count / 1e6:.1f} MB"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.{0 if seconds >= 100 else 1}f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"
