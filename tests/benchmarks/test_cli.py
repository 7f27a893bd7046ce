"""The command: exit codes, and what the user reads when the input is wrong. Nothing is trained."""

import errno
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checks import TINY, Klash

from benchmarks.cli import main
from benchmarks.commands.settings import settings_page
from benchmarks.doctor.patient import DoctorConfig
from benchmarks.entry import ExitCodes, runs_folder, split_overrides
from benchmarks.pipeline.experiment import Experiment
from benchmarks.speed import measure
from benchmarks.speed.sides import Choice
from shared.config import InputError, keys
from shared.generation.engine import EngineLost
from shared.stages import intact

ROOT = Path(__file__).parents[2]
ARM = '[arms.dpo]\nkind = "direct"\nsettings = [{ beta = 0.2 }]\n'


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "own", "overrides"),
    [
        ("compare reviews", "compare reviews", ""),
        ("compare", "compare", ""),
        ("compare reviews --ppo.epochs 4", "compare reviews", "--ppo.epochs 4"),
        ("compare --ppo.epochs=4 reviews", "compare reviews", "--ppo.epochs=4"),
        ("compare --ppo.epochs 4 reviews", "compare reviews", "--ppo.epochs 4"),
        ("compare a.toml --seeds [0,1] --quick", "compare a.toml --quick", "--seeds [0,1]"),
        ("compare --name=x --threads 1", "compare", "--name=x --threads 1"),
        ("compare --runs out.d --quick", "compare --runs out.d --quick", ""),
        ("compare --runs=out.d", "compare --runs=out.d", ""),
        ("compare --quick.pairs 10", "compare", "--quick.pairs 10"),
        ("compare --no-quick", "compare --no-quick", ""),
        ("compare --filtering.margin -0.5", "compare", "--filtering.margin -0.5"),
        ("compare --arms.best-of-n.settings x", "compare", "--arms.best-of-n.settings x"),
        ("compare --nosuch 3", "compare --nosuch 3", ""),
        ("report runs/a.b", "report runs/a.b", ""),
        ("--help", "--help", ""),
        ("", "", ""),
    ],
)
def test_keys_of_the_experiment_are_told_from_the_commands_own_words(
    words: str, own: str, overrides: str
):
    found = split_overrides(words.split(), ["quick"], Experiment.model_fields)
    assert found == (own.split(), tuple(overrides.split()))


def test_a_key_without_a_value_is_left_for_the_message():
    found = split_overrides(["compare", "--ppo.epochs"], [], [])
    assert found == (["compare"], ("--ppo.epochs",))


def test_a_value_with_spaces_or_equals_stays_one_word():
    words = ["compare", "--seeds", "[0, 1]", "--name=a=b"]
    found = split_overrides(words, [], ["seeds", "name"])
    assert found == (["compare"], ("--seeds", "[0, 1]", "--name=a=b"))


# --- wrong input: exit code 2 -----------------------------------------------------------------


def test_comparing_a_file_that_is_not_there(klash: Klash):
    code, out, err = klash("compare", "nosuch.toml")
    assert code == 2
    assert "nosuch.toml" in err
    assert "Traceback" not in err + out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ppo.epoch", "4"], ["`ppo.epoch`", "did you mean `epochs`"]),
        (["--ppo.optimizer.learning_rat=1e-3"], ["learning_rate"]),
        (["--pppo.epochs", "4"], ["`pppo`", "did you mean `ppo`"]),
        (["--ppo.epochs", "0"], ["`ppo.epochs`", "greater than 0"]),
        (["--seeds", "none"], ["`seeds`"]),
        (["--ppo.epochs"], ["--ppo.epochs", "value"]),
        (["--ppo.epochs", "--quick"], ["--ppo.epochs", "value"]),
        (["--name", "../../x"], ["`name`"]),
        (["--arms.ppo.settings", "[{ beta = 1.0 }]"], ["kl_coef"]),
    ],
)
def test_a_wrong_key_or_value_is_named(klash: Klash, words: list[str], said: list[str]):
    code, out, err = klash("compare", "reviews", *words)
    assert code == 2
    assert all(text in err for text in said), err
    assert "Traceback" not in err + out


