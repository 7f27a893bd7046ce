"""The report: one safe, self-contained page that never claims more than the numbers show."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.build import build_report
from benchmarks.report.conclusion import conclude, winner
from benchmarks.report.style import look
from benchmarks.report.tables import Cell, Column, Table, duration, number, si, to_csv, to_latex
from benchmarks.results.schema import Results
from shared.config import InputError

Json = dict[str, Any]

PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "</title></head><body onload=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "<a href=javascript:alert(1)>go</a>",
    "]]><script>alert(1)</script><![CDATA[",
    "--><iframe src=https://evil.example></iframe><!--",
    "{{ 7 * 7 }}{% include 'page.css' %}",
    "<form action=//evil.example><button formaction=javascript:alert(1)>",
    "&lt;b&gt;&#60;script&#62;",
    "<math><mtext></mtext><style><img src=x onerror=alert(1)></style></math>",
    "=cmd|'/c calc'!A0",
    "$\\frac{a}{b}$ \u202e\u0000\x1b[31m",
]


# --- a small, plausible run ------------------------------------------------------------------


def estimate(mean: float | None, seeds: int, half: float = 0.02) -> Json:
    if mean is None:
        return {"mean": None, "per_seed": [None] * seeds}
    limits = {"low": mean - half, "high": mean + half} if seeds > 1 else {}
    return {"mean": mean, "per_seed": [mean] * seeds, **limits}


def method(kind: str, gold: float, kl: float, seeds: int, **changes: Any) -> Json:
    def e(mean: float | None) -> Json:
        return estimate(mean, seeds)

    checkpoints = [
        {"fraction": f, "gold": e(0.03 + f * (gold - 0.03)), "kl": e(f * kl)} for f in (0.5, 1.0)
    ]
    setting = {"setting": {"beta": 0.2}, "tuned": True, "validation_gold": gold}
    settings = [setting | {"gold": e(gold), "kl": e(kl), "checkpoints": checkpoints}]
    far = {"setting": {"beta": 0.05}, "tuned": False, "validation_gold": None}
    settings.append(far | {"gold": e(gold + 0.05), "kl": e(kl * 3)})
    trained = kind not in ("sft", "best-of-n")
    values = {name: e(gold) for name in ("gold", "greedy_gold", "proxy", "win_rate", "rm_limit")}
    values |= {name: e(0.1) for name in ("hacking_gap", "k1", "k3", "truncated", "well_formed")}
    return {
        "kind": kind,
        "setting": {"beta": 0.2} if trained else {},
        **values,
        "gain": e(gold - 0.03),
        "kl": e(kl),
        "kl_is_bound": kind == "best-of-n",
        "frontier_efficiency": e(0.8 if trained else None),
        "efficiency_is_lower_bound": trained,
        "frontier_margin": e(None),
        "length": e(15.0),
        "displacement": e(-3.0 if trained else None),
        "gold_at_matched_kl": {"1": e(gold / 2), "5": e(gold) if trained else None},
        "cost": {
            "wall_s": 40.0,
            "train_tokens": 2e6,
            "generated_tokens": 0,
            "flops": 1e13,
            "peak_memory_bytes": 9e8,
            "models_held": 2,
            "labels_used": 6000,
            "phases": {"update": 30.0, "score": 10.0},
        },
        "stability": {
            "runs": 6,
            "failed": 0,
            "stopped_early": 0,
            "gold_iqr": None,
            "final_over_best": 0.98,
            "kl_overshoot": None,
            "gradient_spikes": 0,
        },
        "sweep": settings if trained else [],
        **changes,
    }


def difference(a: str, b: str, mean: float | None, kl: float | None, seeds: int) -> Json:
    return {
        "a": a,
        "b": b,
        "metric": "gold" if kl is None else "gold_at_matched_kl",
        "kl": kl,
        "difference": estimate(mean, seeds, half=0.05),
        "verdict": f"{a} wins",  # the report judges for itself
    }


def run_of(seeds: int = 3, names: tuple[str, str, str] = ("ppo", "dpo", "fdpo")) -> Json:
    """results.json, samples.json and curves.json of a head-to-head."""
    ppo, dpo, fdpo = names
    shares = {"epoch": 1, "kept_share": 0.8, "kept_share_per_seed": [0.8] * seeds, "floor_bound": 0}
    e = estimate
    results = {
        "schema": 1,
        "experiment": "reviews",
        "task": "reviews",
        "seeds": list(range(seeds)),
        "environment": {"python": "3.11", "versions": {"numpy": "2.3"}},
        "sizes": {"pairs": 6000},
        "methods": {
            "sft": method("sft", 0.03, 0.0, seeds),
            "best-of-n": method("best-of-n", 0.6, 1.8, seeds),
            ppo: method("ppo", 0.75, 9.4, seeds),
            dpo: method("dpo", 0.84, 6.0, seeds),
            fdpo: method("fdpo", 0.85, 5.0, seeds, filtering=[shares]),
        },
        "reward_model": {
            "accuracy": e(0.7, seeds),
            "bayes_accuracy": 0.8,
            "share_of_attainable": e(0.67, seeds),
            "calibration_error": e(0.03, seeds),
            "length_correlation": e(0.05, seeds),
            "gold_correlation": e(0.7, seeds),
            "score_sd": e(1.3, seeds),
            "pairs": 2000,
            "reliability": [[0.2, 0.22, 50], [0.5, 0.5, 200], [0.8, 0.77, 60]],
        },
        "frontier": [
            {"kl": k, "gold": g, "effective_sample_size": 200, "is_bound": k > 2}
            for k, g in ((1.1, 0.7), (1.8, 0.8), (2.6, 0.88), (40, 1.0))
        ],
        "rm_frontier": [
            {"kl": k, "gold": g, "effective_sample_size": 200, "is_bound": False}
            for k, g in ((1.1, 0.6), (1.8, 0.7))
        ],
        "comparisons": [
            difference(ppo, dpo, -0.2, 1.0, seeds),
            difference(ppo, dpo, -0.2, 5.0, seeds),
            difference(ppo, fdpo, -0.04, 5.0, seeds),
            difference(ppo, dpo, -0.09, None, seeds),
        ],
    }
    answers = {name: {"text": f"it was {name} .", "gold": 0.5} for name in results["methods"]}
    log = {"loss": [[0, 0.7], [10, float("nan")], [20, 0.5]], "odd/metric": [[0, 1], [20, 2]]}
    return {
        "results": results,
        "samples": {"prompts": [{"prompt": "the plot", "answers": answers}]},
        "curves": {dpo: {str(seed): log for seed in range(seeds)}},
    }


def write(folder: Path, run: Json) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in run.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of the plain three-seed run."""
    return build_report(write(tmp_path_factory.mktemp("run"), run_of())).parent


