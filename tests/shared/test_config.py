"""Configuration: what is wrong is said with the file, the key and the key that was meant."""

import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from benchmarks.doctor.patient import DoctorConfig
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import EXPERIMENTS, load_experiment
from shared.config import Config, InputError, Key, keys, load, read_toml


class Inner(Config):
    rate: float = Field(default=0.5, gt=0, le=1)
    steps: int = 3
    name: str = "x"
    on: bool = False


class Item(Config):
    kind: Literal["a", "b"] = "a"


class Outer(Config):
    title: str = "t"
    sizes: tuple[int, ...] = (1,)
    inner: Inner = Inner()
    maybe: Inner | None = None
    items: dict[str, Item] = Field(default_factory=dict)


class Words(Config):
    words: tuple[str, ...] = ()


class Documented(Config):
    """One field of each kind."""

    needed: int
    """How many."""
    rate: float = 1e-5
    """How
    fast."""
    ways: tuple[Literal["up", "down"], ...] = ("up",)
    """Where to."""
    inner: Inner = Inner(rate=0.25)
    """A section."""
    maybe: Inner | None = None
    """One that may be missing."""
    items: dict[str, Item] = Field(default_factory=dict)
    """Some of them."""
    numbers: dict[str, float] | None = None
    """By name."""


ARM = '[arms.dpo]\nkind = "direct"\nsettings = [{ beta = 0.2 }]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """What the user reads about this file."""
    with pytest.raises(InputError) as error:
        load(Outer, write(folder, text), overrides)
    return str(error.value)


def experiment(folder: Path, text: str = "", arms: str = ARM, *overrides: str) -> Experiment:
    return load_experiment(
        str(write(folder, f'name = "e"\n{text}\n{arms}')), list(overrides), False
    )


# --- one file ---------------------------------------------------------------------------------


