"""Bytes and best-case seconds of one way to run a model: the arithmetic behind the planner.

Seconds are floors: every FLOP at the device's best rate, every byte at its best bandwidth, communication and launches
free. Bytes are of the busiest device.
"""

from __future__ import annotations

import dataclasses
import math

from qwen_jax.config import ModelConfig
from qwen_jax.devices import DeviceSet
from qwen_jax.params import Param, params
from qwen_jax.sharding import CONTEXT, DATA, TENSOR, ShardingRules

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
_SCALE_BYTES = 4  # float32, one per token and head of an 8-bit cache, one per output of an 8-bit matrix


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One way to run one model, and what it takes of the busiest device. Values are taken as checked.

    Attributes:
        context: tokens a row, and `batch` rows. chunk: tokens of a prefill piece.
        kv_dtype, weight_dtype: keys of `DTYPE_BYTES`.
        matmul: "fp8": prefill multiplies fp8 weights with activations rounded to fp8; None: as the activations are.
        density: share of the causal attention that prefill computes.
        mesh: size of each of `sharding.AXES`, which divide the model and multiply to the devices.
        fraction: share of a device's memory that JAX may use.
    """

    config: ModelConfig
    context: int
    devices: DeviceSet
    batch: int
    kv_dtype: str
    weight_dtype: str
    matmul: str | None
    chunk: int
    density: float
    mesh: dict[str, int]
    fraction: float

    @property
    def rows(self) -> int:
        """Rows of the batch on one device."""
        return -(-self.batch // self.mesh[DATA])

    @property
    def element(self) -> int:
        """Bytes of one number of what is computed with: the weights' dtype, the config's when they have 8 bits."""
        return DTYPE_BYTES[self.weight_dtype if DTYPE_BYTES[self.weight_dtype] > 1 else self.config.dtype]

    def bytes_of(self, param: Param) -> int:
        """Bytes of one parameter on one device, all layers."""
        shape = param.hf_shape(self.config)
        split = self.mesh[TENSOR] if ShardingRules().tensor_axis(param.letters) is not None else 1
        copies = self.config.num_layers if param.stacked else 1
        # 8 bits are for the layers' matrices, whose outputs have a scale each.
        if DTYPE_BYTES[self.weight_dtype] == 1 and param.is_layer_matrix:
            size = math.prod(shape) + shape[0] * _SCALE_BYTES
        else:
            size = math.prod(shape) * self.element
        return copies * size // split

    def weight_bytes(self) -> int:
        """All parameters."""
        return sum(map(self.bytes_of, params(self.config)))

    def kv_bytes(self) -> int:
        """K and V of every layer: this device's heads and its share of the positions."""
        c = self.config
        element = DTYPE_BYTES[self.kv_dtype]
        head = c.head_dim * element + (_SCALE_BYTES if element == 1 else 0)
        positions = -(-self.context // self.mesh[CONTEXT])
        return 2 * c.num_layers * c.num_kv_heads // self.mesh[TENSOR] * head * positions * self.rows

    def activation_bytes(self) -> int:
        """The most that is alive at once while a prefill piece passes one layer.

        The residual stream and its normed copy are always there; beside them either attention (q, k, v, three
        rotations of q, output and its log-sum-exp, a layer of an 8-bit cache in as many bits as the model's) or the MLP (gate,
        up, product).
        Attention holds the queries of the whole piece on every device of the context axis, and float32 outputs on their way
        back, the rest only its share of them. Then the last logits.
        A test holds this against a compiled program; what kernels keep for themselves comes on top.
        """
        c, tensor, element = self.config, self.mesh[TENSOR], self.element
        piece = self.chunk * self.rows
        share = -(-self.chunk // self.mesh[CONTEXT]) * self.rows
        residual = 2 * share * c.hidden_size * element
        projected = share * (c.num_heads + 2 * c.num_kv_heads) // tensor * c.head_dim * element
        queries, lse = piece * c.num_heads // tensor * c.head_dim, 4 * piece * c.num_heads // tensor
        attended = queries * element * ((3 if c.dual_chunk else 1) + 1) + lse
        if self.mesh[CONTEXT] > 1:  # all queries are gathered; outputs are weighted and added up in float32
            met = queries * (element + 4) + 4 * share * c.num_heads // tensor * c.head_dim + lse
            attended = max(attended + queries * element, met)
        mlp = 3 * share * c.intermediate_size // tensor * element
        logits = 4 * self.rows * c.vocab_size // tensor
        working = max(projected + attended + self._layer_bytes(), mlp)
        return residual + working + logits + self._copied_bytes()

    def _copied_bytes(self) -> int:
        """The MLP's matrices of all layers where the compiler copies them (docs/aot.md)."""
        if not self.devices.kind.copies_mlp:
            return 0
        return sum(self.bytes_of(p) for p in params(self.config) if p.path.startswith("layers.mlp."))

    def _layer_bytes(self) -> int:
        """K and V of one layer as a prefill piece finds them in an 8-bit cache (`cache.read_layer`)."""
        if DTYPE_BYTES[self.kv_dtype] > 1:
            return 0
        positions = -(-self.context // self.mesh[CONTEXT])
        heads = self.config.num_kv_heads // self.mesh[TENSOR]
        return 2 * heads * self.config.head_dim * positions * self.rows * self.element

    def prefill_seconds(self) -> tuple[float, float]:
        """Floors of the linear layers and of causal attention, for all rows of one device."""
        c, kind = self.config, self.devices.kind
        shared = self.mesh[CONTEXT] * self.mesh[TENSOR]
        matrices = c.num_layers * sum(math.prod(p.shape(c)) for p in params(c) if p.is_layer_matrix)
        linear = 2 * (matrices * self.context + c.vocab_size * c.hidden_size)
        pairs = self.context * (self.context + 1) / 2 * self.density
        attention = 4 * pairs * c.num_heads * c.head_dim * c.num_layers
        return (
            self.rows * linear / (shared * (kind.fp8_flops if self.matmul else kind.flops)),
            self.rows * attention / (shared * kind.attention_flops(c.head_dim)),
        )

    def decode_seconds(self) -> float:
        """Every weight that a token passes and the whole cache, read once. An untied embedding gives one row only."""
        c = self.config
        read = sum(self.bytes_of(p) for p in params(c) if p.path != "embed.weight" or c.tie_embeddings)
        return (read + self.kv_bytes()) / self.devices.kind.bandwidth