@pytest.fixture(scope="module")
def page(built: Path) -> str:
    return (built / "index.html").read_text(encoding="utf-8")


class Structure(HTMLParser):
    """A page's elements with their attributes' names, apart for HTML and for SVG; all links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html: list[tuple[str, ...]] = []
        self.svg: set[tuple[str, ...]] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.inside = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, *(name for name, _ in attrs))
        self.links += [value or "" for name, value in attrs if name.endswith(("href", "src"))]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if self.inside:
            self.svg.add(element)
        else:
            self.html.append(element)
        self.inside += tag == "svg"

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "svg"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


def visible(text: str) -> str:
    """The page's words, without tags and style."""
    body = re.sub(r"<style>.*?</style>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


# --- the page --------------------------------------------------------------------------------


def test_page_is_self_contained(page: str):
    structure = Structure(page)
    assert "script" not in {element[0] for element in structure.html} | {
        element[0] for element in structure.svg
    }
    assert structure.links
    assert all(link.startswith(("#", "data:")) for link in structure.links)
    assert "url(http" not in page and "@import" not in page and "<?xml" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_inlined_figures_share_no_ids_and_refer_to_their_own(page: str):
    ids = Structure(page).ids
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert used <= set(ids)


def test_figures_and_tables_are_written(built: Path):
    figures = {path.name for path in (built / "figures").iterdir()}
    tables = {path.name for path in (built / "tables").iterdir()}
    names = ("frontier", "learning", "cost", "reward-model", "filtering", "training-0")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert {"main.csv", "main.tex", "matched-kl.csv", "stability.tex"} <= tables


def test_hostile_text_adds_nothing_to_the_page(tmp_path: Path):
    """Same structure as with harmless text: nothing that a run contains becomes markup."""

    def hostile(i: int) -> str:
        return PAYLOADS[i % len(PAYLOADS)]

    def with_texts(text: Callable[[int], str]) -> Structure:
        names = (text(0) + "a", text(5) + "b", text(14) + "c")
        run = run_of(names=names)
        results = run["results"]
        results |= {"experiment": text(3), "task": text(4), "environment": {text(7): text(9)}}
        results["sizes"] = {text(11): 1}
        results["methods"][names[0]]["setting"] = {text(1): 0.5}
        results["methods"][names[1]]["cost"]["phases"] = {text(2): 1.0, text(5): 2.0}
        answers = [{n: {"text": text(i), "gold": 0.1} for n in names} for i in range(16)]
        prompts = [{"prompt": text(i), "answers": a} for i, a in enumerate(answers)]
        log = {"loss": [[0, 1.0], [1, 0.5]], text(6): [[0, 1.0], [1, 0.5]]}
        run |= {"samples": {"prompts": prompts}, "curves": {names[2]: {text(8): log}}}
        folder = write(tmp_path / str(text is hostile), run)
        return Structure(build_report(folder).read_text(encoding="utf-8"))

    benign, attacked = with_texts(lambda i: f"word {i}"), with_texts(hostile)
    assert attacked.html == benign.html
    assert attacked.svg <= benign.svg | {("path", "d", "clip-path", "style")}
    assert attacked.links.count("#top") == benign.links.count("#top")
    assert all(link.startswith(("#", "data:")) for link in attacked.links)
    names = {path.name for path in (tmp_path / "True" / "report" / "figures").iterdir()}
    assert all(re.fullmatch(r"[a-z0-9-]+\.(svg|png)", name) for name in names)


def test_nulls_are_dashes_and_bounds_are_marked(page: str):
    words = visible(page)
    row = words[words.index("best-of-n", words.index("Displacement")) :][:300]
    assert "\u2013" in row and "≤ 1.80" in row
    assert "≥ 80 %" in words and "not reached" in words


def test_a_column_for_what_only_some_runs_have(page: str, tmp_path: Path):
    run = run_of()
    (epoch,) = run["results"]["methods"]["fdpo"]["filtering"]
    epoch["spoiled_kept_per_seed"] = [0.2, 0.3, 0.4]
    learnt = {"sentences": 1146, "correlation": 0.696, "second_opinion": 0.434}
    run["results"]["gold_quality"] = learnt
    for method in run["results"]["methods"].values():
        method["second_opinion"] = estimate(0.61, 3)
    page_of_all = build_report(write(tmp_path, run)).read_text(encoding="utf-8")
    for said in ("Spoiled pairs kept", "30 %", "1,146 sentences", "correlates 0.70", "0.43."):
        assert said in visible(page_of_all) and said not in visible(page)


def test_same_input_twice_gives_the_same_bytes(built: Path, tmp_path: Path):
    again = build_report(write(tmp_path / "elsewhere", run_of())).parent
    files = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert [f for f in files if (built / f).read_bytes() != (again / f).read_bytes()] == []


def test_a_folder_that_is_no_run_is_the_users_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"results\.json: there is no such file"):
        build_report(tmp_path)
    (tmp_path / "results.json").write_text('{"experimnt": 1}')
    with pytest.raises(InputError, match="did you mean `experiment`"):
        build_report(tmp_path)


