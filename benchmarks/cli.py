"""The command `klash`."""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.entry import ExitCodes, runs_folder, split_overrides
from shared.config import InputError, suggest

Command = Callable[..., Any]


def main() -> None:
    """Exit codes: see `ExitCodes`; 1 also where a command returns False."""
    words = sys.argv[1:]
    with ExitCodes("klash", runs_folder(words)):
        done = run(words)
    sys.exit(1 if done is False else 0)


def commands() -> dict[str, Command]:
    """The commands by name; importing them takes seconds."""
    from benchmarks.commands.data import data
    from benchmarks.commands.head_to_head import compare, plan, report
    from benchmarks.commands.runs import runs_command
    from benchmarks.commands.scoring import evaluate, filter_command, score
    from benchmarks.commands.tools import doctor, serve, speed, study
    from benchmarks.commands.train import train

    return {
        "compare": compare,
        "data": data,
        "doctor": doctor,
        "evaluate": evaluate,
        "filter": filter_command,
        "plan": plan,
        "report": report,
        "runs": runs_command,
        "score": score,
        "serve": serve,
        "speed": speed,
        "study": study,
        "train": train,
    }


def run(words: Sequence[str]) -> Any:
    """Find the command, take the keys that it changes out of its words; tyro reads the rest."""
    if list(words[:1]) == ["study"]:
        from benchmarks.commands.tools import studies

        return run_one(studies(), words[1:], "klash study")
    if list(words[:1]) == ["data"]:
        from benchmarks.commands.data import data_commands

        return run_one(data_commands(), words[1:], "klash data")
    return run_one(commands(), words, "klash")


def run_one(known: dict[str, Command], words: Sequence[str], prog: str) -> Any:
    """Run the command that is the first of `words`, of those `known`; without one say which."""
    import tyro

    from benchmarks.commands.settings import key_help, top_level_keys

    name = words[0] if words else "--help"
    if name not in known and not name.startswith("-"):
        raise InputError(f"no command `{prog} {name}`{suggest(name, list(known))}")
    parameters = inspect.signature(known[name]).parameters if name in known else {}
    keys = top_level_keys(name) if "overrides" in parameters else ()
    own, overrides = split_overrides(words or ["--help"], parameters, keys)
    if overrides and "overrides" not in parameters:
        raise InputError(f"{prog} {name} changes no keys (found {overrides[0]})")
    try:
        if name not in known:
            return tyro.extras.subcommand_cli_from_dict(known, args=own, prog=prog)
        command = partial(known[name], overrides=overrides) if overrides else known[name]
        return tyro.cli(command, args=own[1:], prog=f"{prog} {name}")
    except SystemExit as end:
        if not end.code and "overrides" in parameters:  # it was asked for help
            print(key_help(name))
        raise


if __name__ == "__main__":  # for torchrun and accelerate launch
    main()
