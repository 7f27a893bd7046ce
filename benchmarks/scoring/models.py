"""The models that stand-alone commands use, opened from whatever names them."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.config import InputError
from shared.models.folders import listed_ends, require_folder
from shared.models.load import ModelConfig, WeightDtype
from shared.models.names import commit_of, is_local, local_path
from shared.models.opening import open_tokenizer
from shared.models.pretrained import take_pretrained, turn_end
from shared.models.scorer import Scorer


def require_reward_model(name: str) -> Path:
    """The folder of a reward model that a folder or hub name means; no weight is read yet."""
    folder = local_path(name, None)
    require_folder(folder, "reward model")
    open_tokenizer(folder)
    return folder


def open_scorer(folder: Path, dtype: WeightDtype) -> Scorer:
    """The reward model of `require_reward_model`."""
    return Scorer(folder, dtype=dtype)


def require_policy(name: str) -> None:
    """InputError if `name` means a folder that is no policy, or neither hub nor cache has it.

    What a hub name or a .gguf file holds is looked at when it is taken.
    """
    if not is_local(name):
        commit_of(name, None)
    elif Path(name).is_dir():
        require_folder(Path(name), "policy")


@contextlib.contextmanager
def as_folder(name: str) -> Iterator[Path]:
    """A policy's plain transformers folder: the named one where it is sound, else a taken copy.

    A hub name, a .gguf file, and a folder that is not `sound` are copied and set right, and the
    copy is gone afterwards.
    """
    path = Path(name)
    if is_local(name) and path.is_dir():
        require_folder(path, "policy")
        if sound(path):
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="klash-") as folder:
        take_pretrained(Path(folder), ModelConfig(pretrained=name))
        yield Path(folder)


def sound(folder: Path) -> bool:
    """Whether `take_pretrained` would leave a policy's special tokens as its files have them.

    There is an EOS, a pad token that ends no answer, and what ends a turn is among what the files
    say ends an answer.
    """
    tokenizer = open_tokenizer(folder)
    pad, eos, turn = tokenizer.pad_token_id, tokenizer.eos_token_id, turn_end(tokenizer)
    if pad is None or not isinstance(eos, int):
        return False
    ends = listed_ends(folder) | {eos}
    return pad not in ends and (turn is None or turn in ends)


def require_positive(**numbers: float) -> None:
    """InputError for an option that must be above 0 and is not."""
    for name, number in numbers.items():
        if not number > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0 (found {number:g})")
