"""The pages say what is there: their commands parse, their TOML loads, their links lead somewhere.

Commands are read by the real parser in a folder that holds the pages' own files, and stopped at the
first thing that would take long; a slow test runs them, made as small as they go.
"""

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_models import chat_tokenizer, write_policy
from checks import SMALL_WORLD, TINY

from benchmarks.cli import commands, main
from benchmarks.commands import head_to_head
from benchmarks.commands import runs as runs_page
from benchmarks.commands.tools import studies
from benchmarks.data import check, stats
from benchmarks.doctor import patient
from benchmarks.doctor.patient import DoctorConfig
from benchmarks.evaluation import policies
from benchmarks.pipeline import places, single
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.results.schema import Results
from benchmarks.scoring import filtering
from benchmarks.scoring import score as scoring
from benchmarks.speed import measure
from benchmarks.studies import control, engines, regret
from benchmarks.studies.onoff import study as onoff
from shared.config import load
from shared.generation import server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "reports" / "speed.md"]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "reports" / "log").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)\n(?P=indent)```$", re.M | re.S)
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)(?:#[^)]*)?\)")
FOLDERS = ("shared", "rlhf", "dpo", "benchmarks", "tests", "docs", "reports", "requirements")
SETTING = re.compile(r"^(?:[A-Z]+=\S+ )+")  # CC=false klash ...


class Command(NamedTuple):
    """A line of a page's code block without its comment, or a command in its running text."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(SETTING.sub("", self.line))


def fences(page: Path) -> Iterator[re.Match[str]]:
    return FENCE.finditer(page.read_text(encoding="utf-8"))


def lines() -> Iterator[Command]:
    for page in PAGES:
        for fence in fences(page):
            for line in fence["text"].splitlines() if not fence["kind"] else ():
                yield Command(page.name, line.strip().split("  #")[0].strip())
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for line in re.findall(r"`(klash \S+ [^`\n]+|make [^`\n]+)`", text):
            if not re.search(r"\[|\b[A-Z]+\b", line):  # no placeholder: `klash report RUN`
                yield Command(page.name, line)


def starting(*first: str) -> list[Command]:
    """The pages' commands with these first words, each once."""
    found = {c.line: c for c in lines() if c.line and c.words[: len(first)] == list(first)}
    return list(found.values())


def tomls() -> dict[str, str]:
    """The TOML blocks of the pages that say which file they are: `# my-experiment.toml`."""
    blocks = [fence["text"] for page in PAGES for fence in fences(page) if fence["kind"] == "toml"]
    named = (re.match(r"# ([\w-]+\.toml)\n", text) for text in blocks)
    return {name[1]: text for name, text in zip(named, blocks, strict=True) if name}


class Reached(Exception):
    """What a command calls after it has understood its words."""


