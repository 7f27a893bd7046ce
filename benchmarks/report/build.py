"""Build the report of a run: one self-contained page, figures, tables.

Reads `results.json`, `samples.json` and `curves.json`; needs no torch and no network. The page has
no script, and everything from the run passes through the template's escaping.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter, ValidationError

from benchmarks.evaluation.statistics import SEEDS_FOR_A_WINNER
from benchmarks.report import page_tables as rows
from benchmarks.report.cells import by_gold
from benchmarks.report.conclusion import Conclusion, conclude
from benchmarks.report.figures import draw_all
from benchmarks.report.frontier_plot import KL_CAP, beyond
from benchmarks.report.run_tables import timed_alone
from benchmarks.report.style import PALETTE, Picture, look, marker_path
from benchmarks.report.tables import NULL, Bar, Table, count, number, to_csv, to_latex
from benchmarks.report.training_plot import Curves
from benchmarks.results.schema import Results
from shared.config import Config, InputError, validate

SHIPPED = Path(__file__).parents[1] / "experiments"


class Answer(Config):
    """One method's completion of a prompt, and its gold score."""

    text: str
    gold: float | None = None


class Prompt(Config):
    """A test prompt with every method's answer; `chat`: its messages, without the template."""

    prompt: str
    chat: str | None = None
    answers: dict[str, Answer]


class Samples(Config):
    """`samples.json`."""

    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class ShownAnswer:
    """An answer as the page shows it."""

    method: str
    text: str
    gold: str
    bar: Bar | None


def build_report(run: Path) -> Path:
    """Write `run/report/` from the run's JSON files; returns the page's path."""
    draw_report(run / "report", run)
    return run / "report" / "index.html"


def draw_report(folder: Path, run: Path) -> None:
    """Stage: `index.html`, `figures/` and `tables/`, from the JSON files in `run`."""
    results = read_results(run)
    samples = validate(
        Samples, _read(run / "samples.json", optional=True), str(run / "samples.json")
    )
    order = list(results.methods)
    curves = dict(
        sorted(
            _curves(run / "curves.json").items(),
            key=lambda item: order.index(item[0]) if item[0] in order else len(order),
        )
    )
    pictures = draw_all(results, curves)
    tables = rows.all_tables(results)
    _write_files(folder, pictures, tables)
    text = _page(results, samples, curves, pictures, tables)
    (folder / "index.html").write_bytes(text.encode("utf-8", errors="replace"))


def read_results(run: Path) -> Results:
    """`results.json` of a run's folder; InputError where it is none."""
    return validate(Results, _read(run / "results.json"), str(run / "results.json"))


def _read(path: Path, optional: bool = False) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise InputError(f"{path}: there is no such file; is this the folder of a run?") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _curves(path: Path) -> Curves:
    """Training logs; a diverged run's NaN is allowed here, and leaves a gap."""
    try:
        return TypeAdapter(Curves).validate_python(_read(path, optional=True))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: `{where}`: {first['msg']}") from error


def _write_files(report: Path, pictures: dict[str, Picture], tables: dict[str, Table]) -> None:
    """Figures and tables, in folders of their own that hold nothing else."""
    for name in ("figures", "tables"):
        shutil.rmtree(report / name, ignore_errors=True)
        (report / name).mkdir(parents=True)
    for picture in pictures.values():
        (report / "figures" / f"{picture.name}.svg").write_bytes(picture.svg)
        (report / "figures" / f"{picture.name}.png").write_bytes(picture.png)
    for table in tables.values():
        for suffix, text in (("csv", to_csv(table)), ("tex", to_latex(table))):
            path = report / "tables" / f"{table.name}.{suffix}"
            path.write_bytes(text.encode("utf-8", errors="replace"))


def _page(
    results: Results,
    samples: Samples,
    curves: Curves,
    pictures: dict[str, Picture],
    tables: dict[str, Table],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"look": look, "mark": marker_path, "count_of": count}
    conclusion = conclude(results)
    hero = rows.headline_table(results, conclusion.comparisons)
    differences = [t for name, t in tables.items() if name.startswith("differences-")]
    comparisons = [t for t in differences if any(row[1].text != NULL for row in t.rows)]
    return environment.get_template("template.html").render(
        r=results,
        conclusion=conclusion,
        seeds_needed=SEEDS_FOR_A_WINNER,
        command=_command(results.experiment),
        pictures=pictures,
        tables=tables,
        comparisons=comparisons,
        unreached=[t.caption for t in differences if t not in comparisons],
        first_table=_first_table(comparisons, conclusion),
        hero=hero,
        hero_left=len(conclusion.comparisons) - len(hero.rows),
        training=list(enumerate(curves)),
        samples=list(_answers(results, samples)),
        palette=PALETTE,
        beyond=beyond(results),
        timed=timed_alone(results),
        kl_cap=f"{KL_CAP:g}",
        environment=list(_flat(results.environment)),
    )


def _command(experiment: str) -> str | None:
    """What runs an experiment that comes with Klash; None of one that the user wrote."""
    for words in (experiment, f"{experiment.removesuffix('-quick')} --quick"):
        if (SHIPPED / f"{words.partition(' ')[0]}.toml").is_file():
            return f"klash compare {words}"
    return None


def _first_table(tables: Sequence[Table], conclusion: Conclusion) -> str:
    """The name of the table that the page's first sentence is about."""
    if not conclusion.comparisons:
        return tables[0].name if tables else ""
    return rows.comparison_name(conclusion.comparisons[0].kl)


def _answers(results: Results, samples: Samples) -> Iterator[tuple[str, list[ShownAnswer]]]:
    """Each prompt's answers, SFT's first and then in the order of the main table."""
    order = ["sft", *(name for name, _ in by_gold(results) if name != "sft")]
    scores = [a.gold for p in samples.prompts for a in p.answers.values() if a.gold is not None]
    reach = max([1e-9, *map(abs, scores)])

    def bar(gold: float | None) -> Bar | None:
        if gold is None:
            return None
        at = round(50 + 50 * gold / reach, 2)
        return Bar(min(at, 50.0), at, max(at, 50.0), 50.0)

    for prompt in samples.prompts:
        known = [name for name in order if name in prompt.answers]
        known += [name for name in prompt.answers if name not in known]
        yield (
            prompt.chat or prompt.prompt,
            [
                ShownAnswer(name, a.text, number(a.gold, signed=True), bar(a.gold))
                for name in known
                for a in (prompt.answers[name],)
            ],
        )


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as dotted names."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            text = "none" if item is None else json.dumps(item)
            yield f"{prefix}{key}", item if isinstance(item, str) else text
