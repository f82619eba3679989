"""generation_config.json: the sampling defaults a checkpoint ships, and a refusal of what we do not do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwen_jax.config import read_json, token_ids
from qwen_jax.errors import ConfigError

# What decoding methods and logit processors not done here are worth when they are off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "is_assistant": (False,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}

_READ = {
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "eos_token_id", "max_new_tokens",
}  # fmt: skip

# Keys that cannot change which tokens are sampled here. max_length counts prompt and answer together and its
# old default of 20 would cut every prompt: the limit here is max_len.
_HARMLESS = {
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "max_length", "max_window_size", "chat_format", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "return_legacy_cache", "prefill_chunk_size", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "renormalize_logits", "remove_invalid_values",
    "early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind", "max_matching_ngram_size",
    "speculation_type", "use_mtp", "generation_kwargs",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says. The values here stand for keys it lacks.

    An absent top_k means no limit. (transformers 4 put 50 there; Qwen2.5 checkpoints name theirs.)
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> GenerationDefaults:
        """Reads `folder/generation_config.json`; the neutral values when there is none.

        Raises:
            ConfigError: broken JSON, a value of the wrong type, or a setting that we do not do: it is named.
        """
        path = Path(folder) / "generation_config.json"
        if not path.is_file():
            return cls()
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> GenerationDefaults:
        """Builds the defaults from what generation_config.json holds.

        Raises:
            ConfigError: as `from_folder`.
        """
        if not isinstance(raw, dict):
            raise ConfigError("not a JSON object")
        for key in sorted(raw.keys() - _READ - _HARMLESS):
            value = raw[key]
            if value is None or value in _NEUTRAL.get(key, (False,)):
                continue
            if key in _NEUTRAL:
                raise ConfigError(f"{key} = {value!r:.80} is not supported; remove it to sample without it")
            raise ConfigError(
                f"key {key!r} = {value!r:.80} is not understood; remove it if it does not matter"
            )
        values = {
            "do_sample": _typed(raw, "do_sample", bool),
            "temperature": _typed(raw, "temperature", float),
            "top_k": _typed(raw, "top_k", int),
            "top_p": _typed(raw, "top_p", float),
            "repetition_penalty": _typed(raw, "repetition_penalty", float),
            "max_new_tokens": _typed(raw, "max_new_tokens", int),
            "eos_token_ids": token_ids(raw.get("eos_token_id"), "eos_token_id"),
        }
        if values["max_new_tokens"] is not None and values["max_new_tokens"] < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {values['max_new_tokens']}")
        return cls(**{key: value for key, value in values.items() if value is not None})


def _typed(raw: dict[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, None when absent; ranges are checked where the value is used."""
    value = raw.get(key)
    if value is None:
        return None
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
        names = {bool: "true or false", float: "a number", int: "an integer"}
        raise ConfigError(f"{key} must be {names[kind]}, got {value!r:.80}")
    return kind(value)
