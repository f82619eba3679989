"""Whether prefill is sparse: what the caller asks for, what config.json says, and whether there is a budget file."""

from __future__ import annotations

from pathlib import Path

from qwen_jax.config import ModelConfig
from qwen_jax.errors import QwenJaxError
from qwen_jax.sparsity.attention import SparsePrefill
from qwen_jax.sparsity.budgets import FILE_NAME, LineBudgets, read

VERTICAL_SLASH, BANDS, NONE = "vertical-slash", "bands", "none"
_NAMES = f"{VERTICAL_SLASH}, {BANDS}, {BANDS}:SHARE, {NONE}"


class SparsityError(QwenJaxError):
    """A wish for sparse prefill that cannot be met."""


def check_name(sparsity: str | None) -> None:
    """Refuses what is not a way of sparse prefill, by name, before anything is loaded.

    Raises:
        QwenJaxError: neither None, "vertical-slash", "bands", "bands:SHARE" with a share in (0, 1], nor "none".
    """
    if sparsity not in (None, VERTICAL_SLASH, NONE):
        assert sparsity is not None
        _share(sparsity)


def _share(sparsity: str) -> float:
    """The number in "bands:0.5"; 1 for "bands"."""
    name, colon, share = sparsity.partition(":")
    if name != BANDS:
        raise SparsityError(f"sparsity={sparsity!r:.40} is not one of {_NAMES}")
    try:
        number = float(share) if colon else 1.0
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise SparsityError(f"sparsity={sparsity!r:.40}: the share must be a number above 0, at most 1")
    return number


def sparse_prefill(sparsity: str | None, folder: Path | None, config: ModelConfig) -> SparsePrefill | None:
    """The sparse prefill of a checkpoint, or None for dense attention.

    Args:
        sparsity: "vertical-slash"; "bands", or "bands:SHARE" for that share of the pairs that the former computes; "none";
            or None: vertical-slash if the folder holds a budget file and config.json does not switch it off
            (`algorithms.md` 4.1).
        folder: the checkpoint's; None for a model that was loaded before, which has no budgets.
        config: its config.

    Raises:
        QwenJaxError: an unknown name; sparse prefill asked for, by the caller or by config.json, without a budget file;
            a budget file that `budgets.read` refuses; sparse_attention_last_q of 0.
    """
    check_name(sparsity)
    path = folder / FILE_NAME if folder is not None else None
    there = path is not None and path.is_file()
    wanted = config.sparse.enabled if sparsity is None else sparsity != NONE
    if wanted is False or (wanted is None and not there):
        return None
    if path is None:
        if sparsity is None:
            return None
        raise SparsityError(
            f"sparsity={sparsity!r} needs the {FILE_NAME} of a folder: give LLM the path, not the model"
        )
    if not there:
        asked = f"sparsity={sparsity!r}" if sparsity else "sparse_attention_enabled in config.json"
        raise SparsityError(f"{asked} needs {path}, and there is none; sparsity={NONE!r} is dense attention")
    if config.sparse.last_q < 1:
        raise SparsityError("sparse_attention_last_q in config.json must be at least 1")
    bands = None if sparsity in (None, VERTICAL_SLASH) else _share(sparsity)
    return SparsePrefill(
        LineBudgets.of(read(path, config)), config.sparse.threshold, config.sparse.last_q, bands
    )