def test_a_wrong_key_in_a_file_is_named_with_the_file(klash: Klash, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(f'name = "mine"\nsft = {{ epoch = 1 }}\n{ARM}')
    code, _, err = klash("compare", "mine.toml")
    assert code == 2
    assert "mine.toml" in err
    assert "did you mean `epochs`" in err


def test_a_runs_folder_that_cannot_be_made(klash: Klash, tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    code, _, err = klash("compare", "reviews", "--runs", "taken")
    assert code == 2
    assert "taken" in err
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_report_of_a_folder_without_results(klash: Klash, tmp_path: Path):
    for folder in (".", "nosuch"):
        code, _, err = klash("report", folder)
        assert code == 2
        assert "results.json" in err
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_results_that_are_none(klash: Klash, tmp_path: Path):
    (tmp_path / "results.json").write_text("{ not json")
    code, _, err = klash("report", str(tmp_path))
    assert code == 2
    assert "results.json" in err


def test_the_doctor_of_a_file_that_is_not_there(klash: Klash, tmp_path: Path):
    code, out, err = klash("doctor", "nosuch.toml")
    assert code == 2
    assert "nosuch.toml" in err
    assert "Traceback" not in err + out
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_takes_an_experiments_keys(klash: Klash):
    code, _, err = klash("doctor", "reviews", "--sft.epoch", "4")
    assert code == 2
    assert "did you mean `epochs`" in err


def test_help_of_the_doctor_names_what_its_file_holds(klash: Klash):
    code, out, _ = klash("doctor", "--help")
    assert code == 0
    assert all(word in out for word in ("`model`", "`data`", "`reward_model`", "TOML"))


def test_a_report_takes_no_keys(klash: Klash, tmp_path: Path):
    code, _, err = klash("report", ".", "--ppo.epochs", "3")
    assert code == 2
    assert "--ppo.epochs" in err


@pytest.mark.parametrize(
    "words", [["nosuch"], ["compare", "--nosuch", "3"], ["compare", "a", "b"], ["report"]]
)
def test_a_word_that_the_command_does_not_know(klash: Klash, words: list[str]):
    code, out, err = klash(*words)
    assert code == 2
    assert out + err


def test_wrong_input_leaves_no_folder(klash: Klash, tmp_path: Path):
    klash("compare", "reviews", "--ppo.epoch", "4")
    klash("compare", "reviews", "--name", "..")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "revews"], ["revews", "did you mean `reviews`"]),
        (["doctor", "exakt"], ["exakt", "did you mean `exact`"]),
        (["study", "control", "contrl"], ["contrl", "did you mean `control`"]),
        (["compare", "zzzz"], ["zzzz", "reviews", "exact"]),  # like none: all of them
        (["compar"], ["compar", "did you mean `compare`"]),
        (["study", "regrets"], ["regrets", "did you mean `regret`"]),
        (["compare", "--seeds", "[0, x]"], ["`seeds.1`", "'x'"]),
        (["compare", "--seeds", "[0, -1]"], ["`seeds.1`", "-1"]),
        (["compare", "--ppo.episodes", "100"], ["`ppo.rollout_size`", "512", "`episodes`", "100"]),
    ],
)
def test_what_is_nearly_right_is_told_from_what_was_meant(
    klash: Klash, words: list[str], said: list[str]
):
    code, _, err = klash(*words)
    assert code == 2
    assert all(text in err for text in said), err


def test_the_doctor_takes_the_keys_of_its_own_file(klash: Klash, tmp_path: Path):
    (tmp_path / "mine.toml").write_text('model = "a"\n')
    code, _, err = klash("doctor", "mine.toml", "--data", "b", "--max_length", "0")
    assert code == 2
    assert "command line: `max_length`" in err
    assert "data" not in err


# --- help: exit code 0 ------------------------------------------------------------------------


def test_help_names_every_command(klash: Klash):
    code, out, _ = klash("--help")
    assert code == 0
    assert re.search(r"\bcompare\b", out)
    assert re.search(r"\breport\b", out)
    assert re.search(r"\bdoctor\b", out)


