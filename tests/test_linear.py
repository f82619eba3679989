import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny_model import CONFIG, random_model

from qwen_jax import build as building
from qwen_jax.build import build, load
from qwen_jax.convert.synthetic import TINY, write_random_checkpoint
from qwen_jax.errors import QwenJaxError
from qwen_jax.linear import MIN_FP8_ROWS, WEIGHT_DTYPES, Linear, quantise
from qwen_jax.loading import _write_layer, load_params, open_checkpoint
from qwen_jax.model import Qwen2
from qwen_jax.params import params

PLAIN = dataclasses.replace(CONFIG, dual_chunk=None)  # compiles faster
LIMITS = {"int8": 127, "fp8": 448}
OUT, INTO, SPEC = (3, 8), (5, 16), "BTXY,NHXY->BTNH"


def rounding_bound(name: str, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The most that rounding w may move it, both float64; a little more for the arithmetic of float32."""
    if name == "int8":
        return 0.5001 * scale
    return np.maximum(np.abs(w) / 16, scale / 1024) * 1.0001


def expanded(numbers: jax.Array, scale: jax.Array) -> np.ndarray:
    factor = np.asarray(scale, np.float64)
    return np.asarray(numbers).astype(np.float64) * factor.reshape(
        *factor.shape, *(1,) * (numbers.ndim - factor.ndim)
    )


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_rounding_stays_within_its_bound(name: str) -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((*OUT, *INTO)) * np.exp(rng.standard_normal((*OUT, 1, 1)))).astype(np.float32)
    w[1, 2] = 0
    numbers, scale = quantise(jnp.asarray(w), WEIGHT_DTYPES[name], (2, 3))
    assert (numbers.dtype, numbers.shape) == (WEIGHT_DTYPES[name], w.shape)
    assert (scale.dtype, scale.shape) == (jnp.float32, OUT)
    np.testing.assert_allclose(np.asarray(scale), np.abs(w).max((2, 3)) / LIMITS[name], rtol=1e-6)
    error = np.abs(expanded(numbers, scale) - w)
    assert (error <= rounding_bound(name, w.astype(np.float64), np.asarray(scale)[..., None, None])).all()
    assert error.max() > 0
    assert not expanded(numbers, scale)[1, 2].any()


def linear(dtype: str, name: str, *, fp8_products: bool = False) -> Linear:
    layer = Linear(
        OUT, INTO, bias=True, dtype=jnp.dtype(dtype), weight_dtype=WEIGHT_DTYPES[name], fp8_products=fp8_products,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert layer.bias is not None
    layer.bias[...] = jax.random.normal(jax.random.key(1), OUT, dtype)
    return layer


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("name", WEIGHT_DTYPES)
@pytest.mark.parametrize("rows", [(1, 1), (2, 7), (2, MIN_FP8_ROWS)])
def test_product_with_8_bit_weights(dtype: str, digits: int, name: str, rows: tuple[int, int]) -> None:
    """Inputs so large that sums over unscaled numbers leave float16."""
    layer = linear(dtype, name)
    assert layer.scale is not None
    assert layer.bias is not None
    x = 60 * jax.random.normal(jax.random.key(2), (*rows, *INTO), dtype)
    x64, w64 = np.asarray(x, np.float64), expanded(layer.weight[...], layer.scale[...])
    product = np.einsum(SPEC, x64, w64)
    want = product + np.asarray(layer.bias[...], np.float64)
    got = layer(x, SPEC)
    assert got.dtype == jnp.dtype(dtype)
    # One rounding before the bias, one behind it, and float32 sums of 80 terms.
    bound = (np.abs(product) + np.abs(want)) * 2.0**-digits * 1.05
    bound += np.einsum(SPEC, np.abs(x64), np.abs(w64)) * 80 * 2.0**-24
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


def test_product_of_fp8_with_fp8() -> None:
    """Against products in float64 of numbers rounded by ml_dtypes; one token's outlier leaves the others alone."""
    layer = linear("float32", "fp8", fp8_products=True)
    assert layer.scale is not None
    assert layer.bias is not None
    x = np.array(jax.random.normal(jax.random.key(2), (2, MIN_FP8_ROWS // 2, *INTO)))
    x[1, 3, 2, 2] = 1e4
    x[0, 5] = 0
    factor = np.abs(x).max((2, 3), keepdims=True) / np.float32(448)
    x8 = (x / np.where(factor > 0, factor, 1)).astype(ml_dtypes.float8_e4m3fn)
    w64 = expanded(layer.weight[...], layer.scale[...])
    want = np.einsum(SPEC, x8.astype(np.float64) * factor, w64) + np.asarray(layer.bias[...], np.float64)
    got = np.asarray(layer(jnp.asarray(x), SPEC))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    exact = np.asarray(linear("float32", "fp8")(jnp.asarray(x), SPEC))
    assert 1e-3 < np.abs(got - exact)[0].max() < 0.1 * np.abs(exact).max()
    np.testing.assert_array_equal(got[0, 5], exact[0, 5])


def test_few_rows_keep_their_activations() -> None:
    x = jax.random.normal(jax.random.key(2), (1, MIN_FP8_ROWS - 1, *INTO))
    layers = linear("float32", "fp8", fp8_products=True), linear("float32", "fp8")
    np.testing.assert_array_equal(layers[0](x, SPEC), layers[1](x, SPEC))


def rounded_model(name: str) -> tuple[Qwen2, Qwen2]:
    """(a model of 8-bit matrices, the float32 model of the same rounded values)."""
    state = nnx.state(random_model(PLAIN))
    arrays = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    plain = dict(arrays)
    for p in params(PLAIN):
        if p.is_layer_matrix:
            axes = range(1 + len(p.out_letters), arrays[p.path].ndim)
            arrays[p.path], arrays[p.scale_path] = quantise(arrays[p.path], WEIGHT_DTYPES[name], axes)
            plain[p.path] = jnp.asarray(expanded(arrays[p.path], arrays[p.scale_path]), jnp.float32)
    return build(PLAIN, arrays), build(PLAIN, plain)


def test_a_model_computes_what_its_rounded_weights_say() -> None:
    """Every matrix with its own scale: the two differ by the order of float32 operations only."""
    eight, plain = rounded_model("int8")
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, PLAIN.vocab_size, (1, 20)))
    want = np.asarray(plain(tokens_BT))
    np.testing.assert_allclose(np.asarray(eight(tokens_BT)), want, atol=2e-4 * np.abs(want).max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear") / "hf"
    write_random_checkpoint(folder, TINY)
    return folder


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_loading_rounds_the_matrices_and_nothing_else(folder: Path, name: str) -> None:
    source = open_checkpoint(folder)
    plain = load_params(source)
    eight = load_params(source, dtype=jnp.float32, weight_dtype=WEIGHT_DTYPES[name])
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    spread = load_params(source, dtype=jnp.float32, mesh=mesh, weight_dtype=WEIGHT_DTYPES[name])
    scales = {p.scale_path for p in params(source.config) if p.is_layer_matrix}
    assert eight.keys() == spread.keys() == plain.keys() | scales
    for p in params(source.config):
        if not p.is_layer_matrix:
            assert eight[p.path].dtype == jnp.float32
            np.testing.assert_array_equal(np.asarray(eight[p.path]), np.asarray(plain[p.path], np.float32))
            continue
        numbers, scale = eight[p.path], eight[p.scale_path]
        assert (numbers.dtype, scale.dtype) == (WEIGHT_DTYPES[name], jnp.float32)
        assert scale.shape == numbers.shape[: 1 + len(p.out_letters)]
        w = np.asarray(plain[p.path], np.float64)
        wide = np.asarray(scale, np.float64).reshape(*scale.shape, *(1,) * (w.ndim - scale.ndim))
        assert (np.abs(expanded(numbers, scale) - w) <= rounding_bound(name, w, wide)).all()
        for path in (p.path, p.scale_path):  # however the matrix is split, also over what it sums
            assert np.asarray(spread[path]).tobytes() == np.asarray(eight[path]).tobytes()
        assert len({shard.device for shard in spread[p.path].addressable_shards}) == 4
        assert spread[p.path].addressable_shards[0].data.size == numbers.size // 2


def test_a_mesh_gives_the_logits_of_one_device(folder: Path) -> None:
    tokens_BT = np.random.default_rng(0).integers(0, 96, (1, MIN_FP8_ROWS))
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    one, two = (
        np.asarray(load(folder, dtype="float32", matmul="fp8", mesh=m)(tokens_BT)) for m in (None, mesh)
    )
    np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())


def test_a_device_never_holds_the_unrounded_stack() -> None:
    """Numbers and scales are written in place; the temporaries are those of one layer's matrix."""
    mesh = building.full_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None))
    scales = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
    stacks = (
        jax.ShapeDtypeStruct((64, 512, 512), jnp.int8, sharding=sharding),
        jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=scales),
    )
    layer = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    memory = _write_layer.lower(stacks, layer, np.int32(0), (sharding, scales)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 64 * 512 * 512 + 64 * 512 * 4
    assert memory.temp_size_in_bytes <= 2 * 512 * 512 * 4


def test_decode_expands_at_most_a_layer() -> None:
    """The program holds no float copy of the stack of 8-bit matrices."""
    config = dataclasses.replace(CONFIG, num_layers=16, hidden_size=128, intermediate_size=512)
    model = nnx.eval_shape(lambda: Qwen2(config, weight_dtype="int8", rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def run(state: nnx.State, x_BTD: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).run_layers(
            x_BTD, jnp.zeros((1, 1), jnp.int32), None, lambda q, k, v, cache, layer: (q + k.mean() + v.mean(), cache)
        )[0]  # fmt: skip

    compiled = jax.jit(run).lower(state, jax.ShapeDtypeStruct((1, 1, 128), jnp.float32)).compile()
    a_layer = sum(int(np.prod(p.shape(config))) for p in params(config) if p.is_layer_matrix)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * a_layer < 16 * a_layer


class OldGPU:
    device_kind, compute_capability = "NVIDIA A100", "8.0"


def test_refusals(folder: Path) -> None:
    with pytest.raises(QwenJaxError, match="weight_dtype='q4' is not one of int8, fp8; dtype= takes"):
        load(folder, weight_dtype="q4")
    with pytest.raises(QwenJaxError, match="matmul='int8' is not known: there is fp8"):
        load(folder, matmul="int8")
    with pytest.raises(QwenJaxError, match="multiplies fp8 weights, weight_dtype='int8' are not"):
        load(folder, matmul="fp8", weight_dtype="int8")
    with pytest.raises(
        QwenJaxError, match=r"needs a GPU of compute capability 8.9 or more, NVIDIA A100 has 8.0"
    ):
        building._check_multiplies_fp8(OldGPU())  # type: ignore[arg-type]
