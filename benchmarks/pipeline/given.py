"""What a user names, as stages get it: files and folders by content, hub names by commit."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from rlhf.reward import take_reward
from shared.config import InputError
from shared.data.sources import reader_of
from shared.models.cost import Meter
from shared.models.folders import CHATS
from shared.models.load import ModelConfig
from shared.models.names import HUB_ERRORS, address_of_model, content_hash, hub_error, is_local
from shared.models.pretrained import take_pretrained
from shared.stages import Given, write_json
from shared.tasks.registry import TaskConfig


def given_model(name: str, revision: str | None = None) -> Given:
    """A model's folder, .gguf file or hub name."""
    return Given(name, _text(address_of_model(name, revision)))


def given_start(model: ModelConfig) -> dict[str, Given | None]:
    """The pretrained model, and the adapter that is merged into it."""
    assert model.pretrained is not None
    return {
        "source": given_model(model.pretrained, model.revision),
        "adapter": given_model(model.adapter) if model.adapter else None,
    }


def take_given(folder: Path, source: Given, adapter: Given | None) -> None:
    """Stage: the model as a plain folder; see `take_pretrained`."""
    take_pretrained(
        folder,
        ModelConfig(
            pretrained=source.source,
            adapter=adapter.source if adapter else None,
            revision=json.loads(source.content).get("commit"),
        ),
    )


def take_given_reward(
    folder: Path, reward_model: Given, policy: Path, references: Path, data: Path | None
) -> None:
    """Stage: a reward model from elsewhere, see `take_reward`; `data` holds chats' messages."""
    commit = json.loads(reward_model.content).get("commit")
    chats = data if data is not None and (data / CHATS).is_file() else None
    meter = Meter()
    take_reward(folder, reward_model.source, commit, policy, references, chats)
    write_json(folder / "cost.json", {**meter.summary(), "labels_used": 0})


def given_sources(task: TaskConfig) -> tuple[Given, ...]:
    """The files of one's own task: what they hold counts, and in which order they stand."""
    if not task.pairs:
        raise InputError("task.pairs: name the file of your pairs, a folder, or a hub name")
    names = (task.pairs,) if isinstance(task.pairs, str) else task.pairs
    return tuple(Given(name, _text(_address(name))) for name in names)


def _address(name: str) -> dict[str, Any]:
    if reader_of(Path(name)) is not None and not Path(name).exists():
        raise InputError(
            f"task.pairs: {name}: no such file, neither beside the experiment's file nor here"
        )
    if not is_local(name):
        return {"hub": name, "commit": _dataset_commit(name)}
    path = Path(name)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {"files": [[file.name, content_hash(file)] for file in files]}


def _dataset_commit(name: str) -> str:
    """From the hub, or offline from its cache on this machine."""
    try:
        return str(HfApi().dataset_info(name).sha)
    except HUB_ERRORS as error:
        try:
            cached = hf_hub_download(name, "README.md", repo_type="dataset", local_files_only=True)
        except HUB_ERRORS:
            raise hub_error(name, error) from error
        return Path(cached).parent.name  # .../snapshots/COMMIT/README.md


def given_function(name: str) -> Given:
    """The file that `file.py:function` or `module:function` is in."""
    module, _, function = name.rpartition(":")
    if not module or not function.isidentifier():
        raise InputError(f"judge.function: {name!r} is not `file.py:function`, such as my.py:score")
    path = Path(module)
    if path.suffix != ".py":
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError, AttributeError):  # what it is below is no package
            found = None
        if found is None or found.origin is None:
            raise InputError(f"judge.function: there is no module `{module}`; name its file.py")
        path = Path(found.origin)
    if not path.is_file():
        raise InputError(f"judge.function: there is no file {path}")
    return Given(f"{path.resolve()}", content_hash(path))


def _text(address: dict[str, Any]) -> str:
    return json.dumps(address, sort_keys=True)
