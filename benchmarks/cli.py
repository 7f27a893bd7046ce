"""The command `klash`."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import tyro

from benchmarks.commands.head_to_head import compare, plan, report
from benchmarks.commands.tools import doctor, serve, speed, studies, study
from benchmarks.entry import exit_codes, split_overrides
from shared.config import InputError

Command = Callable[..., Any]
COMMANDS: dict[str, Command] = {
    "compare": compare,
    "doctor": doctor,
    "plan": plan,
    "report": report,
    "serve": serve,
    "speed": speed,
    "study": study,
}


def main() -> None:
    """Exit codes: see `exit_codes`; 1 also where a command returns False."""
    words, commands, prog = sys.argv[1:], COMMANDS, "klash"
    with exit_codes("klash"):
        if words[:1] == ["study"]:
            words, commands, prog = words[1:], studies(), "klash study"
        command = commands.get(words[0]) if words else None
        words, overrides = split_overrides(words, _parameters(command))
        if overrides and "overrides" not in _parameters(command):
            raise InputError(f"{prog} {words[0]} changes no keys (found {overrides[0]})")
        with_keys = {
            name: partial(found, overrides=overrides) if found is command and overrides else found
            for name, found in commands.items()
        }
        held = tyro.extras.subcommand_cli_from_dict(with_keys, args=words, prog=prog)
    sys.exit(1 if held is False else 0)


def _parameters(command: Command | None) -> tuple[str, ...]:
    return tuple(inspect.signature(command).parameters) if command else ()