def test_what_the_file_says_is_what_one_gets(tmp_path: Path):
    path = write(tmp_path, 'title = "ünï"\nsizes = [3, 4]\n[inner]\nrate = 0.25\non = true\n')
    config = load(Outer, path)
    assert (config.title, config.sizes, config.inner.rate, config.inner.on) == (
        "ünï", (3, 4), 0.25, True,
    )  # fmt: skip
    assert config.inner.steps == 3  # left out: its default


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ('titel = "x"', "titel", "title"),
        ("[inner]\nrat = 0.1", "inner.rat", "rate"),
        ("[maybe]\nstep = 1", "maybe.step", "steps"),
        ('[items.left]\nkin = "a"', "items.left.kin", "kind"),
        ("iner = { rate = 0.1 }", "iner", "inner"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_nearest_key(
    tmp_path: Path, text: str, key: str, meant: str
):
    message = refusal(tmp_path, text)
    assert "some.toml" in message
    assert f"`{key}`" in message
    assert f"did you mean `{meant}`" in message


def test_a_key_like_no_other_gets_the_list_of_keys(tmp_path: Path):
    message = refusal(tmp_path, "[inner]\nzzzzzz = 1")
    assert "`inner.zzzzzz`" in message
    assert all(name in message for name in ("rate", "steps", "name", "on"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[inner]\nsteps = 1.5", "inner.steps"),
        ('[inner]\nsteps = "many"', "inner.steps"),
        ("[inner]\nrate = 0", "inner.rate"),
        ("[inner]\nrate = 1.01", "inner.rate"),
        ("[inner]\nrate = nan", "inner.rate"),
        ("[inner]\nrate = inf", "inner.rate"),
        ("title = 3", "title"),
        ("sizes = [1, 2.5]", "sizes.1"),
        ("inner = 3", "inner"),
        ('[items.left]\nkind = "c"', "items.left.kind"),
    ],
)
def test_a_wrong_type_or_value_is_named_with_its_file(tmp_path: Path, text: str, key: str):
    message = refusal(tmp_path, text)
    assert "some.toml" in message
    assert f"`{key}`" in message


def test_every_mistake_of_a_file_is_named_at_once(tmp_path: Path):
    message = refusal(tmp_path, "titel = 1\n[inner]\nrate = 7\nsteps = 'x'")
    assert all(key in message for key in ("`titel`", "`inner.rate`", "`inner.steps`"))


def test_a_byte_order_mark_before_the_first_key_is_no_part_of_it(tmp_path: Path):
    path = tmp_path / "some.toml"
    path.write_bytes(b"\xef\xbb\xbf" + 'title = "\u00fcn\u00ef"\n'.encode())
    assert load(Outer, path).title == "\u00fcn\u00ef"
    assert read_toml(path) == {"title": "\u00fcn\u00ef"}


@pytest.mark.parametrize("text", ["title = ", "= 3", "[inner\nrate=1", 'title="a"\ntitle="b"'])
def test_malformed_toml_is_the_users_error(tmp_path: Path, text: str):
    message = refusal(tmp_path, text)
    assert "some.toml" in message
    assert "TOML" in message


def test_a_file_that_is_no_text_is_the_users_error(tmp_path: Path):
    path = tmp_path / "some.toml"
    path.write_bytes(b"\xff\xfe\x00title")
    with pytest.raises(InputError, match=r"some\.toml"):
        load(Outer, path)


@pytest.mark.parametrize("name", ["none.toml", ""])
def test_a_file_that_is_missing_or_a_folder_is_the_users_error(tmp_path: Path, name: str):
    with pytest.raises(InputError) as error:
        load(Outer, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_configuration_cannot_be_changed(tmp_path: Path):
    config = load(Outer, write(tmp_path, ""))
    with pytest.raises(ValidationError, match="frozen"):
        config.title = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.inner.rate = 0.1


# --- overrides --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--inner.rate", "0.25"], {"rate": 0.25}),
        (["--inner.rate=0.25"], {"rate": 0.25}),
        (["--inner.steps", "-4"], {"steps": -4}),
        (["--inner.on", "true"], {"on": True}),
        (["--inner.on=false"], {"on": False}),
        (["--inner.name", "plain words"], {"name": "plain words"}),
        (["--inner.name", '"quoted"'], {"name": "quoted"}),
        (["--inner.name=a=b"], {"name": "a=b"}),
        (["--inner.name="], {"name": ""}),
        (["--inner", "{ rate = 0.25, steps = 9 }"], {"rate": 0.25, "steps": 9}),
        (["--inner.rate", "0.1", "--inner.rate", "0.2"], {"rate": 0.2}),  # the last one holds
    ],
)
def test_an_override_replaces_the_files_value(tmp_path: Path, words: list[str], found: dict):
    config = load(Outer, write(tmp_path, "[inner]\nrate = 0.75\n"), words)
    assert {name: getattr(config.inner, name) for name in found} == found


def test_an_override_leaves_the_rest_of_the_file(tmp_path: Path):
    path = write(tmp_path, 'title = "kept"\n[inner]\nsteps = 8\n')
    config = load(Outer, path, ["--inner.rate", "0.1", "--sizes", "[5, 6]"])
    assert (config.title, config.inner.steps, config.inner.rate) == ("kept", 8, 0.1)
    assert config.sizes == (5, 6)


def test_an_override_makes_the_sections_it_needs(tmp_path: Path):
    assert load(Outer, write(tmp_path, ""), ["--maybe.steps", "2"]).maybe == Inner(steps=2)
    assert load(Outer, None, ["--items.left.kind", "b"]).items == {"left": Item(kind="b")}


def test_a_value_does_not_become_a_section(tmp_path: Path):
    message = refusal(tmp_path, 'title = "a"', "--title.size", "3")
    assert "--title.size" in message
    assert "`title`" in message


def test_an_unknown_override_is_refused_like_an_unknown_key(tmp_path: Path):
    message = refusal(tmp_path, "", "--inner.stepz", "3")
    assert "`inner.stepz`" in message
    assert "did you mean `steps`" in message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a, b]", ("a", "b")),
        ("[a b,c-d]", ("a b", "c-d")),
        ('["a", b]', ("a", "b")),
        ('["a, b", "c"]', ("a, b", "c")),
        ("[a]", ("a",)),
    ],
)
def test_words_in_a_list_need_no_quotes(text: str, found: tuple[str, ...]):
    assert load(Words, None, ["--words", text]).words == found


