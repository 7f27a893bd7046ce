"""Why a planned stage will run: what differs from the nearest finished stage of its kind."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.pipeline.plan import UNKNOWN, Plan, PlannedStage
from shared.stages import read_manifest

FOLDER = re.compile(r"(?P<kind>.+)-[0-9a-f]{16}")  # a stage's, as it stands among inputs
CONTENT = re.compile(r'[0-9a-f]{64}$|\{"(files|hub|commit)": ')  # of `shared.stages.Given`
SHOWN = 3  # reasons of a stage, and files in a reason
NONE = "none"
NEW = "no such stage yet"


def plan_text(plan: Plan) -> str:
    """A line a stage in the order of the run, the reason where it will run again, the totals."""
    store, stages = Finished(plan.root), list(plan.stages.values())
    width = len(str(len(stages)))
    lines = []
    for number, stage in enumerate(stages, 1):
        found = [] if stage.there else [why for why in reasons(stage, store) if why != NEW]
        why = f": {'; '.join(first_of(found, 'more'))}" if found else ""
        state = "there " if stage.there else "to run"
        lines.append(f"{number:{width}}  {state}  {stage.label}{why}")
    if any(UNKNOWN in flat(stage.stage.origin["inputs"]).values() for stage in stages):
        lines.append("Settings that are chosen on the way stand here with each arm's first one.")
    run = len(plan.to_run)
    lines.append(f"{len(stages)} stages: {len(stages) - run} there, {run} to run")
    return "\n".join(lines)


def reasons(planned: PlannedStage, store: "Finished") -> list[str]:
    """What is new: code, versions, configuration and the stages that it reads, in this order."""
    if planned.folder.is_dir():
        return ["damaged"]
    wanted = Origin(planned.stage.origin)
    earlier = store.of(planned.stage.name)
    if not earlier:
        return [NEW]
    nearest = min(earlier, key=wanted.distance)
    return list(dict.fromkeys(wanted.differences(nearest, planned.folder.parent)))


@dataclass(frozen=True)
class Origin:
    """What went into a stage, as its manifest holds it."""

    origin: dict[str, Any]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """{dotted key: value}"""
        return flat(self.origin["inputs"])

    def distance(self, other: "Origin") -> int:
        """How many files, versions and inputs differ."""
        parts = ((o.origin["code"], o.origin["context"], o.inputs) for o in (self, other))
        return sum(len(changed(old, new)) for new, old in zip(*parts, strict=True))

    def differences(self, earlier: "Origin", root: Path) -> list[str]:
        """Each in words; stages lie below `root`."""
        files = changed(earlier.origin["code"], self.origin["code"])
        found = [f"{', '.join(first_of(files, 'more files'))} changed"] if files else []
        versions, context = earlier.origin["context"], self.origin["context"]
        found += [in_words(k, versions.get(k), context.get(k)) for k in changed(versions, context)]
        new: list[str] = []
        other: list[str] = []
        for key in changed(earlier.inputs, self.inputs):
            value = self.inputs.get(key)
            if isinstance(value, str) and (folder := FOLDER.fullmatch(value)):
                (other if (root / value).is_dir() else new).append(f"`{folder['kind']}`")
            else:
                found.append(in_words(key, earlier.inputs.get(key), value))
        return [*found, *input_stages(new, "new", "new"), *input_stages(other, "another", "others")]


def input_stages(kinds: list[str], one: str, several: str) -> list[str]:
    """``input stage `sft` is new``, if there is any; each kind once."""
    kinds = list(dict.fromkeys(kinds))
    if len(kinds) < 2:
        return [f"input stage {kind} is {one}" for kind in kinds]
    return [f"input stages {', '.join(kinds)} are {several}"]


class Finished:
    """The finished stages below `root`, by kind; those whose manifests do not name their code
    count as none."""

    def __init__(self, root: Path):
        self.root, self.known = root, dict[str, list[Origin]]()

    def of(self, name: str) -> list[Origin]:
        """The newest first."""
        if name not in self.known:
            folders = [f for f in self.root.glob(f"{name}-*") if (f / "manifest.json").is_file()]
            folders.sort(key=lambda f: (f / "manifest.json").stat().st_mtime, reverse=True)
            found = [manifest for f in folders if (manifest := read_manifest(f))]
            self.known[name] = [
                Origin(m) for m in found if m["stage"] == name and {"code", "context"} <= m.keys()
            ]
        return self.known[name]


def in_words(key: str, old: Any, new: Any) -> str:
    """`ppo.epochs 2 -> 4`; of files and functions, which are there by content: `adapter is new`."""
    if new == UNKNOWN:
        return "settings are not chosen yet"
    if any(isinstance(value, str) and CONTENT.match(value) for value in (old, new)):
        return f"{key} {'is new' if old is None else 'is gone' if new is None else 'changed'}"
    return f"{key} {NONE if old is None else old} -> {NONE if new is None else new}"


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys with other values, of either."""
    return [key for key in {**new, **old} if old.get(key) != new.get(key)]


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested configuration."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        return {key: value}
    found: dict[str, Any] = {}
    for name, part in parts:
        found |= flat(part, f"{key}.{name}" if key else str(name))
    return found


def first_of(texts: list[str], rest: str) -> list[str]:
    """The first few, and how many there are besides."""
    further = len(texts) - SHOWN
    return [*texts[:SHOWN], f"and {further} {rest}"] if further > 0 else texts
