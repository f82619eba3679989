"""Where a checkpoint lies: a folder on this machine, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import CheckpointError

# Weights as safetensors, configs, and every form a tokenizer comes in; never pickles.
_WANTED = ("*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.tiktoken", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(path_or_hub_id: str | Path, wanted: Sequence[str] = _WANTED) -> Path:
    """The folder of a checkpoint; it is downloaded first if given as a hub id ("Qwen/Qwen2.5-0.5B-Instruct").

    A download that was interrupted resumes when called again; no folder is returned before it is complete.

    Args:
        path_or_hub_id: as said.
        wanted: patterns of the files to download; the default is all that a model needs.

    Raises:
        CheckpointError: no such folder, or the hub does not give the repository.
    """
    text = os.fspath(path_or_hub_id)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(text) is None:
        raise CheckpointError(f"{text}: no such folder")
    if path.parent.is_dir():  # a mistyped path is likelier than a hub id
        raise CheckpointError(
            f"{text}: no such folder ({path.parent} exists, so this is not taken for a hub id)"
        )
    return _download(text, wanted)


def _download(hub_id: str, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and local folders do without
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(wanted)))
    except GatedRepoError:
        raise CheckpointError(f"{hub_id}: the hub asks you to accept its terms, and for HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{hub_id}: no such folder here, and no such repository on the hub") from None
    except Exception as error:  # the hub client lets errors of its HTTP library through, whichever that is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{hub_id}: download incomplete ({reason}); run the same command again to resume"
        ) from error