@pytest.mark.parametrize("text", ["[INST] hello", "[a", "a, b", "{a}", "[a,, b]"])
def test_text_that_is_no_list_stays_text(text: str):
    assert load(Outer, None, ["--title", text]).title == text


def test_a_wrong_item_of_a_list_is_named_and_shown(tmp_path: Path):
    for words in (["--sizes", "[3, x]"], ["--sizes=[3, x, 4]"]):
        message = refusal(tmp_path, "", *words)
        assert "`sizes.1`" in message
        assert "'x'" in message
        assert "3" not in message


def test_a_mistake_on_the_command_line_is_not_the_files(tmp_path: Path):
    message = refusal(tmp_path, "[inner]\nsteps = 1.5", "--inner.rate", "7", "--titel", "x")
    of_file, *of_words = sorted(message.split("\n"), key=lambda line: "some.toml" not in line)
    assert "`inner.steps`" in of_file
    assert [line.partition(": ")[0] for line in of_words] == ["command line"] * 2


def test_a_wrong_section_on_the_command_line_is_not_the_files(tmp_path: Path):
    message = refusal(tmp_path, "[inner]\nsteps = 1", "--iner.rate", "0.5")
    assert message.startswith("command line: unknown key `iner`")


@pytest.mark.parametrize("words", [["--title"], ["--title", "--inner.rate"], ["title", "x"]])
def test_an_override_without_dashes_or_value_is_refused(tmp_path: Path, words: list[str]):
    assert "title" in refusal(tmp_path, "", *words)


# --- keys with their sentences ------------------------------------------------------------------


def test_keys_are_dotted_with_the_default_that_holds_there():
    found = {key.name: key for key in keys(Documented)}
    assert found["needed"] == Key("needed", "INT", "required", "How many.")
    assert found["rate"] == Key("rate", "FLOAT", "1e-5", "How fast.")
    assert found["ways"] == Key("ways", "[up|down, ...]", "[up]", "Where to.")
    assert found["inner"] == Key("inner", "section", "", "A section.")
    assert found["inner.rate"][1:3] == ("FLOAT", "0.25")  # the section's, not the class's
    assert found["inner.on"][1:3] == ("true|false", "false")
    assert found["maybe"][1:3] == ("section", "none")
    assert found["maybe.rate"][1:3] == ("FLOAT", "0.5")
    assert found["items.NAME.kind"][1:3] == ("a|b", "a")
    assert found["numbers"][1:3] == ("{NAME = FLOAT}", "none")


@pytest.mark.parametrize("model", [Experiment, DoctorConfig])
def test_every_field_has_one_or_two_lines_that_say_what_it_is(model: type[Config]):
    for key in keys(model):
        assert key.sentence.endswith("."), key
        assert key.sentence[0].isupper(), key
        assert 8 < len(key.sentence) <= 190, key


def test_every_key_can_be_set_to_its_default_by_its_name(tmp_path: Path):
    """What `keys` prints is what the command line takes."""
    printed = [k for k in keys(Experiment) if k.type != "section" and "NAME" not in k.name]
    words = [f"--{k.name}={k.default}" for k in printed if k.default != "required"]
    assert len(words) > 90 and "--judge.share=none" in words
    assert experiment(tmp_path, "", ARM, *words) == experiment(
        tmp_path,
        "",
        ARM,  # and the sections that are left out by default
        *(f"--{section}.rank=16" for section in ("lora", "reward.lora", "ppo.value_lora")),
    )


# --- experiments ------------------------------------------------------------------------------


