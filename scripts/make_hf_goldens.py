"""Records what transformers computes, for tests/test_parity.py and tests/test_rope.py.

    python scripts/make_hf_goldens.py tests/goldens

Needs torch and transformers 5, and nothing of this project: the checkpoints are made and written by transformers
itself, with random weights, and the numbers beside them come from its own forward pass and its own generate.

    <case>/               the checkpoint, as save_pretrained writes it
    <case>/golden.npz     inputs, logits and greedy tokens, see `record`
    rope.npz              rotary frequencies, cosines and sines, see `record_rope`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.utils import logging

LENGTHS = (48, 31, 1)  # tokens of the rows of the padded batch
NEW_TOKENS = 64
PENALTY = 1.3
MIN_MARGIN = 1e-3  # of the best logit over the second: greedy tokens must not hang on the last bit


class NearTieError(RuntimeError):
    """Two tokens are so near that rounding could decide: take another seed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint. `config` holds what differs from COMMON; `old_form` rewrites config.json as transformers 4 did."""

    name: str
    config: dict[str, Any]
    seed: int = 0
    dtype: torch.dtype = torch.float32
    shard_bytes: int | None = None
    old_form: bool = False


COMMON: dict[str, Any] = {
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# By how much a matrix enlarges what goes in: sharp attention that outweighs the embedding, so that continuations wander.
GAINS = {
    "q_proj": 2.0,
    "k_proj": 2.0,
    "v_proj": 1.2,
    "o_proj": 6.0,
    "gate": 1.2,
    "up": 1.2,
    "down": 3.0,
    "lm_head": 4.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}


def shape(hidden: int, heads: int, kv_heads: int, vocab: int, **rest: Any) -> dict[str, Any]:
    """Config keys of a network's shape."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_parameters": PLAIN,
        **rest,
    }


CASES = (
    # As 0.5B: tied, 7 query heads a KV head, width 64.
    Case(
        "tied_g7_h64",
        shape(48, 14, 2, 131, head_dim=64, num_hidden_layers=3, tie_word_embeddings=True),
        seed=1,
    ),
    # As 14B: 5 query heads a KV head, width 128; several files and an index.
    Case("untied_g5_h128_sharded", shape(40, 5, 1, 97, head_dim=128), seed=1, shard_bytes=150_000),
    # As 7B: 7 query heads a KV head, width 128, stored in bf16.
    Case("untied_g7_h128_bf16", shape(32, 7, 1, 101, head_dim=128), dtype=torch.bfloat16),
    # Every query head its own KV head; the head width follows from the hidden size; other eps and theta; the old form.
    Case(
        "untied_g1_h64_old_form",
        shape(128, 2, 2, 151, rms_norm_eps=1e-5, rope_parameters={**PLAIN, "rope_theta": 1e4}),
        seed=2,
        old_form=True,
    ),
    # The documented long-context recipe at a 1000th of its lengths: once with the longer maximum written out, once, in
    # the old form, as model cards have it: rope_scaling added and the maximum left alone.
    Case("yarn", shape(48, 6, 2, 113, head_dim=64, rope_parameters=YARN, max_position_embeddings=128)),
    Case(
        "yarn_tied_old_form",
        shape(32, 4, 4, 89, head_dim=64, rope_parameters=YARN)
        | {"max_position_embeddings": 32, "tie_word_embeddings": True},
        seed=4,
        old_form=True,
    ),
)


