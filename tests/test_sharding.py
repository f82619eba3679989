import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.convert.synthetic import TINY
from qwen_jax.errors import QwenJaxError
from qwen_jax.params import params
from qwen_jax.sharding import AXES, ShardingRules, check_mesh, full_mesh, shardings, widest_tensor

QWEN_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_14B = {
    "vocab_size": 152_064,
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}


class FakeMesh:
    """A mesh of more devices than there are: `check_mesh` looks at its shape only."""

    def __init__(self, **shape: int) -> None:
        self.shape = shape


def config(**overrides: int) -> ModelConfig:
    return ModelConfig.from_dict(TINY | overrides)


def one_device(*names: str) -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape([1] * len(names)), names)


def test_rules_read_like_the_shapes():
    rules = ShardingRules()
    assert rules.spec("VD") == PartitionSpec("tensor", None)
    assert rules.spec("LNHD") == PartitionSpec(None, "tensor", None, None)
    assert rules.spec("LDNH") == PartitionSpec(None, None, "tensor", None)
    assert rules.spec("LBKSH") == PartitionSpec(None, "data", "tensor", "context", None)
    assert rules.tensor_axis("DF") == 1
    assert rules.tensor_axis("D") is None
    assert ShardingRules(V=None).spec("VD") == PartitionSpec(None, None)


@pytest.mark.parametrize(("raw", "widest"), [(QWEN_7B, 4), (QWEN_14B, 8), ({}, 2)])
def test_widest_tensor(raw, widest):
    assert widest_tensor(config(**raw)) == widest


@pytest.mark.parametrize(
    ("raw", "mesh", "message"),
    [
        (QWEN_7B, {"tensor": 8}, "tensor=8 does not divide num_attention_heads=28, num_key_value_heads=4: "
         "use a mesh with context=2,tensor=4"),
        (QWEN_14B, {"context": 2, "tensor": 16}, "tensor=16 does not divide num_attention_heads=40, "
         "num_key_value_heads=8: use a mesh with context=4,tensor=8"),
        (QWEN_14B, {"tensor": 3}, "use a mesh with context=3,tensor=1"),
        (QWEN_14B | {"vocab_size": 151_665}, {"tensor": 2}, "vocab_size=151665: use a mesh with context=2,tensor=1"),
    ],
)  # fmt: skip
def test_refusal_names_a_mesh_that_works(raw, mesh, message):
    with pytest.raises(QwenJaxError, match=message):
        check_mesh(config(**raw), FakeMesh(**mesh))


@given(tensor=st.integers(1, 64), context=st.integers(1, 4), kv=st.integers(1, 8), group=st.integers(1, 8))
def test_the_mesh_named_works_on_as_many_devices(tensor, context, kv, group):
    model = config(num_key_value_heads=kv, num_attention_heads=kv * group, hidden_size=kv * group * 2)
    try:
        check_mesh(model, FakeMesh(context=context, tensor=tensor))
    except QwenJaxError as error:
        words = str(error).rpartition(" ")[2]
        named = {axis: int(size) for axis, _, size in (word.partition("=") for word in words.split(","))}
        check_mesh(model, FakeMesh(**named))
        assert named["context"] * named["tensor"] == context * tensor


@pytest.mark.parametrize("names", [("tensor",), ("tensor", "data"), ("x", "context"), AXES, ("batch",)])
def test_full_mesh_has_every_axis(names):
    mesh = full_mesh(one_device(*names))
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (1, 1, 1)
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_full_mesh_defaults_to_the_current_one():
    assert full_mesh().devices.tolist() == [[[jax.devices()[0]]]]
    with jax.set_mesh(jax.make_mesh((1, 1), ("context", "tensor"), axis_types=(AxisType.Explicit,) * 2)) as _:
        mesh = full_mesh()
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_every_parameter_has_a_sharding():
    model = config(tie_word_embeddings=True)
    placed = shardings(model, full_mesh())
    assert placed.keys() == {p.path for p in params(model)}
    for param in params(model):
        assert len(placed[param.path].spec) == len(param.letters) + param.stacked