SHIPPED = sorted(path.stem for path in EXPERIMENTS.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_loads_by_name_and_by_path(name: str):
    by_name = load_experiment(name, [], quick=False)
    assert by_name == load_experiment(str(EXPERIMENTS / f"{name}.toml"), [], quick=False)
    assert by_name.name == name  # its run folder is called as the file is


def test_reviews_comes_with_klash():
    assert "reviews" in SHIPPED


def test_a_file_nearby_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").write_text(f'name = "mine"\n{ARM}')
    assert load_experiment("reviews", [], quick=False).name == "mine"


def test_an_experiment_that_does_not_exist_is_the_users_error():
    with pytest.raises(InputError, match="nosuch"):
        load_experiment("nosuch", [], quick=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_quick_runs_one_seed_and_the_first_setting_of_every_arm(name: str):
    whole, quick = (load_experiment(name, [], quick=q) for q in (False, True))
    assert quick.seeds == whole.seeds[:1]
    assert quick.arms.keys() == whole.arms.keys()
    for arm in whole.arms:
        assert quick.arms[arm].settings == whole.arms[arm].settings[:1]
    assert quick.name != whole.name  # it overwrites no whole run
    assert quick.sft.examples == whole.quick.sft_examples <= whole.sft.examples
    assert quick.preferences.pairs == whole.quick.pairs <= whole.preferences.pairs
    assert quick.ppo.episodes == whole.quick.episodes <= whole.ppo.episodes
    assert quick.evaluation.prompts <= whole.evaluation.prompts
    assert quick.evaluation.frontier_samples >= quick.evaluation.limit_samples
    again = Experiment.model_validate(quick.model_dump())  # still a valid experiment
    assert again == quick


def test_quick_makes_a_small_experiment_no_larger(tmp_path: Path):
    path = write(
        tmp_path,
        f'name = "e"\nsft = {{ examples = 10 }}\npreferences = {{ pairs = 11 }}\n'
        "ppo = { episodes = 12, rollout_size = 4 }\n"
        f"evaluation = {{ prompts = 13, reward_pairs = 14 }}\n{ARM}",
    )
    quick = load_experiment(str(path), [], quick=True)
    assert (quick.sft.examples, quick.preferences.pairs, quick.ppo.episodes) == (10, 11, 12)
    assert (quick.evaluation.prompts, quick.evaluation.reward_pairs) == (13, 14)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "/tmp/x", "a/b", "a\\b", "..\\x", "a\u2215b", "a\u2044b", "x" * 101, "-x",
     ".hidden", "a b", "a\nb", "a\n", "a\x00", "~", "$HOME", "caf\u00e9", "CON:"],
)  # fmt: skip
def test_a_run_name_that_could_leave_the_runs_folder_is_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="`name`"):
        experiment(tmp_path, "", ARM, f"--name={toml_string(name)}")


def toml_string(text: str) -> str:
    return '"' + "".join(f"\\u{ord(c):04X}" for c in text) + '"'


@pytest.mark.parametrize("name", ["a", "reviews-2.b_c", "0", "x" * 100])
def test_plain_run_names_are_fine(tmp_path: Path, name: str):
    assert experiment(tmp_path, "", ARM, f'--name="{name}"').name == name


def arm(kind: str, setting: str, loss: str = "") -> str:
    line = f'loss = "{loss}"\n' if loss else ""
    return f'[arms.x]\nkind = "{kind}"\n{line}settings = [{setting}]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (arm("ppo", "{ beta = 0.1 }"), ["beta", "kl_coef"]),
        (arm("ppo", "{ kl_coef = 0.1, lam = 0.9 }"), ["lam", "kl_coef"]),
        (arm("ppo", "{}"), ["kl_coef"]),
        (arm("best-of-n", "{ m = 4 }"), ["m", "n"]),
        (arm("direct", "{ tau = 0.1 }", "dpo"), ["`tau`", "beta"]),
        (arm("direct", "{ beta = 0.1 }", "ipo"), ["`beta`", "tau"]),
        (arm("direct", "{}", "kto"), ["beta"]),
        (arm("direct", "{ beat = 0.1 }", "dpo"), ["`beat`", "did you mean `beta`"]),
        (arm("direct", "{ beta = 0.1 }, { beta = 0.2, x = 1 }", "dpo"), ["`x`"]),
        (arm("direct", "{ beta = 0.1 }", "dop"), ["`dop`", "did you mean `dpo`"]),
        (arm("filtered", "{ tau = 0.1 }"), ["`tau`", "beta"]),
        (arm("direkt", "{ beta = 0.1 }"), ["arms.x.kind", "direct"]),
        ('[arms.x]\nkind = "ppo"\nsettings = []\n', ["arms.x.settings"]),
        ("[arms]\n", ["arms"]),
    ],
    ids=lambda value: value.replace("\n", " ") if isinstance(value, str) else "",
)
def test_an_arm_with_a_wrong_setting_is_refused_naming_it(
    tmp_path: Path, text: str, said: list[str]
):
    with pytest.raises(InputError) as error:
        experiment(tmp_path, "", text)
    message = str(error.value)
    assert "some.toml" in message
    assert all(word in message for word in said), message