def make_model(case: Case, seed: int) -> Qwen2ForCausalLM:
    """A model whose every tensor matters: no zero bias, no unit norm, layers that outweigh the embedding."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{**COMMON, **case.config})).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            value = 0.5 * torch.randn_like(tensor)
        elif "norm" in name:
            value = 0.5 + torch.rand_like(tensor)
        elif "embed" in name:
            value = 0.3 * torch.randn_like(tensor)
        else:
            kind = next(kind for kind in GAINS if kind in name)
            value = GAINS[kind] * torch.randn_like(tensor) / tensor.shape[1] ** 0.5
        tensor.data.copy_(value)
    return model.to(case.dtype)


def write_checkpoint(case: Case, folder: Path, seed: int) -> None:
    """The checkpoint of a case, written by save_pretrained."""
    sharding = {} if case.shard_bytes is None else {"max_shard_size": case.shard_bytes}
    make_model(case, seed).save_pretrained(folder, **sharding)
    if case.old_form:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["torch_dtype"] = config.pop("dtype")
        config["sliding_window"], config["max_window_layers"] = 4096, 28
        del config["layer_types"]
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def record(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """What transformers computes from the checkpoint in `folder`.

    Returns:
        tokens int64[B, T] right-padded with 0, lengths int64[B]; logits float32[R, V] of the R real positions, row by
        row; bf16_logits, of the weights and activations in bf16; greedy and penalised int64[B, NEW_TOKENS]: greedy
        continuation of each row alone, without and with a repetition penalty; penalty float64.

    Raises:
        NearTieError: two tokens of a greedy step are too near.
        RuntimeError: a padded batch continues otherwise than its rows alone.
    """
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    rows = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in LENGTHS]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    out = {
        "tokens": tokens.numpy(),
        "lengths": np.array(LENGTHS),
        "logits": model(tokens, attention_mask=mask).logits[mask.bool()].numpy(),
        "penalty": np.array(PENALTY),
    }
    left = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    left_mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
    )
    for name, penalty in (("greedy", 1.0), ("penalised", PENALTY)):
        alone = [_continue(model, row[None], torch.ones_like(row)[None], penalty)[0] for row in rows]
        out[name] = np.stack(alone)
        together = _continue(model, left, left_mask, penalty)
        # A penalty counts the padding as a token of the prompt: only the rows alone mean anything.
        if penalty == 1.0 and not np.array_equal(together, out[name]):
            raise RuntimeError(f"{folder.name}: the padded batch continues differently")
    bf16 = model.to(torch.bfloat16)
    out["bf16_logits"] = bf16(tokens, attention_mask=mask).logits[mask.bool()].float().numpy()
    return out


def _continue(
    model: Qwen2ForCausalLM, tokens: torch.Tensor, mask: torch.Tensor, penalty: float
) -> np.ndarray:
    out = model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        repetition_penalty=penalty, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.scores).topk(2).values
    margin = (best[..., 0] - best[..., 1]).min().item()
    if margin < MIN_MARGIN:
        raise NearTieError(f"a greedy step is decided by {margin:.1e}: take another seed")
    return out.sequences[:, tokens.shape[1] :].numpy()


def record_rope() -> dict[str, np.ndarray]:
    """Rotary tables of the plain and of the documented 128K model, all float32 as transformers computes them.

    Returns:
        For kind in plain, yarn: {kind}_frequencies [64], {kind}_factor scalar, {kind}_cos and {kind}_sin [P, 64] at
        `positions` int64[P].
    """
    # Beyond some thousands the recorded angles are themselves rounded: position times a float32 frequency.
    positions = np.array([0, 1, 2, 7, 31, 100, 511, 512, 1000, 4095])
    out = {"positions": positions}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    for kind, rope in (("plain", {"rope_type": "default"}), ("yarn", yarn)):
        config = Qwen2Config(
            hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
            max_position_embeddings=32_768, rope_parameters={"rope_theta": 1e6, **rope},
        )  # fmt: skip
        rotary = Qwen2RotaryEmbedding(config)
        cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
        half = cos.shape[-1] // 2
        out[f"{kind}_frequencies"] = rotary.inv_freq.numpy()
        out[f"{kind}_factor"] = np.array(rotary.attention_scaling)
        out[f"{kind}_cos"], out[f"{kind}_sin"] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    return out


def main() -> None:
    """Writes every golden into the folder given on the command line, in place of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for case in CASES:
        folder = out / case.name
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(case, folder, case.seed)
        golden = record(folder, case.seed)
        np.savez_compressed(folder / "golden.npz", **golden)
        error = np.abs(golden["bf16_logits"] - golden["logits"]).max() / np.abs(golden["logits"]).max()
        distinct = [len(set(row)) for row in golden["greedy"].tolist()]
        print(f"{case.name}: bf16 error {error:.1e}, distinct greedy tokens {distinct}")
    np.savez_compressed(out / "rope.npz", **record_rope())


if __name__ == "__main__":
    main()