def test_help_of_compare_names_its_options_and_where_files_are(klash: Klash):
    code, out, _ = klash("compare", "--help")
    assert code == 0
    assert all(word in out for word in ("--quick", "--runs", "TOML", "--ppo.epochs"))


def test_help_of_compare_prints_every_key_with_its_sentence(klash: Klash):
    out = " ".join(klash("compare", "--help")[1].split())
    for key in keys(Experiment):
        assert key.sentence in out
        assert key.type == "section" or f"--{key.name} {key.type} ({key.default})" in out, key


def test_help_of_the_doctor_prints_the_keys_of_its_file(klash: Klash):
    out = " ".join(klash("doctor", "--help")[1].split())
    for key in keys(DoctorConfig):
        named = f"{key.name}: " if key.type == "section" else f"--{key.name} {key.type}"
        assert named in out
    assert all(key.sentence in out for key in keys(DoctorConfig))


@pytest.mark.parametrize("name", ["control", "engines", "onoff", "regret"])
def test_every_study_has_help_and_the_list_names_it(klash: Klash, name: str):
    code, out, _ = klash("study", name, "--help")
    assert code == 0
    assert f"klash study {name}" in out
    assert "--out" in out
    assert re.search(rf"\b{name}\b", klash("study")[1])


def test_the_page_of_settings_is_the_one_that_the_configuration_makes():
    """If it differs: python -m benchmarks.commands.settings > docs/settings.md"""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page()


def test_help_of_report(klash: Klash):
    assert klash("report", "--help")[0] == 0


def test_the_installed_command_is_this_one():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="klash")
    assert script.load() is main


@pytest.mark.slow  # ten seconds of imports
def test_the_installed_command_ends_with_the_same_code(tmp_path: Path):
    script = Path(sys.executable).with_name("klash")
    assert script.is_file(), "the project is not installed: pip install -e ."
    result = subprocess.run(
        [script, "compare", "nosuch.toml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("klash: ")
    assert "nosuch.toml" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- engines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--generation.engine", "vlm"], ["generation.engine", "vllm"]),
        (["--generation.server", "http://a:1"], ["`server` needs `engine` to be vllm"]),
        (["--generation.engine", "vllm", "--generation.server", "a:1"], ["generation.server"]),
        (["--generation.memory_share", "1.5"], ["generation.memory_share"]),
        (["--sampling.top_p", "0.9"], ["sampling", "`top_p` cuts the distribution off"]),
        (["--sampling.top_k", "5"], ["sampling", "`top_k` cuts the distribution off"]),
    ],
)
def test_what_no_engine_can_do_is_named(klash: Klash, words: list[str], said: list[str]):
    code, _, err = klash("compare", "reviews", *words)
    assert code == 2
    assert all(text in err for text in said), err


def test_a_server_of_a_folder_without_a_model(klash: Klash):
    code, _, err = klash("serve", "nosuch")
    assert code == 2
    assert "nosuch: no such folder or file" in err


def test_an_unknown_work_of_speed_is_named_with_the_known_ones(klash: Klash, tmp_path: Path):
    code, _, err = klash("speed", "sampling")
    assert code == 2
    known = ["dpo", "experiment", "generation", "growth", "ipo", "kto", "ppo", "reward"]
    assert f"{known}, not 'sampling'" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("work", ["experiment", "growth"])
def test_a_study_of_speed_runs_on_its_own(
    klash: Klash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
):
    def told(choice: Choice) -> str:
        return f"quick: {choice.quick}, runs: {choice.runs}"

    monkeypatch.setitem(measure.ALONE, work, told)
    assert klash("speed", work, "--quick", "--runs", "here")[:2] == (0, "quick: True, runs: here\n")
    assert klash("speed", work)[1] == "quick: False, runs: runs\n"
    for words, said in (
        ((work, "dpo"), "takes no other work beside it"),
        ((work, "--models", "reviews"), "has no --models, --dtypes or --shapes"),
    ):
        code, _, err = klash("speed", *words)
        assert code == 2
        assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_lost_engine_ends_the_run_with_1_and_no_traceback(
    klash: Klash, monkeypatch: pytest.MonkeyPatch
):
    def lost(*_: object) -> Path:
        raise EngineLost("the server went away")

    monkeypatch.setattr("benchmarks.commands.head_to_head.run_experiment", lost)
    assert klash("compare") == (1, "", "klash: stopped: the server went away\n")