def test_an_unknown_key_of_an_arm_is_refused_with_the_nearest_key(tmp_path: Path):
    with pytest.raises(InputError) as error:
        experiment(tmp_path, "", ARM.replace("settings", "setings"))
    assert "`arms.dpo.setings`" in str(error.value)
    assert "did you mean `settings`" in str(error.value)


def test_one_setting_can_be_changed_on_the_command_line(tmp_path: Path):
    override = ["--arms.dpo.settings", "[{ beta = 0.7 }]"]
    assert experiment(tmp_path, "", ARM, *override).arms["dpo"].settings == ({"beta": 0.7},)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ppo.lam", "1.1"),
        ("ppo.episodes", "0"),
        ("reward.optimizer.learning_rate", "0"),
        ("preferences.labels", "true"),
        ("evaluation.samples", "-1"),
        ("sft.examples", "2.5"),
        ("seeds", "[]"),
        ("filtering.floor", "0"),
        ("sampling.max_new_tokens", "0"),
        ("sampling.temperature", "-0.1"),
    ],
)
def test_a_value_out_of_range_is_refused_naming_it(tmp_path: Path, key: str, value: str):
    with pytest.raises(InputError, match=f"`{key}`"):
        experiment(tmp_path, "", ARM, f"--{key}", value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", "16"),  # no attention head of size 32 fits
        ("model.layers", "0"),
        ("seeds", "[0, 0]"),  # one seed counted twice: an interval that is too narrow
        ("seeds", "[-1]"),  # numpy takes no negative seed
        ("task_seed", "-1"),
        ("evaluation.checkpoints", "[1.5]"),  # shares of the training
        ("evaluation.checkpoints", "[-0.5]"),
        ("evaluation.kl_levels", "[-1.0]"),
    ],
)
def test_a_value_that_breaks_a_run_or_its_sense_is_refused_before_it(
    tmp_path: Path, key: str, value: str
):
    with pytest.raises(InputError):
        experiment(tmp_path, "", ARM, f"--{key}", value)


@pytest.mark.parametrize(
    "text",
    [
        arm("best-of-n", "{ n = 0 }"),
        arm("best-of-n", "{ n = 2.5 }"),
        arm("ppo", "{ kl_coef = -0.1 }"),
        arm("direct", "{ beta = 0 }", "dpo"),
        arm("direct", "{ beta = -0.2 }", "dpo"),
        arm("direct", "{ tau = 0 }", "ipo"),
        arm("direct", "{ beta = 0.2 }, { beta = 0.2 }", "dpo"),  # the same runs counted twice
    ],
    ids=lambda text: text.replace("\n", " "),
)
def test_a_setting_that_no_method_can_use_is_refused(tmp_path: Path, text: str):
    with pytest.raises(InputError, match=r"arms\.x"):
        experiment(tmp_path, "", text)