def test_the_report_needs_no_torch():
    code = "import sys, benchmarks.report.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what it claims --------------------------------------------------------------------------


def results_of(run: Json) -> Results:
    return Results.model_validate(run["results"])


def test_three_seeds_and_an_interval_without_zero_name_a_winner(page: str):
    results = results_of(run_of())
    assert [winner(c, results) for c in results.comparisons] == ["dpo", "dpo", None, "dpo"]
    words = visible(page)
    assert "At 5 nats of KL from the start, DPO scores higher than PPO" in words
    assert "between PPO and fDPO no difference is shown" in words


def test_an_interval_with_zero_names_none():
    run = run_of()
    for comparison in run["results"]["comparisons"]:
        comparison["difference"] |= {"mean": 0.01, "low": -0.04, "high": 0.06}
    results = results_of(run)
    assert {winner(c, results) for c in results.comparisons} == {None}
    assert "no difference between methods is shown" in conclude(results).answer


def claims_nothing(text: str) -> bool:
    """No row is marked as shown, and no sentence calls a method higher than another."""
    words = visible(text).replace("Higher is better", "")
    return 'class="shown"' not in text and re.search(r"\bhigher\b", words) is None


def test_two_seeds_never_name_a_winner(page: str, tmp_path: Path):
    run = run_of(seeds=2)
    results = results_of(run)
    assert {winner(c, results) for c in results.comparisons} == {None}
    text = build_report(write(tmp_path, run)).read_text(encoding="utf-8")
    assert "No winner can be named" in visible(text)
    assert claims_nothing(text) and not claims_nothing(page)


