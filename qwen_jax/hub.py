"""Where a checkpoint lies: a folder on this machine, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen_jax.errors import CheckpointError

# Weights as safetensors, configs, and every form a tokenizer comes in; never pickles.
_WANTED = ["*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.tiktoken", "*.model", "*.jinja"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint, downloaded first if what is given is the id of a hub repository ("Qwen/Qwen2.5-0.5B").

    A download that was interrupted resumes when called again; the folder is returned only once it is complete.

    Raises:
        CheckpointError: no such folder, or the hub does not give the repository.
    """
    text = os.fspath(path_or_hub_id)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if not _looks_like_hub_id(text):
        raise CheckpointError(f"{text}: no such folder")
    return _download(text)


def _looks_like_hub_id(text: str) -> bool:
    """Exactly owner/name, and not below a folder that exists here: then a wrong path is likelier than a hub id."""
    return _HUB_ID.fullmatch(text) is not None and not Path(text).parent.is_dir()


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and local folders do without
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    again = "run the same command again to resume"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED))
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id}: the hub asks for permission: accept its terms, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{hub_id}: no such folder here, and no such repository on the hub") from None
    except KeyboardInterrupt:
        raise CheckpointError(f"{hub_id}: download interrupted; {again}") from None
    except Exception as error:  # the hub client lets errors of its HTTP library through, whichever that is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{hub_id}: download incomplete ({reason}); {again}") from error
