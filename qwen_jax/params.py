"""Every parameter, declared once: its place in the model, its Hugging Face name, its shape and its sharding.

The axes string reads in dimension letters (`ModelConfig.sizes`). Hugging Face stores a Linear as (out, in) and fuses
the axes in parentheses: "(NH)D" is [N, H, D] in the model and [N * H, D] in the file. The model keeps the file's order, so
loading a tensor is a read and a reshape, never a transpose, and a shard over heads is one contiguous range of the file.
"""

from __future__ import annotations

import dataclasses
import math
import re

from qwen_jax.config import ModelConfig

LAYERS = "layers"


@dataclasses.dataclass(frozen=True)
class Param:
    """One row: `path` in the model ("layers.attn.q.weight"), `hf` name ("{layer}" where it repeats), `axes`."""

    path: str
    hf: str
    axes: str

    @property
    def stacked(self) -> bool:
        """True for parameters of the repeated block: the model holds them with a leading layer axis L."""
        return self.path.startswith(LAYERS + ".")

    @property
    def letters(self) -> str:
        """Dimension letters of one layer's tensor in the model, without the layer axis."""
        return "".join(self._groups)

    @property
    def _groups(self) -> list[str]:
        """The letters that make one dimension of the Hugging Face tensor, for each of its dimensions."""
        return [group.strip("()") for group in re.findall(r"\(\w+\)|\w", self.axes)]

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is what the layers multiply with, which 8 bits may hold: no bias, norm, embedding or output head."""
        return self.stacked and len(self._groups) == 2

    @property
    def out_letters(self) -> str:
        """Dimension letters of a matrix's outputs; the rest are its inputs. An 8-bit matrix has one scale for each output."""
        return self._groups[0]

    @property
    def scale_path(self) -> str:
        """Where the scales of an 8-bit matrix stand in the model: "layers.attn.q.scale"."""
        return self.path.removesuffix("weight") + "scale"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one layer's tensor in the model."""
        sizes = config.sizes()
        return tuple(sizes[letter] for letter in self.letters)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the tensor in a Hugging Face file: the axes in parentheses are one."""
        sizes = config.sizes()
        return tuple(math.prod(sizes[letter] for letter in group) for group in self._groups)

    def hf_name(self, layer: int | None = None) -> str:
        """The tensor's name in a Hugging Face file; `layer` for stacked parameters only."""
        return self.hf.format(layer=layer) if self.stacked else self.hf


_BLOCK = "model.layers.{layer}."
_PARAMS = (
    Param("embed.weight", "model.embed_tokens.weight", "VD"),
    Param("layers.input_norm.weight", _BLOCK + "input_layernorm.weight", "D"),
    Param("layers.attn.q.weight", _BLOCK + "self_attn.q_proj.weight", "(NH)D"),
    Param("layers.attn.q.bias", _BLOCK + "self_attn.q_proj.bias", "(NH)"),
    Param("layers.attn.k.weight", _BLOCK + "self_attn.k_proj.weight", "(KH)D"),
    Param("layers.attn.k.bias", _BLOCK + "self_attn.k_proj.bias", "(KH)"),
    Param("layers.attn.v.weight", _BLOCK + "self_attn.v_proj.weight", "(KH)D"),
    Param("layers.attn.v.bias", _BLOCK + "self_attn.v_proj.bias", "(KH)"),
    Param("layers.attn.o.weight", _BLOCK + "self_attn.o_proj.weight", "D(NH)"),
    Param("layers.post_norm.weight", _BLOCK + "post_attention_layernorm.weight", "D"),
    Param("layers.mlp.gate.weight", _BLOCK + "mlp.gate_proj.weight", "FD"),
    Param("layers.mlp.up.weight", _BLOCK + "mlp.up_proj.weight", "FD"),
    Param("layers.mlp.down.weight", _BLOCK + "mlp.down_proj.weight", "DF"),
    Param("norm.weight", "model.norm.weight", "D"),
    Param("lm_head.weight", "lm_head.weight", "VD"),
)


def params(config: ModelConfig) -> tuple[Param, ...]:
    """The rows a model of this config has: all of them, less the output head when it is tied to the embedding."""
    return tuple(p for p in _PARAMS if not (p.path == "lm_head.weight" and config.tie_embeddings))


def num_params(config: ModelConfig) -> int:
    """Exact parameter count, tied weights counted once (`algorithms.md` 1.1)."""
    return sum(math.prod(p.shape(config)) * (config.num_layers if p.stacked else 1) for p in params(config))