def test_one_seed_says_so_and_shows_no_intervals(tmp_path: Path):
    """Here without samples, training logs, limits and comparisons too."""
    run = run_of(seeds=1)["results"] | {"comparisons": [], "frontier": [], "rm_frontier": []}
    text = build_report(write(tmp_path, {"results": run})).read_text(encoding="utf-8")
    words = visible(text)
    assert "One seed: there are no intervals" in words and claims_nothing(text)
    assert re.search(r"\[\S+, \S+\]", words) is None


def test_nothing_to_compare_is_said():
    run = run_of()
    run["results"]["comparisons"] = []
    assert conclude(results_of(run)).answer.startswith("No two methods could be compared")


OWN_ROWS = {
    "files": ["desk.jsonl"],
    "format": "pairs",
    "rows": 400,
    "kept": 369,
    "dropped": {"duplicate": 18, "empty": 13},
    "sides": {"train": 300, "validation": 20, "test": 49},
}


def own_run(**changes: Any) -> Json:
    """A run on a user's rows: no limit was estimated, no noise of the labels is known."""
    run = run_of()
    run["results"] |= {"experiment": "desk", "task": "own", "own_rows": OWN_ROWS, **changes}
    run["results"] |= {"frontier": [], "rm_frontier": []}
    for found in run["results"]["methods"].values():
        found["frontier_efficiency"] = estimate(None, 3)
    for name in ("bayes_accuracy", "share_of_attainable"):
        run["results"]["reward_model"][name] = None if name[0] == "b" else estimate(None, 3)
    chat = "system: Be kind.\nuser: It broke."
    run["samples"]["prompts"][0] |= {"prompt": "<|im_start|>system\nBe", "chat": chat}
    return run


def test_of_own_rows_the_page_says_how_many_are_used_and_why_not_the_others(tmp_path: Path):
    text = build_report(write(tmp_path, own_run())).read_text(encoding="utf-8")
    words = visible(text)
    assert "369 of the 400 rows of desk.jsonl are used. Left out: 18 duplicate, 13 empty." in words
    assert "300 train, 20 choose settings and 49 test" in words
    assert "user: It broke." in words and "im_start" not in words
    for empty in ("Of the limit", "Well-formed", "Best possible accuracy", "klash compare"):
        assert empty not in words


def test_without_a_judge_the_page_speaks_of_no_gold_and_of_no_chance_as_a_fact(tmp_path: Path):
    run = own_run(comparisons=[])
    of_gold = ("gold", "greedy_gold", "gain", "hacking_gap", "win_rate",
               "win_rate_length_controlled", "win_rate_against_chosen")  # fmt: skip
    for found in run["results"]["methods"].values():
        found |= {name: estimate(None, 3) for name in of_gold}
        found["proxy"] = estimate(0.2, 3, half=0.5)
        found["sweep"] = []
    run["results"]["reward_model"]["gold_correlation"] = estimate(None, 3)
    run["samples"]["prompts"][0]["answers"] = {"dpo": {"text": "restart it", "gold": None}}
    words = visible(build_report(write(tmp_path, run)).read_text(encoding="utf-8"))
    assert "No winner can be named: nobody judged the answers." in words
    assert "changes by +0.20 [\u22120.30, 0.70] with" in words  # the limits stand beside the mean
    for gone in ("Win rate", "Against chosen", "Hacking gap", "Correlation with gold", "Gold, q"):
        assert gone not in words
    assert re.search(r"\bnan\b|\bnull\b", words, re.IGNORECASE) is None


def test_limits_of_a_share_stay_a_share_on_the_page_and_whole_in_the_file(tmp_path: Path):
    run = run_of()
    run["results"]["reward_model"]["accuracy"] = estimate(0.9, 3, half=0.3)
    built = build_report(write(tmp_path, run))
    assert "90.0 % [60.0, 100.0]" in visible(built.read_text(encoding="utf-8"))
    with (built.parent / "tables" / "reward-model.csv").open(encoding="utf-8") as file:
        high = next(row for row in csv.DictReader(file) if row["measure"] == "accuracy")
    assert float(high["value_high"]) == pytest.approx(1.2)


