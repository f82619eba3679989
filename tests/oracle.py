"""The whole network once more, in float64 NumPy and without looking at the package: what the tests hold it against.

Written from the formulas alone (`algorithms.md` 1.2, 2.3, 3): every score is computed at its own relative position M[i, j],
from a table of all of them, with no chunks, stages, caches or tiles. For sequences of some hundred tokens.

Letters: T tokens, S keys, D model, N query heads, K KV heads, H head width, F its half, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A network: `tensors` by their Hugging Face names and shapes, `config` as config.json holds it, in the old form.

    Attributes:
        frequencies_F: radians a token of each rotated pair; default: those of rope_theta.
        rotary_factor: what cos and sin are multiplied by.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    frequencies_F: np.ndarray | None = None
    rotary_factor: float = 1.0

    def logits(
        self,
        tokens_T: np.ndarray,
        distances_TT: np.ndarray | None = None,
        temperature_T: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits float64[T, V] of one sequence.

        Args:
            tokens_T: ids [T].
            distances_TT: relative position of query i and key j, [T, T]; default i - j (plain RoPE).
            temperature_T: the factor on the query and on the key of each token, [T]; default 1.
        """
        T = len(tokens_T)
        if distances_TT is None:
            distances_TT = plain_distances(T)
        if temperature_T is None:
            temperature_T = np.ones(T)
        embedding_VD = self._get("model.embed_tokens.weight")
        x_TD = embedding_VD[tokens_T]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x_TD = x_TD + self._attention(
                name, self._norm(name + "input_layernorm", x_TD), distances_TT, temperature_T
            )
            x_TD = x_TD + self._mlp(name, self._norm(name + "post_attention_layernorm", x_TD))
        head_VD = embedding_VD if self.config["tie_word_embeddings"] else self._get("lm_head.weight")
        return self._norm("model.norm", x_TD) @ head_VD.T

    def _get(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name]).astype(np.float64)

    def _norm(self, name: str, x_TD: np.ndarray) -> np.ndarray:
        mean_T1 = np.mean(x_TD**2, axis=-1, keepdims=True)
        return self._get(name + ".weight") * x_TD / np.sqrt(mean_T1 + self.config["rms_norm_eps"])

    def _attention(
        self, layer: str, x_TD: np.ndarray, distances_TT: np.ndarray, temperature_T: np.ndarray
    ) -> np.ndarray:
        T = len(x_TD)
        heads = {"q": self.config["num_attention_heads"], "k": self.config["num_key_value_heads"]}
        heads["v"] = heads["k"]
        projected = {}
        for kind, count in heads.items():
            name = f"{layer}self_attn.{kind}_proj."
            y = x_TD @ self._get(name + "weight").T + self._get(name + "bias")
            projected[kind] = y.reshape(T, count, -1)
        group = heads["q"] // heads["k"]
        q_TNH = projected["q"]
        k_TNH, v_TNH = (np.repeat(projected[kind], group, axis=1) for kind in "kv")
        # Components f and f + H / 2 are one complex number; a position turns it by position * frequency.
        width = q_TNH.shape[-1]
        half = width // 2
        q_TNF, k_TNF = (x[..., :half] + 1j * x[..., half:] for x in (q_TNH, k_TNH))
        turn_TSF = np.exp(1j * distances_TT[..., None] * self._frequencies(half))
        scores_NTS = np.einsum("tnf,snf,tsf->nts", q_TNF, k_TNF.conj(), turn_TSF, optimize=True).real
        scores_NTS *= self.rotary_factor**2 / np.sqrt(width) * np.outer(temperature_T, temperature_T)
        scores_NTS = np.where(np.tri(T, dtype=bool), scores_NTS, -np.inf)
        weights_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
        weights_NTS /= weights_NTS.sum(-1, keepdims=True)
        out_TNH = np.einsum("nts,snh->tnh", weights_NTS, v_TNH)
        return out_TNH.reshape(T, -1) @ self._get(f"{layer}self_attn.o_proj.weight").T

    def _mlp(self, layer: str, x_TD: np.ndarray) -> np.ndarray:
        gate, up, down = (self._get(f"{layer}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        g = x_TD @ gate.T
        return (g / (1 + np.exp(-g)) * (x_TD @ up.T)) @ down.T

    def _frequencies(self, half: int) -> np.ndarray:
        if self.frequencies_F is not None:
            return self.frequencies_F
        return self.config["rope_theta"] ** (-np.arange(half) / half)


def plain_distances(length: int) -> np.ndarray:
    """i - j, int [T, T]; entries with j > i mean nothing."""
    i = np.arange(length)
    return i[:, None] - i


def dual_chunk_distances(length: int, chunk_len: int, clip: int) -> np.ndarray:
    """M[i, j] = min(i - j, C - (j mod s)), int [T, T], for 2s - 1 >= C; entries with j > i mean nothing.

    Args:
        length: T.
        chunk_len: s.
        clip: C.
    """
    assert 2 * chunk_len - 1 >= clip
    return np.minimum(plain_distances(length), clip - np.arange(length) % chunk_len)


def temperatures(prompt: int, length: int, original: int) -> np.ndarray:
    """m of each token, float64[T]: m(prompt) for those of the prompt, m(i + 1) for one generated at position i.

    Args:
        prompt: tokens of the prompt.
        length: T, tokens of prompt and answer.
        original: L0; 0 means no temperature.
    """
    if not original:
        return np.ones(length)
    lengths = np.maximum(np.arange(length) + 1, prompt)
    return np.maximum(1.0, 0.1 * np.log(lengths / original) + 1.0)
