"""`ModelConfig`: everything `config.json` says that changes the numbers, and a refusal of all it says that we do not do.

Both forms are read: the old one (`rope_theta`, `rope_scaling`) and the one transformers 5 writes
(`rope_parameters`, `layer_types`). `algorithms.md` 1.1 lists the released sizes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError
from qwen_jax.json_fields import boolean, integer, number, optional_id, read_json, token_ids

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class DualChunk:
    """Dual chunk attention (arXiv 2402.17463; `algorithms.md` 2): RoPE whose distances saturate beyond the training length.

    Attributes:
        chunk_size: c, the longest distance the model was trained on, in tokens.
        local_size: w, the window of exact distances kept across a chunk boundary, in tokens.
        original_max_position_embeddings: L0 of the length temperature m(L) = max(1, 0.1 ln(L / L0) + 1),
            in tokens; 0 switches the temperature off, as in the released engine.
        clip: C, the distance at which positions saturate. None means c, what the released engines do;
            the papers print c - 1.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0
    clip: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise ConfigError(
                f"dual chunk attention needs 0 < local_size < chunk_size, got chunk_size={self.chunk_size}, "
                f"local_size={self.local_size}"
            )
        if self.original_max_position_embeddings < 0:
            raise ConfigError(
                "original_max_position_embeddings must be 0 (no length temperature) or positive"
            )
        if not self.chunk_len <= self.saturation <= self.chunk_size:
            raise ConfigError(
                f"the clip constant must lie in [{self.chunk_len}, {self.chunk_size}], got {self.clip}"
            )

    @property
    def chunk_len(self) -> int:
        """s = c - w: the length of one chunk of positions, in tokens."""
        return self.chunk_size - self.local_size

    @property
    def saturation(self) -> int:
        """C: the largest distance any key is ever seen at, in tokens."""
        return self.chunk_size if self.clip is None else self.clip


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN frequencies and attention factor (arXiv 2309.00071; `algorithms.md` 3.3), as transformers computes them."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"rope_scaling: yarn's factor must be at least 1, got {self.factor}")
        if self.original_max_position_embeddings < 1:
            raise ConfigError("rope_scaling: yarn's original_max_position_embeddings must be positive")

    @property
    def reach(self) -> int:
        """Positions the stretched frequencies serve, tokens."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """When vertical-slash prefill is on (`algorithms.md` 4.1). `enabled` None: on if the folder holds a budget file."""

    enabled: bool | None = None
    threshold: int = 32_768
    last_q: int = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen2.5 model and the positions it uses. Sizes are counts, lengths are tokens.

    max_position_embeddings includes what YaRN adds: at least its factor times its original length.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
    sparse: SparseAttention = SparseAttention()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be even and positive to rotate in pairs, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"torch_dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.yarn and self.dual_chunk:
            raise ConfigError(
                "dual chunk attention works on unmodified frequencies and cannot be combined with "
                "rope_scaling of type yarn: remove one of the two"
            )

    @property
    def group_size(self) -> int:
        """G: query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def sizes(self) -> dict[str, int]:
        """Size by dimension letter (D model, F MLP, N query heads, K KV heads, G, H head width, V vocabulary, L layers)."""
        return {
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "G": self.group_size,
            "H": self.head_dim,
            "V": self.vocab_size,
            "L": self.num_layers,
        }

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises:
            ConfigError: no such file, broken JSON, or a key that `from_dict` refuses.
        """
        path = Path(folder) / "config.json"
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Builds the config from what `config.json` holds.

        Raises:
            ConfigError: another model_type, a missing or ill-typed key, or any rope, attention or quantisation
                key that is not understood: it is named, never ignored.
        """
        if not isinstance(raw, dict):
            raise ConfigError("not a JSON object")
        if raw.get("model_type") != "qwen2":
            raise ConfigError(f"model_type is {raw.get('model_type')!r}; this is code for 'qwen2' (Qwen2.5)")
        _refuse_unknown(raw)
        raw = {key: value for key, value in raw.items() if value is not None or key not in _NULL_IS_ABSENT}
        hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
        if "head_dim" not in raw and heads and hidden % heads:
            raise ConfigError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        theta, yarn = _rope(raw)
        positions = integer(raw, "max_position_embeddings", 32_768)
        return cls(
            vocab_size=integer(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(raw, "intermediate_size"),
            num_layers=integer(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=integer(raw, "num_key_value_heads", heads),
            head_dim=integer(raw, "head_dim", hidden // heads if heads else 0),
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            # Model cards add rope_scaling and leave the maximum at the original length.
            max_position_embeddings=max(positions, yarn.reach) if yarn else positions,
            tie_embeddings=boolean(raw, "tie_word_embeddings", False),
            dtype=_dtype(raw),
            yarn=yarn,
            dual_chunk=_dual_chunk(raw),
            sparse=_sparse(raw),
            bos_token_id=optional_id(raw, "bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id"), "eos_token_id"),
            pad_token_id=optional_id(raw, "pad_token_id"),
        )


# Keys of config.json that change nothing here, or are checked where their value matters.
_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "tie_word_embeddings", "dtype", "torch_dtype", "dual_chunk_attention_config",
    "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "layer_types", "use_sliding_window",
}  # fmt: skip
_HARMLESS = {
    "architectures", "transformers_version", "use_cache", "initializer_range", "attention_dropout", "sliding_window",
    "max_window_layers", "_name_or_path", "auto_map", "output_attentions", "output_hidden_states", "return_dict",
    "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "chunk_size_feed_forward",
    "max_length", "id2label", "label2id", "problem_type", "torchscript", "use_bfloat16",
}  # fmt: skip
# Written as null for "derive it from the others".
_NULL_IS_ABSENT = {"head_dim", "num_key_value_heads"}
# An unknown key whose name holds one of these may change the numbers: refused unless it is null, false or empty.
_SUSPECT = (
    "rope", "rotary", "yarn", "attn", "attention", "sliding", "window", "quant", "chunk", "scal", "bias", "norm",
    "expert", "moe", "softcap", "layer", "head", "hidden", "act", "residual", "multiplier", "position", "embed", "ntk",
    "compress", "spars", "lora", "adapter",
)  # fmt: skip


def _refuse_unknown(raw: dict[str, Any]) -> None:
    if raw.get("use_sliding_window"):
        raise ConfigError("use_sliding_window: true is not supported; no released Qwen2.5 model uses it")
    types = raw.get("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or any(kind != "full_attention" for kind in types)
        or len(types) != raw.get("num_hidden_layers")
    ):
        raise ConfigError(
            f"layer_types must name full_attention once for each of the layers, got {types!r:.80}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {raw['hidden_act']!r} is not supported; Qwen2.5 uses 'silu'")
    if raw.get("is_causal", True) is not True:
        raise ConfigError(f"is_causal {raw['is_causal']!r:.80} is not supported; Qwen2.5 is causal")
    remote = raw.get("auto_map") or {}
    if not isinstance(remote, dict) or any(str(name).startswith("AutoModel") for name in remote):
        raise ConfigError(
            "auto_map names model code of its own, which may differ from Qwen2.5: not supported"
        )
    for key in sorted(raw.keys() - _READ - _HARMLESS):
        if raw[key] and any(word in key.lower() for word in _SUSPECT):
            raise ConfigError(
                f"key {key!r} = {raw[key]!r:.80} is not understood and may change the model's output"
            )


def _rope(raw: dict[str, Any]) -> tuple[float, Yarn | None]:
    """theta and YaRN, from the old form, the new one, or both if they agree."""
    parameters = raw.get("rope_parameters")
    if parameters is None:
        return number(raw, "rope_theta", 10_000.0), _scaling("rope_scaling", raw.get("rope_scaling"), raw)
    if not isinstance(parameters, dict):
        raise ConfigError(f"rope_parameters must be an object, got {parameters!r:.80}")
    theta = number(parameters, "rope_theta", number(raw, "rope_theta", 10_000.0))
    yarn = _scaling("rope_parameters", _without_theta(parameters), raw)
    if "rope_theta" in raw and number(raw, "rope_theta") != theta:
        raise ConfigError("both rope_parameters and rope_theta are set, and they differ")
    old = raw.get("rope_scaling")
    if old is not None and _scaling("rope_scaling", _without_theta(old), raw) != yarn:
        raise ConfigError("both rope_parameters and rope_scaling are set, and they differ")
    return theta, yarn


def _without_theta(scaling: Any) -> Any:
    return {k: v for k, v in scaling.items() if k != "rope_theta"} if isinstance(scaling, dict) else scaling


def _scaling(where: str, scaling: Any, raw: dict[str, Any]) -> Yarn | None:
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise ConfigError(f"{where} must be an object or null, got {scaling!r:.80}")
    kinds = [scaling[key] for key in ("rope_type", "type") if key in scaling] or ["default"]
    kind = kinds[0]
    if any(other != kind for other in kinds):
        raise ConfigError(f"{where}: rope_type and type differ")
    known = {"rope_type", "type"}
    if kind == "yarn":
        known |= {field.name for field in dataclasses.fields(Yarn)}
    elif kind != "default":
        raise ConfigError(f"{where}: type {kind!r} is not supported; only 'default' and 'yarn' are")
    for key in sorted(scaling.keys() - known):
        raise ConfigError(f"{where}: key {key!r} is not understood for type {kind!r}")
    if kind == "default":
        return None
    factor = scaling.get("attention_factor")
    original = integer(raw, "max_position_embeddings", 32_768)
    return Yarn(
        factor=number(scaling, "factor"),
        original_max_position_embeddings=integer(scaling, "original_max_position_embeddings", original),
        attention_factor=None if factor is None else number(scaling, "attention_factor"),
        beta_fast=number(scaling, "beta_fast", 32.0),
        beta_slow=number(scaling, "beta_slow", 1.0),
        truncate=boolean(scaling, "truncate", True),
    )


_SPARSE_KEYS = {
    "sparse_attention_config", "sparse_attention_enabled", "sparse_attention_threshold", "sparse_attention_last_q",
}  # fmt: skip
_DUAL_CHUNK_KEYS = {"chunk_size", "local_size", "original_max_position_embeddings"}


def _dual_chunk_section(raw: dict[str, Any]) -> dict[str, Any] | None:
    section = raw.get("dual_chunk_attention_config")
    if section is None:
        return None
    if not isinstance(section, dict):
        raise ConfigError(f"dual_chunk_attention_config must be an object, got {section!r:.80}")
    for key in sorted(section.keys() - _DUAL_CHUNK_KEYS - _SPARSE_KEYS):
        raise ConfigError(f"dual_chunk_attention_config: key {key!r} is not understood")
    return section


def _dual_chunk(raw: dict[str, Any]) -> DualChunk | None:
    section = _dual_chunk_section(raw)
    if section is None:
        return None
    # The released engine's defaults for absent keys (algorithms.md 2.1).
    return DualChunk(
        chunk_size=integer(section, "chunk_size", 8192),
        local_size=integer(section, "local_size", 1024),
        original_max_position_embeddings=integer(section, "original_max_position_embeddings", 0),
    )


def _sparse(raw: dict[str, Any]) -> SparseAttention:
    section = _dual_chunk_section(raw) or {}
    enabled = section.get("sparse_attention_enabled")
    return SparseAttention(
        enabled=None if enabled is None else boolean(section, "sparse_attention_enabled", False),
        threshold=integer(section, "sparse_attention_threshold", 32_768),
        last_q=integer(section, "sparse_attention_last_q", 64),
    )


def _dtype(raw: dict[str, Any]) -> str:
    """The tensors' dtype; float32 where config.json names none, as in torch."""
    for key in ("dtype", "torch_dtype"):
        if raw.get(key) is not None:
            name = raw[key]
            if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
                raise ConfigError(f"{key} must be one of {', '.join(DTYPES)}, got {name!r:.80}")
            return name.removeprefix("torch.")
    return "float32"