def test_the_page_names_the_command_of_what_comes_with_klash_alone(page: str, tmp_path: Path):
    assert "klash compare reviews" in visible(page)
    quick = run_of()
    quick["results"]["experiment"] = "reviews-quick"
    text = build_report(write(tmp_path, quick)).read_text(encoding="utf-8")
    assert "klash compare reviews --quick" in visible(text)


def test_where_no_training_left_the_start_that_is_said():
    facts = dict(conclude(results_of(run_of())).facts)
    assert "Little moved" not in facts
    run = run_of()
    for found in run["results"]["methods"].values():
        found["kl"] = estimate(0.001, 3, half=0.0)
    facts = dict(conclude(results_of(run)).facts)
    assert "start" in facts["Little moved"]


def test_settings_that_nobody_chose_are_not_called_tuned(tmp_path: Path):
    run = run_of()
    for found in run["results"]["methods"].values():
        for setting in found["sweep"]:
            setting["validation_gold"] = None
    words = visible(build_report(write(tmp_path, run)).read_text(encoding="utf-8"))
    assert "at its first setting" in words and "tuned setting" not in words


def test_levels_that_no_two_methods_reach_are_one_line_and_no_table(tmp_path: Path):
    run = run_of()
    run["results"]["comparisons"] += [difference("ppo", "dpo", None, 50.0, 3)]
    text = build_report(write(tmp_path, run)).read_text(encoding="utf-8")
    assert "No two methods both got so far: differences in gold at 50 nats." in visible(text)
    assert "<summary>Differences in gold at 50 nats" not in text
    assert "<summary>Differences in gold at 5 nats" in text


def test_seeds_that_failed_do_not_count():
    run = run_of()
    for comparison in run["results"]["comparisons"]:
        comparison["difference"]["per_seed"][0] = None
    results = results_of(run)
    assert {winner(c, results) for c in results.comparisons} == {None}


# --- tables ----------------------------------------------------------------------------------


def one_column(*texts: str) -> Table:
    cells = [[Cell(text, values=(text,))] for text in texts]
    return Table("t", "t", [Column("c", ("c",), numeric=False)], cells)


def test_csv_cells_cannot_run_as_formulas():
    texts = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", " =1", "-0.5", "+1e-3", "plain", 'a"b,\nc']
    rows = [row[0] for row in csv.reader(io.StringIO(to_csv(one_column(*texts))))][1:]
    quoted = ["'=1+1", "'+cmd", "'-2+3", "'@SUM(A1)", "'\t=1", "' =1"]
    assert rows == [*quoted, "-0.5", "+1e-3", "plain", 'a"b,\nc']


def test_csv_has_full_numbers_and_empty_nulls(built: Path):
    with (built / "tables" / "main.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["ppo"]["gold"]) == 0.75 and float(rows["ppo"]["gold_low"]) == 0.73
    assert rows["sft"]["displacement"] == ""


def test_latex_specials_are_escaped():
    text = to_latex(one_column(r"50% of a_b & {x} #1 $y$ ~ ^ \input{/etc/passwd}", "[1]"))
    assert (
        r"50\% of a\_b \& \{x\} \#1 \$y\$ \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{}input\{/etc/passwd\} \\"
    ) in text
    assert "{[1]}" in text  # a bare [ after \\ would read as a length
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1


def test_numbers_read_as_people_write_them():
    assert [number(x, 2, True) for x in (-0.001, 0.5, -0.5)] == ["0.00", "+0.50", "\u22120.50"]
    assert [number(x) for x in (None, float("nan"))] == ["\u2013", "\u2013"]
    assert [si(x) for x in (0, 999, 999_999, 4.4e13)] == ["0", "999", "1 M", "44 T"]
    assert [duration(x) for x in (0.0, 4.2, 119, 7199, 7260)] == [
        "0 s",
        "4.2 s",
        "119 s",
        "119 min 59 s",
        "2 h 01 min",
    ]


def test_an_arm_named_after_its_method_looks_like_it():
    assert look("dpo-0.2").label == "DPO 0.2"
    assert look("dpo-0.2").family == look("dpo").family
    assert look("ppo-gold-1").label == "PPO on gold 1"
    assert look("fdpo-random").label == "fDPO at random"
    assert look("best-of-n").label == "best-of-n"
    assert look("mine-too").family == "other"
    assert look("mine-too").label == "mine-too"
