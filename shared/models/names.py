"""Which model a name means, a path by content and a hub name by commit: two folders of one name are
two models.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from shared.config import InputError
from shared.models.folders import (
    CHATS,
)

READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")
BESIDE = (  # what stages and trainers leave there, which no loader reads
    "manifest.json", "cost.json", "checkpoints.json", "stopped.json", "scores.json",
    "filtering.json", "trainer_state.json", "all_results.json", "train_results.json",
    "eval_results.json", "log.txt", "training_args.bin",
)  # fmt: skip
HUB_ERRORS = (OSError, ValueError, HTTPError)  # no network, no such name, a name that is none
_hashes: dict[tuple[str, int, int], str] = {}  # by path, size and time of the last change


def local_path(name: str, revision: str | None) -> Path:
    """The folder or .gguf file that `name` means, fetched from the hub if it is a hub name."""
    if is_local(name):
        return Path(name)
    try:
        patterns = [*(f"*{suffix}" for suffix in READ), CHATS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HUB_ERRORS as error:
        raise hub_error(name, error) from error


def is_local(name: str) -> bool:
    """Whether `name` is a path, which must be there; else it is a hub name."""
    path = Path(name)
    if os.path.exists(name):  # which is False for what can be no path; Path.exists raises
        return True
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in (
        ".gguf", ".safetensors",
    ):  # fmt: skip
        raise InputError(f"{name}: no such folder or file; a hub name is owner/name")
    return False


def hub_error(name: str, error: Exception) -> InputError:
    """What went wrong with a hub name, for the user."""
    return InputError(
        f"{name}: no such file or folder here, and the hub does not give it "
        f"({type(error).__name__}): check the name and revision, log in with `hf auth login` if it "
        "is gated, or fetch it where there is a network and name the folder"
    )


def address_of_model(name: str, revision: str | None = None) -> dict[str, Any]:
    """What `name` stands for, as plain values for a stage's address.

    Of a folder or file the SHA-256 of what a loader reads in it, of a hub name the commit: from the
    hub, or offline from its cache on this machine.
    """
    if is_local(name):
        path = Path(name)
        files = [path] if path.is_file() else sorted(filter(_counts, path.iterdir()))
        return {"files": {file.name: content_hash(file) for file in files}}
    return {"hub": name, "commit": commit_of(name, revision)}


def is_model_file(path: Path) -> bool:
    """Whether transformers or a Scorer reads this file of a whole model's folder.

    What runs when it is read (pickles), logs and adapters are none of it.
    """
    read = path.suffix in READ and path.name not in BESIDE and not path.name.startswith("adapter_")
    return path.is_file() and (read or path.name == CHATS)


def _counts(path: Path) -> bool:
    """Whether a file is part of what a name stands for: adapters and whatever is refused too."""
    read = path.suffix in (*READ, ".gguf", ".bin") and path.name not in BESIDE
    return path.is_file() and (read or path.name == CHATS)


def commit_of(name: str, revision: str | None) -> str:
    """The commit that a hub name's revision is at."""
    try:
        found = HfApi().model_info(name, revision=revision).sha
    except HUB_ERRORS as error:
        cached = None
        with suppress(ValueError):  # of a name that can be none
            cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise hub_error(name, error) from error
        found = Path(cached).parent.name  # .../snapshots/COMMIT/config.json
    return str(found)


def content_hash(path: Path) -> str:
    """SHA-256 of a file; read once a process while its size and time stay."""
    about = os.stat(path)
    key = str(path.resolve()), about.st_size, about.st_mtime_ns
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]
