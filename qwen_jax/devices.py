"""Accelerators the planner knows: memory, arithmetic and bandwidth of one device, and how a name becomes a count.

Figures called measured were measured on that machine; the others are what its vendor states. HBM of TPUs is the
limit that their compiler enforces.
"""

from __future__ import annotations

import dataclasses
import math
import os

from qwen_jax.errors import QwenJaxError

GIB = 1024**3

# What JAX takes of a GPU's memory at start unless told otherwise, and how it is told.
GPU_MEMORY_FRACTION = 0.75
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class DeviceError(QwenJaxError):
    """A device name or topology that is not understood."""


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """One device as JAX shows it.

    Attributes:
        name: as written before the colon.
        memory: usable bytes.
        flops: dense bf16 matrix product, FLOP/s.
        bandwidth: reading memory, bytes/s.
        source: where these figures come from.
        topology_dims: numbers in a TPU topology; 0 for a GPU, which is counted.
        fp8_flops: the same of e4m3, FLOP/s; 0 where `matmul="fp8"` gains nothing.
        per_chip: devices a chip shows.
        matrix_unit: width of the matrix unit. A head narrower than that fills it in part only, whatever the
            schedule, which caps attention; 0 where nothing is lost.
        copies_mlp: whether the compiler copies the MLP's matrices of all layers at every call, to another tiling of memory.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    source: str
    fp8_flops: float = 0
    topology_dims: int = 0
    per_chip: int = 1
    matrix_unit: int = 0
    copies_mlp: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether JAX reserves a fraction of the memory at start."""
        return self.topology_dims == 0

    def attention_flops(self, head_dim: int) -> float:
        """FLOP/s within reach of attention with heads of this width."""
        return self.flops * (min(1.0, head_dim / self.matrix_unit) if self.matrix_unit else 1.0)


_VENDOR, _MEASURED = "vendor", "measured"

KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind("h200", 150.8e9, 790e12, 4.3e12, _MEASURED, 1476e12),
        DeviceKind("h100", 85.0e9, 989e12, 3.35e12, _VENDOR, 1979e12),
        DeviceKind("a100-40gb", 42.2e9, 312e12, 1.555e12, _VENDOR),
        DeviceKind("a100-80gb", 84.9e9, 312e12, 2.039e12, _VENDOR),
        DeviceKind("b200", 180e9, 2250e12, 8.0e12, _VENDOR, 4500e12),
        DeviceKind("v5e", 15.75 * GIB, 197e12, 0.819e12, _VENDOR, topology_dims=2, matrix_unit=128),
        DeviceKind("v5p", 95.73 * GIB, 459e12, 2.765e12, _VENDOR, topology_dims=3, matrix_unit=128),
        DeviceKind("v6e", 31.24 * GIB, 918e12, 1.638e12, _VENDOR, topology_dims=2, matrix_unit=256),
        # Vendor figures are of a chip, which is two devices.
        DeviceKind(
            "tpu7x", 94.74 * GIB, 2307e12 / 2, 7.38e12 / 2, _VENDOR, topology_dims=3, per_chip=2, matrix_unit=256,
            copies_mlp=True
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeviceSet:
    """`count` devices of one kind; `text` is how the user wrote it."""

    kind: DeviceKind
    count: int
    text: str


def parse_devices(text: str) -> DeviceSet:
    """Reads "h200:1", "h100:8", "v5e:2x2", "v5p:2x2x1"; no number means one GPU.

    Raises:
        DeviceError: an unknown kind, or a count or topology that does not fit the kind.
    """
    name, _, size = text.strip().lower().partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise DeviceError(f"devices {text!r}: unknown kind {name!r}; known are {', '.join(KINDS)}")
    parts = size.split("x") if size else ["1"] if kind.is_gpu else []
    wanted = "a count, as in h200:8"
    if not kind.is_gpu:
        wanted = f"{kind.topology_dims} numbers, as in {name}:{'x'.join('221'[: kind.topology_dims])}"
    if len(parts) != (kind.topology_dims or 1) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise DeviceError(f"devices {text!r}: {name} takes {wanted}")
    return DeviceSet(kind, math.prod(map(int, parts)) * kind.per_chip, text.strip())


def client_memory_fraction(kind: DeviceKind) -> float:
    """The share of a device's memory that JAX may use, from the environment where it says so.

    Raises:
        DeviceError: the environment variable is not a number in (0, 1].
    """
    if not kind.is_gpu:
        return 1.0
    for variable in FRACTION_VARIABLES:
        if value := os.environ.get(variable):
            try:
                fraction = float(value)
            except ValueError:
                fraction = -1.0
            if not 0 < fraction <= 1:
                raise DeviceError(f"{variable}={value!r} must be a number above 0 and at most 1")
            return fraction
    return GPU_MEMORY_FRACTION
