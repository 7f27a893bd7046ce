"""One method of an experiment on its own: a plain transformers folder with a model card."""

from pathlib import Path

from benchmarks.entry import Argument, Overrides


def train(
    method: Argument[str],
    file: Argument[str] = "reviews",
    /,
    *,
    out: Path,
    quick: bool = False,
    runs: Path = Path("runs"),
    overrides: Overrides = (),
) -> None:
    """Train one model of an experiment: a transformers folder and a model card in `out`.

    What is there already is not trained again, and a training that was killed goes on at the stage
    where it was. An arm of the experiment is trained at its first setting; a method without one at
    what is common: `--arms.dpo.settings "[{ beta = 0.1 }]"` says otherwise.

    Args:
        method: sft, reward, an arm of the experiment, or ppo, dpo, ipo, kto, fdpo.
        file: an experiment's TOML file, or the name of one that comes with Klash.
        out: the new folder.
        quick: the experiment's smaller form.
        runs: the folder of all runs and of the stages they share.
    """
    from benchmarks.pipeline.loading import load_experiment
    from benchmarks.pipeline.single import put_model, train_one
    from shared.config import InputError
    from shared.models import ranks

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a new folder")
    experiment = load_experiment(file, overrides, quick)
    trained = train_one(experiment, method, runs)
    if not ranks.is_first():
        return
    put_model(trained, out)
    print(f"{method}: {out}")