def reached(*_: Any, **__: Any) -> Any:
    raise Reached


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the files that pages name, and a finished run."""
    monkeypatch.chdir(tmp_path)
    for name, text in tomls().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "simpo.toml").write_text(TINY + '[arms.x]\nkind = "ppo"\nsettings = [{kl_coef=1}]')
    for name in ("models/smollm2-135m", "my-model"):
        write_policy(tmp_path / name, chat_tokenizer())
    rows = (
        {"prompt": f"Say {i}.", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(80)
    )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "runs" / "reviews").mkdir(parents=True)
    (tmp_path / "runs" / "reviews" / "results.json").write_text("{}")
    return tmp_path


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long raises Reached instead."""
    monkeypatch.setattr(places, "set_up_process", lambda *_: None)
    for module, names in {
        head_to_head: ["run_experiment", "plan_experiment", "build_report"],
        runs_page: ["read_store"],
        patient: ["of_experiment", "of_files"],
        server: ["become_server"],
        single: ["train_one"],
        check: ["check"],
        stats: ["statistics", "rows_text"],
        control: ["_gains"],
        regret: ["regret_points"],
        engines: ["set_up_process"],
        onoff: ["set_up_process"],
        scoring: ["score"],
        filtering: ["filter_rows"],
        policies: ["evaluate_policies"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, reached)
    for works in (measure.SPEED_COMPARISONS, measure.ALONE):
        for work in works:
            monkeypatch.setitem(works, work, reached)


def call(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> object:
    """`words` as typed; the exit code."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_there_is_something_to_read():
    assert len(starting("klash")) > 20
    assert len(starting("make")) >= 3
    assert len(tomls()) == 3
    assert Command("", 'CC=false klash compare x --seeds "[0, 1]"').words[-1] == "[0, 1]"


@pytest.mark.parametrize("command", starting("klash"), ids=lambda c: c.line)
def test_every_command_is_understood(
    folder: Path, stopped: None, monkeypatch: pytest.MonkeyPatch, command: Command
):
    with pytest.raises(Reached):
        call(monkeypatch, command.words)


def test_a_wrong_command_is_not(
    folder: Path, stopped: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for words in (
        ["compare", "reviews", "--ppo.epoch", "4"],
        ["compare", "nosuch.toml"],
        ["speed", "sampling"],
        ["study", "onof"],
    ):
        assert call(monkeypatch, ["klash", *words]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("command", starting("make"), ids=lambda c: c.line)
def test_every_target_is_in_the_makefile(command: Command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, re.M)
    assert set(command.words[1:]) <= set(targets)


@pytest.mark.parametrize("command", starting("python", "-m"), ids=lambda c: c.line)
def test_every_module_runs_as_a_command(command: Command, monkeypatch: pytest.MonkeyPatch):
    """Its `main` reads the words; what it would call is a function of the same arguments."""
    module = importlib.import_module(command.words[2])
    found: list[Callable] = []
    monkeypatch.setattr(module.tyro, "cli", lambda f, **_: found.append(f))
    with pytest.raises(SystemExit):
        module.main()
    monkeypatch.undo()
    rest = command.words[3:]
    monkeypatch.setattr(sys, "argv", [module.__name__, *rest, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.tyro.cli(found[0])
    assert stop.value.code == 0


def test_every_file_of_requirements_is_there():
    for command in starting("pip", "install"):
        assert (ROOT / command.words[-1]).is_file(), command


def test_the_pages_toml_loads(folder: Path):
    assert set(tomls()) == {"my-experiment.toml", "my-model.toml", "support.toml"}
    support = load_experiment("support.toml", (), quick=False)
    assert support.judge.share == 0.3 and set(support.arms) >= {"ppo", "dpo", "ipo", "kto", "fdpo"}
    assert load_experiment("my-experiment.toml", (), quick=False).seeds == (0, 1, 2)
    assert load(DoctorConfig, Path("my-model.toml")).max_new_tokens == 256


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_toml_section_a_page_names_is_one(page: Path):
    """`[filtering]`, `ppo.epochs`: keys in running text are the configuration's."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for section in re.findall(r"`\[(\w+)\]`", text):
        assert section in Experiment.model_fields, section
    for section, key in re.findall(r"`(\w+)\.(\w+)`", text):
        model = Experiment.model_fields.get(section)
        fields = getattr(model and model.annotation, "model_fields", None)
        if fields is not None:
            assert key in fields, f"{section}.{key}"


def test_every_outline_of_results_names_what_is_there():
    """Keys of the JSON block in docs/metrics.md, level by level, against the schema's models."""
    (block,) = (f["text"] for f in fences(ROOT / "docs" / "metrics.md") if f["kind"] == "json")
    outline = json.loads(block)
    known = {field.alias or name for name, field in Results.model_fields.items()}
    assert set(outline) <= known
    schema = Results.model_json_schema()["$defs"]
    (method,) = outline["methods"].values()
    for part, model in {
        "Method": method,
        "Estimate": method["gold"],
        "Cost": method["cost"],
        "Setting": method["sweep"][0],
        "RewardModel": outline["reward_model"],
        "FrontierPoint": outline["frontier"][0],
        "Comparison": outline["comparisons"][0],
    }.items():
        assert set(model) <= set(schema[part]["properties"]), part


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_that_a_page_names_is_there(page: Path):
    names = re.findall(r"\bklash ([a-z][\w-]*)", page.read_text(encoding="utf-8"))
    assert set(names) <= commands().keys()


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in {*commands(), *(f"study {name}" for name in studies())} - {"study"}:
        assert f"`klash {name}" in text, name


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path):
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        if "://" not in link["target"]:
            assert (page.parent / link["target"]).exists(), link["target"]


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_source_file_a_page_names_is_there(page: Path):
    """Paths in backticks that begin with one of the tree's folders."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"`((?:shared|rlhf|dpo|benchmarks|tests|docs|requirements)/[\w./-]+)", text
    ):
        assert (ROOT / path).exists() or path == "tests/dpo/test_simpo.py", path


def test_every_entry_of_the_log_is_in_its_index():
    log = ROOT / "reports" / "log"
    index = (log / "README.md").read_text(encoding="utf-8")
    entries = [path.name for path in sorted(log.glob("2*.md"), reverse=True)]
    listed = re.findall(r"\((2[\w.-]+\.md)\)", index)
    assert sorted(listed) == sorted(entries)
    dates = [name[:10] for name in listed]
    assert dates == sorted(dates, reverse=True)


# --- run, as small as they go -------------------------------------------------------------------

SMALL = ["--seeds", "[0]", "--workers", "1"]  # and a command's own keys after them
TINY_KEYS = {
    "threads": 1, "model.hidden_size": 32, "model.layers": 1, "model.intermediate_size": 64,
    "sft.examples": 256, "preferences.pairs": 64, "preferences.held_out_pairs": 16,
    "reward.epochs": 1, "ppo.episodes": 64, "ppo.rollout_size": 32, "ppo.minibatch_size": 16,
    "direct.batch_size": 16, "evaluation.prompts": 16, "evaluation.samples": 2,
    "evaluation.validation_prompts": 8, "evaluation.reward_pairs": 64, "evaluation.checkpoints": [],
    "evaluation.scale_prompts": 8, "evaluation.scale_samples": 4, "evaluation.frontier_prompts": 8,
    "evaluation.frontier_samples": 32, "evaluation.reward_limit_samples": 16, "timed_threads": 1,
}  # fmt: skip
DPO = '{ dpo = { kind = "direct", settings = [{ beta = 0.2 }] } }'
FILES = {"regret": "exact", "control": "control", "onoff": "onoff"}  # where none is named
POINTS = ["--pairs", "30", "40", "--betas", "0.5"]  # of `klash study regret`
NEEDS = ("vllm", "server", "serve", "speed", "simpo", "engines", "--reward-model")


def keys(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value))]


def smallest(words: list[str]) -> list[str]:
    """`words` with what makes the run small before its own keys, which so remain in force."""
    name = words[1] if words[1] != "study" else words[2]
    after = 2 + (words[1] == "study")
    if len(words) > after and not words[after].startswith("-"):
        file, own = [words[after]], words[after + 1 :]
    else:
        file, own = [FILES.get(name, "reviews")], words[after:]
    if name in ("report", "data") or file == ["my-model.toml"]:
        return words
    if name == "train":
        return [*words, *keys(TINY_KEYS), "--seeds", "[0]"]
    if name == "regret":
        world = keys({**SMALL_WORLD, "preferences.held_out_pairs": 16, "sft.examples": 256})
        return [
            *words[:after],
            *file,
            "--pairs",
            "30",
            "40",
            "--betas",
            "0.5",
            *world,
            *SMALL,
            *own,
        ]
    if name == "onoff":
        file += ["--only", "logits in blocks"]
    arms = ["--arms", DPO] if file[0] not in ("my-experiment.toml", "onoff") else []
    seeds = ["--seeds", "[0, 1]"] if name == "control" else []
    return [*words[:after], *file, *arms, *keys(TINY_KEYS), *SMALL, *seeds, *own]


def own_model(folder: Path) -> None:
    """`my-model` and its pairs, as my-model.toml names them."""
    shutil.rmtree(folder / "my-model")
    shutil.copytree(next(folder.glob("runs/.stages/sft-*")), folder / "my-model")
    row = {"prompt": "the plot was not very", "chosen": "memorable .", "rejected": "brave ."}
    rows = [json.dumps(row | {"prompt": f"{row['prompt']} {i}"}) for i in range(4)]
    (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_that_needs_nothing_else_runs(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not those that need vLLM, a server or TRL's last PPO, nor those that measure for an hour."""
    ran = []
    shutil.rmtree(folder / "runs")
    commands = [c for c in starting("klash") if not any(word in c.line for word in NEEDS)]
    for command in sorted(commands, key=lambda c: "my-model" in c.line):  # made by the others
        if "my-model" in command.line:
            own_model(folder)
        code = call(monkeypatch, smallest(command.words))
        judged = {"study", "doctor", "data"} & set(
            command.words
        )  # 1: so small, not all of it holds
        assert code in ((0, 1) if judged else (0,)), command
        ran.append(command.line)
    assert len(ran) >= 12
    assert (folder / "runs" / "my-experiment" / "report" / "index.html").is_file()