def test_an_arm_cannot_take_the_name_of_the_start(tmp_path: Path):
    """`sft` is the row that every arm is compared with."""
    with pytest.raises(InputError, match="sft"):
        experiment(tmp_path, "", ARM.replace("arms.dpo", "arms.sft"))


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        (arm("direct", "{ beta = 0.1 }, { beta = -1 }", "dpo"), "arms.x.settings.1", "-1"),
        (arm("direct", "{ beta = 0.1 }, { beta = 0.1 }", "dpo"), "arms.x.settings.1", "twice"),
        (arm("best-of-n", "{ n = 4 }, { n = 2.5 }"), "arms.x.settings.1", "2.5"),
        (arm("ppo", "{ kl_coef = -0.5 }"), "arms.x.settings.0", "-0.5"),
        (arm("direct", "{ beta = 0.1 }", "dop"), "arms.x.loss", "did you mean `dpo`"),
        (arm("filtered", "{ tau = 0.1 }", "ipo"), "arms.x.loss", "ipo"),
        (arm("direct", "{ beta = 0.1 }") + "gold = true\n", "arms.x.gold", "`ppo`"),
        (arm("direct", "{ beta = 0.1 }") + "random = true\n", "arms.x.random", "`filtered`"),
    ],
    ids=lambda text: text.replace("\n", " "),
)
def test_the_setting_that_is_wrong_is_named_by_its_number(
    tmp_path: Path, text: str, key: str, said: str
):
    with pytest.raises(InputError) as error:
        experiment(tmp_path, "", text)
    (line,) = str(error.value).split("\n")
    assert f"`{key}`: " in line
    assert said in line
    assert "{'kind'" not in line  # the whole arm


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("evaluation.checkpoints", "[0.5, 2]", "evaluation.checkpoints.1"),
        ("evaluation.kl_levels", "[-1.0, 2]", "evaluation.kl_levels.0"),
        ("seeds", "[0, 1, -1]", "seeds.2"),
        ("seeds", "[0, x]", "seeds.1"),
        ("seeds", "[1, 1]", "seeds"),
        ("sampling.temperature", "0", "sampling.temperature"),
        ("preferences.listed", "true", "preferences.listed"),
        ("ppo.rollout_size", "20000", "ppo.rollout_size"),
    ],
)
def test_what_does_not_fit_is_named_down_to_the_item(
    tmp_path: Path, key: str, value: str, place: str
):
    with pytest.raises(InputError, match=f"command line: `{re.escape(place)}`: "):
        experiment(tmp_path, "", ARM, f"--{key}", value)


def test_an_update_larger_than_the_training_is_refused_with_both_numbers(tmp_path: Path):
    with pytest.raises(InputError) as error:
        experiment(tmp_path, "ppo = { episodes = 100, rollout_size = 101 }")
    assert all(
        text in str(error.value) for text in ("`ppo.rollout_size`: 101", "`episodes`", "100")
    )
    assert experiment(tmp_path, "ppo = { episodes = 100, rollout_size = 100 }").ppo.episodes == 100


@pytest.mark.parametrize(
    "text",
    [
        "ppo = { episodes = 9000, rollout_size = 4096 }\nquick = { episodes = 1000 }",
        "quick = { prompts = 4 }\nsampling = { max_new_tokens = 4 }\nevaluation = { prompts = 8 }\n"
        'task = { name = "exact" }',
    ],
)
def test_the_quick_form_of_a_valid_experiment_is_valid(tmp_path: Path, text: str):
    path = write(tmp_path, f'name = "e"\n{text}\n{ARM}')
    quick = load_experiment(str(path), [], quick=True)
    assert Experiment.model_validate(quick.model_dump()) == quick


def test_more_scored_samples_than_there_are_means_all_of_them(tmp_path: Path):
    sizes = "[evaluation]\nfrontier_samples = 100\nreward_limit_samples = 200\n"
    assert experiment(tmp_path, sizes).evaluation.limit_samples == 100


def test_a_section_keeps_the_defaults_of_its_place():
    """PPO's optimizer is not the direct methods': one key changed leaves its others alone."""
    usual = load_experiment("reviews", [], quick=False).ppo.optimizer
    for key, value in (("precision", "bfloat16"), ("learning_rate", 1e-4)):
        changed = load_experiment("reviews", [f"--ppo.optimizer.{key}={value}"], quick=False)
        assert changed.ppo.optimizer == usual.model_copy(update={key: value})
    assert usual.schedule == "constant"
