"""config.json of every released size in both forms, exact parameter counts, and a refusal of all that is not understood."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import DualChunk, ModelConfig, SparseAttention, Yarn
from qwen_jax.errors import ConfigError
from qwen_jax.model import Qwen2
from qwen_jax.params import num_params, params
from tests.released_configs import HEAD_DIM, LONG, NAMES, NUM_PARAMS, new_form, old_form

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
NAME = "Qwen2.5-7B-Instruct"


def changed(**keys: Any) -> dict[str, Any]:
    """The released 7B config with some keys changed, or left out where the value is `...`."""
    return {k: v for k, v in {**old_form(NAME), **keys}.items() if v is not ...}


def read(**keys: Any) -> ModelConfig:
    return ModelConfig.from_dict(changed(**keys))


def refusal(**keys: Any) -> str:
    """The message with which the changed config is refused; one line, and short."""
    with pytest.raises(ConfigError) as caught:
        read(**keys)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


# What is read.


@pytest.mark.parametrize("name", NAMES)
def test_released_sizes(name: str) -> None:
    raw = old_form(name)
    config = ModelConfig.from_dict(raw)
    assert config == ModelConfig.from_dict(new_form(name))
    assert num_params(config) == NUM_PARAMS[name]
    assert config.head_dim == HEAD_DIM[name]
    assert config.group_size == raw["num_attention_heads"] // raw["num_key_value_heads"]
    assert config.rms_norm_eps == raw["rms_norm_eps"]
    assert config.rope_theta == raw["rope_theta"]
    assert config.max_position_embeddings == raw["max_position_embeddings"]
    assert config.tie_embeddings == raw["tie_word_embeddings"]
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (raw["eos_token_id"],)
    assert (config.bos_token_id, config.pad_token_id, config.yarn) == (151_643, None, None)
    assert (config.dual_chunk is not None) == (name in LONG)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_exactly_these_parameters(name: str) -> None:
    """Abstract: nothing is allocated. The table of parameters and the model are two independent statements of it."""
    config = ModelConfig.from_dict(old_form(name))
    model = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    leaves = {".".join(map(str, path)): leaf.get_value() for path, leaf in state}
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == NUM_PARAMS[name]
    assert {leaf.dtype.name for leaf in leaves.values()} == {"bfloat16"}
    table = {p.path: ((config.num_layers,) if p.stacked else ()) + p.shape(config) for p in params(config)}
    assert {path: leaf.shape for path, leaf in leaves.items()} == table
    for p in params(config):
        assert math.prod(p.hf_shape(config)) == math.prod(p.shape(config))


def test_logits_of_the_largest_model_abstractly() -> None:
    config = ModelConfig.from_dict(old_form("Qwen2.5-72B"))
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((2, 8), "int32")
    out = jax.eval_shape(lambda state, tokens: nnx.merge(graph, state)(tokens), state, tokens)
    assert (out.shape, out.dtype.name) == ((2, 8, 152_064), "float32")


@pytest.mark.parametrize("name", LONG)
def test_dual_chunk_of_the_1m_models(name: str) -> None:
    dca = ModelConfig.from_dict(old_form(name)).dual_chunk
    assert dca == DualChunk(262_144, 8192, 262_144)
    assert (dca.chunk_len, dca.saturation) == (253_952, 262_144)


def test_dual_chunk_defaults_are_those_of_the_released_engine() -> None:
    assert read(dual_chunk_attention_config={}).dual_chunk == DualChunk(8192, 1024, 0)
    assert read(dual_chunk_attention_config=None).dual_chunk is None


def test_sparse_attention_settings() -> None:
    assert read().sparse == SparseAttention(None, 32_768, 64)
    section = {
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": 10,
        "sparse_attention_last_q": 32,
        "sparse_attention_config": {},
    }
    assert read(dual_chunk_attention_config=section).sparse == SparseAttention(True, 10, 32)


def test_yarn_in_every_form() -> None:
    new = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "original_max_position_embeddings": 32_768}
    forms = [
        read(rope_scaling=YARN),
        read(rope_scaling={**YARN, "rope_type": "yarn"}),
        read(rope_theta=..., rope_parameters=new),
        read(rope_parameters=new),  # the theta beside it agrees
        read(rope_parameters=new, rope_scaling=YARN),  # both, in agreement
        read(rope_scaling={k: v for k, v in YARN.items() if not k.startswith("original")}),
    ]
    assert {config.yarn for config in forms} == {Yarn(4.0, 32_768)}
    assert {config.rope_theta for config in forms} == {1e6}
    # As the model cards write it, with the maximum left at 32,768, and as vLLM users do, with it raised.
    assert {config.max_position_embeddings for config in forms} == {131_072}
    assert read(rope_scaling=YARN, max_position_embeddings=200_000).max_position_embeddings == 200_000
    everything = {**YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    assert read(rope_scaling=everything).yarn == Yarn(4.0, 32_768, 1.5, 16.0, 2.0, False)


def test_defaults_are_those_of_transformers() -> None:
    absent = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "torch_dtype")
    config = read(**dict.fromkeys(absent, ...), eos_token_id=None)
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10_000.0
    assert config.max_position_embeddings == 32_768
    assert config.tie_embeddings is False
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()
    assert read(num_key_value_heads=None).num_kv_heads == 28
    assert read(head_dim=None).head_dim == 128


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
        ({"dtype": None}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16"),
    ],
)
def test_dtype(keys: dict[str, Any], dtype: str) -> None:
    assert read(**keys).dtype == dtype


def test_explicit_head_dim_need_not_divide_the_hidden_size() -> None:
    assert read(hidden_size=3000, head_dim=64).head_dim == 64


@pytest.mark.parametrize(
    "harmless",
    [
        {"use_mrope": False},
        {"sliding_window": None},
        {"quantization_config": None},
        {"attention_bias": False},
        {"rope_scaling": {}},
        {"rope_scaling": {"rope_type": "default"}},
        {"_name_or_path": "somewhere", "unsloth_version": "2025.1", "temperature": 0.7},
        {"auto_map": {"AutoTokenizer": "tokenization.Tokenizer"}},
        {"eos_token_id": [151_645, 151_643]},
    ],
    ids=str,
)
def test_keys_that_change_nothing(harmless: dict[str, Any]) -> None:
    assert num_params(read(**harmless)) == NUM_PARAMS[NAME]


# What is refused, and by what name.


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": ...}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 27}, "layer_types"),
        ({"layer_types": [["full_attention"]] * 28}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"use_mrope": True}, "use_mrope"),
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk"),
        ({"use_logn_attn": True}, "use_logn_attn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
        ({"num_experts": 8}, "num_experts"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"is_causal": False}, "is_causal"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_would_change_the_numbers_is_refused(keys: dict[str, Any], named: str) -> None:
    assert named in refusal(**keys)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "'llama3'"),
        ({"rope_type": "linear", "factor": 2.0}, "'linear'"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "'mrope'"),
        ({"rope_type": ["yarn"]}, "yarn"),
        ({"rope_type": "yarn", "type": "linear", "factor": 4.0}, "rope_type and type"),
        ({"rope_type": "default", "factor": 4.0}, "'factor'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
        ({"full_attention": {"rope_type": "default"}}, "'full_attention'"),
        ({**YARN, "mscale": 0.7}, "'mscale'"),
        ({"type": "yarn"}, "'factor'"),
        ({"type": "yarn", "factor": "4"}, "factor"),
        ({"type": "yarn", "factor": 0.5}, "factor"),
        ({"type": "yarn", "factor": math.inf}, "factor"),
        ({**YARN, "truncate": 1}, "truncate"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**YARN, "original_max_position_embeddings": 1.5}, "original_max_position_embeddings"),
        ("yarn", "yarn"),
        ([], "[]"),
    ],
)
def test_rope_that_is_not_understood(where: str, rope: Any, named: str) -> None:
    message = refusal(**{where: rope})
    assert named in message
    assert "rope" in message or "factor" in message or "truncate" in message or "original" in message


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_two_forms_that_differ(keys: dict[str, Any]) -> None:
    message = refusal(**keys)
    assert "rope_parameters" in message
    assert "differ" in message


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"chunk_size": 8192, "local_size": 1024, "mode": "x"}, "'mode'"),
        ({"chunk_size": 8192, "local_size": 8192}, "local_size"),
        ({"chunk_size": 8192, "local_size": 0}, "local_size"),
        ({"chunk_size": "8192"}, "chunk_size"),
        ({"original_max_position_embeddings": -1}, "original_max_position_embeddings"),
        ({"sparse_attention_enabled": "yes"}, "sparse_attention_enabled"),
        (True, "dual_chunk_attention_config"),
    ],
)
def test_dual_chunk_that_is_not_understood(section: Any, named: str) -> None:
    assert named in refusal(dual_chunk_attention_config=section)


def test_dual_chunk_and_yarn_exclude_each_other() -> None:
    message = refusal(dual_chunk_attention_config={}, rope_scaling=YARN)
    assert "dual chunk" in message
    assert "yarn" in message


@pytest.mark.parametrize("clip", [253_951 - 253_952 + 0, 7, 262_145])
def test_clip_outside_its_range(clip: int) -> None:
    with pytest.raises(ConfigError, match="clip"):
        DualChunk(262_144, 8192, clip=clip)
    assert DualChunk(262_144, 8192, clip=262_143).saturation == 262_143


REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
# What each key may hold, besides nothing.
KINDS: dict[str, type] = {
    **dict.fromkeys([*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"], int),
    **dict.fromkeys(["rms_norm_eps", "rope_theta"], float),
    "tie_word_embeddings": bool,
    "torch_dtype": str,
}


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", [..., None])
def test_missing_keys(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    assert repr(key) in message
    assert "missing" in message


@given(
    st.sampled_from(sorted(KINDS)),
    st.one_of(
        st.booleans(), st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers()),
        st.integers(max_value=0), st.floats(), st.floats(max_value=0), st.integers(max_value=5),
    ),
)  # fmt: skip
@settings(deadline=None)
def test_ill_typed_values(key: str, value: Any) -> None:
    """Another kind, a sign, an infinity: named, on one line; what is accepted is of the right kind."""
    try:
        read(**{key: value})
    except ConfigError as error:
        message = str(error)
        assert key in message or key.removesuffix("_hidden_layers") in message or "layers" in message
        assert "\n" not in message
    else:
        accepted = (int, float) if KINDS[key] is float else KINDS[key]
        assert isinstance(value, accepted)
        assert isinstance(value, bool) == (KINDS[key] is bool)
        assert not isinstance(value, float) or 0 < value < math.inf


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from(
        [*sorted(old_form(LONG[0])), "rope_scaling", "rope_parameters", "layer_types", "auto_map"]
    ),
)
@settings(deadline=None)
def test_no_value_of_any_key_gives_anything_but_a_config_or_a_refusal(value: Any, key: str) -> None:
    raw = {**old_form(LONG[0]), key: value}
    message = ""
    try:
        ModelConfig.from_dict(raw)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "broken JSON"),
        ('{"model_type": "qwen2",}', "broken JSON"),
        ("", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[]", "not a JSON object"),
        ("\xff", "broken JSON"),
    ],
    ids=range(6),
)
def test_broken_files(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.from_folder(tmp_path)


def test_a_refused_key_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(use_sliding_window=True)))
    with pytest.raises(ConfigError, match=r"config\.json: use_sliding_window"):
        ModelConfig.from_folder(tmp_path)