# --- interrupted, or out of space -------------------------------------------------------------


def is_gone(group: int) -> bool:
    """Whether no process of the group is left, after a few seconds at most."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow  # half a minute each: the program starts, and its worker
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_a_run_with_130_and_one_line(tmp_path: Path, workers: int):
    """The signal goes to all processes of the terminal's group, as Ctrl-C sends it."""
    (tmp_path / "tiny.toml").write_text(TINY + ARM, encoding="utf-8")
    klash = "from benchmarks.cli import main; main()"
    words = ["compare", "tiny.toml", "--workers", str(workers), "--sft.examples", "20000"]
    process = subprocess.Popen(
        [sys.executable, "-c", klash, *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stages = tmp_path / "runs" / ".stages"
    end = time.monotonic() + 120
    while not list(stages.glob(".unfinished-sft-*")) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)  # somewhere within the stage
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("klash: interrupted")
    assert err.count("\n") == 1, err
    assert time.monotonic() - sent < 20  # and not when the stage would have been done
    assert is_gone(process.pid)
    assert not list(stages.glob("sft-*"))


@pytest.mark.parametrize("filename", [None, "runs/.stages/.unfinished-sft-1/model.safetensors"])
def test_a_full_disk_is_named_in_one_line(
    klash: Klash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filename: str | None
):
    """Wherever in a run the write was; the stage's folder is gone by then."""

    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)

    monkeypatch.setattr("benchmarks.commands.head_to_head.run_experiment", full)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "runs" / ".stages").mkdir(parents=True)
    code, out, err = klash("compare")
    where = Path("runs") if filename is None else Path("runs/.stages")
    assert (code, out) == (1, "")
    assert err == f"klash: stopped: the disk of {where} is full: free some space\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 1),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1),  # as Rust has it
        (InputError("nonsense"), 2),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_what_ends_a_command_has_its_code_and_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int
):
    with pytest.raises(SystemExit) as end, ExitCodes("klash"):
        raise error
    assert end.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), ExitCodes("klash"):
        raise ZeroDivisionError


def test_a_reader_that_has_read_enough_ends_a_command_without_a_word():
    code = (
        "from benchmarks.entry import ExitCodes\n"
        "with ExitCodes('klash'):\n"
        "    while True:\n"
        "        print('a line')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as a shell tells of SIGPIPE


@pytest.mark.parametrize(
    ("words", "folder"),
    [("compare", "runs"), ("compare --runs a", "a"), ("compare --runs=a/b x", "a/b"),
     ("compare --runs", "runs"), ("", "runs")],
)  # fmt: skip
def test_the_runs_folder_is_read_from_the_words(words: str, folder: str):
    assert runs_folder(words.split()) == Path(folder)


FULL = """
import builtins, errno, os, pathlib, shared.stages
from benchmarks.cli import main

def write_jsonl(path, rows):
    pathlib.Path(path).write_text("half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

import shared.data.samples
shared.data.samples.write_jsonl = write_jsonl
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow  # ten seconds and more of imports
@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_ends_a_run_and_leaves_nothing_half_done(tmp_path: Path, workers: int):
    """A worker process imports the program's file, and with it the failing write."""
    (tmp_path / "tiny.toml").write_text(TINY + ARM, encoding="utf-8")
    (tmp_path / "full.py").write_text(FULL, encoding="utf-8")
    words = ["compare", "tiny.toml", "--workers", str(workers)]
    done = subprocess.run(
        [sys.executable, "full.py", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(r"klash: stopped: the disk of \S+ is full: free some space\n", done.stderr)
    stages = [path for path in (tmp_path / "runs" / ".stages").iterdir() if path.is_dir()]
    assert stages
    assert all(intact(stage) for stage in stages), stages
