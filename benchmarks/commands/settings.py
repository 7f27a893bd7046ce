"""Every key of a file with its sentence: what `--help` prints, and docs/settings.md, renewed with

python -m benchmarks.commands.settings > docs/settings.md
"""

import shutil
import textwrap

from benchmarks.pipeline.experiment import Experiment
from shared.config import Config, keys


def top_level_keys(command: str) -> set[str]:
    """What `command` takes as `--key`, without a section before it."""
    own = set(_doctor_config().model_fields) if command == "doctor" else set()
    return own | set(Experiment.model_fields)


def key_help(command: str) -> str:
    """What `klash COMMAND --help` says of the keys that it can change."""
    if command == "compare":
        return f"keys of FILE, in brackets their defaults:\n\n{key_lines(Experiment)}"
    others = "`klash compare --help` lists the keys of an experiment"
    if command == "doctor":
        return f"keys of FILE if it is no experiment:\n\n{key_lines(_doctor_config())}\n\n{others}"
    return others


def key_lines(model: type[Config]) -> str:
    """`--ppo.lam FLOAT  (0.95)  sentence`, as wide as the terminal; sections under their names."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for key in keys(model):
        if key.type == "section":
            lines += ["", _wrapped(f"{key.name}: {key.sentence}", width, indent="")]
        else:
            text = f"  --{key.name} {key.type}  ({key.default})  {key.sentence}"
            lines.append(_wrapped(text, width, indent="      "))
    return "\n".join(lines)


def settings_page() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "All keys of an experiment's TOML file, which the command line can change as well:",
        '`klash compare reviews --ppo.epochs 4 --seeds "[0, 1]"`. A key that neither names has its',
        "default.",
        *_tables(Experiment, "The experiment"),
        "",
        "# Settings of `klash doctor`",
        "",
        "All keys of a file that names one's own models and data, in an experiment's place.",
        *_tables(_doctor_config(), "The file"),
    ]
    return "\n".join(lines) + "\n"


def _tables(model: type[Config], title: str) -> list[str]:
    """A table a section; those inside a section follow it."""
    found = list(keys(model))
    sections = {key.name: key for key in found if key.type == "section"}
    lines = ["", f"## {title}"]
    for name in ["", *sections]:
        if name:
            level = "#" * (2 + name.removesuffix(".NAME").count("."))
            lines += ["", f"{level} `{name}`", "", sections[name].sentence]
        rows = [k for k in found if k.name.rpartition(".")[0] == name and k.name not in sections]
        if rows:
            lines += ["", "| key | value | default | what it is |", "|---|---|---|---|"]
        lines += [
            f"| `{k.name.rpartition('.')[2]}` | `{_in_table(k.type)}` | `{k.default}` "
            f"| {_in_table(k.sentence)} |"
            for k in rows
        ]
    return lines


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")


def _wrapped(text: str, width: int, indent: str) -> str:
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _doctor_config() -> type[Config]:
    from benchmarks.doctor.patient import DoctorConfig  # takes long to import

    return DoctorConfig


if __name__ == "__main__":
    print(settings_page(), end="")
