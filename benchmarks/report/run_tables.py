"""The tables on how runs went: what they cost, the reward model, stability, filtering."""

from statistics import fmean

from benchmarks.report.cells import (
    METHOD,
    NAME,
    PERCENT,
    by_gold,
    estimate_cell,
    method_cell,
    value_keys,
    within,
)
from benchmarks.report.style import look
from benchmarks.report.tables import (
    NULL,
    Cell,
    Column,
    Table,
    count,
    duration,
    number,
    percent,
    si,
)
from benchmarks.results.schema import Results, RewardModel


def cost_table(results: Results) -> Table:
    """What one training run took."""
    rows = []
    for name, m in by_gold(results):
        c = m.cost
        rows.append(
            [
                method_cell(name, m),
                Cell(duration(c.wall_s), values=(c.wall_s,)),
                Cell(si(c.train_tokens), values=(c.train_tokens,)),
                Cell(si(c.generated_tokens), values=(c.generated_tokens,)),
                Cell(si(c.flops), values=(c.flops,)),
                Cell(percent(c.mfu), values=(c.mfu,)),
                Cell(si(c.peak_memory_bytes, "B"), values=(c.peak_memory_bytes,)),
                Cell(str(c.models_held), values=(c.models_held,)),
                Cell(count(c.labels_used), values=(c.labels_used,)),
            ]
        )
    labels = {
        "Time": "wall_s",
        "Tokens trained": "train_tokens",
        "Tokens generated": "generated_tokens",
        "FLOPs": "flops",
        "Of peak FLOP/s": "mfu",
        "Peak memory": "peak_memory_bytes",
        "Models held": "models_held",
        "Labels used": "labels_used",
    }
    columns = [NAME, *(Column(label, (key,)) for label, key in labels.items())]
    return Table("cost", "One training run of each method; shared stages left out", columns, rows)


def timed_alone(results: Results) -> str:
    """Which seeds' seconds are shown, where not all seeds had the machine to themselves."""
    timed = next((m.cost.timed_seeds for m in results.methods.values() if m.cost.timed_seeds), [])
    if not timed or timed == results.seeds:
        return ""
    which = f"seed {timed[0]}" if len(timed) == 1 else f"seeds {', '.join(map(str, timed))}"
    return f"Time, memory and share of peak are of {which}, run alone; others ran side by side."


# where the labels' noise is known, or somebody judges
IF_KNOWN = ("bayes_accuracy", "share_of_attainable", "gold_correlation")


def reward_table(rm: RewardModel) -> Table:
    """The reward model's numbers, one per row."""
    cells = [
        (
            "Accuracy on held-out pairs",
            "accuracy",
            within(estimate_cell(1, scale=100, unit=" %"), 0, 1)(rm.accuracy),
        ),
        (
            "Best possible accuracy",
            "bayes_accuracy",
            Cell(percent(rm.bayes_accuracy, 1), values=(rm.bayes_accuracy, None, None)),
        ),
        ("Share of what is attainable", "share_of_attainable", PERCENT(rm.share_of_attainable)),
        (
            "Calibration error",
            "calibration_error",
            within(estimate_cell(3), 0, 1)(rm.calibration_error),
        ),
        ("Correlation with length", "length_correlation", estimate_cell()(rm.length_correlation)),
        ("Correlation with gold", "gold_correlation", estimate_cell()(rm.gold_correlation)),
        ("Score's standard deviation", "score_sd", estimate_cell()(rm.score_sd)),
        ("Held-out pairs", "pairs", Cell(count(rm.pairs), values=(rm.pairs, None, None))),
    ]
    columns = [Column("Measure", ("measure",), numeric=False), Column("Value", value_keys("value"))]
    rows = [
        [Cell(label, values=(key,)), cell]
        for label, key, cell in cells
        if cell.text != NULL or key not in IF_KNOWN
    ]
    return Table("reward-model", "The reward model, on pairs it has not seen", columns, rows)


def stability_table(results: Results) -> Table:
    """How the runs of each method went, over seeds and settings."""
    rows = []
    for name, m in by_gold(results):
        s = m.stability
        counts = (s.runs, s.failed, s.stopped_early)
        iqr = Cell(number(s.gold_iqr), values=(s.gold_iqr,))
        final = Cell(percent(s.final_over_best), values=(s.final_over_best,))
        rows.append(
            [
                Cell(look(name).label, values=(name,), method=name),
                *(Cell(str(n), values=(n,)) for n in counts),
                *([iqr, final] if results.judged else []),
                Cell(number(s.kl_overshoot), values=(s.kl_overshoot,)),
                Cell(str(s.gradient_spikes), values=(s.gradient_spikes,)),
            ]
        )
    of_gold = {"Gold, quartile range": "gold_iqr", "Final / best gold": "final_over_best"}
    labels = {
        "Runs": "runs",
        "Failed": "failed",
        "Stopped early": "stopped_early",
        **(of_gold if results.judged else {}),
        "KL overshoot": "kl_overshoot",
        "Gradient spikes": "gradient_spikes",
    }
    columns = [METHOD, *(Column(label, (key,)) for label, key in labels.items())]
    return Table("stability", "Runs over all seeds and settings", columns, rows)


def filtering_table(results: Results) -> Table:
    """What the filter kept before each epoch, and of the spoiled pairs where there are any."""
    filtered = {name: m.filtering for name, m in results.methods.items() if m.filtering}
    spoiled = any(e.spoiled_kept_per_seed for epochs in filtered.values() for e in epochs)
    labels = {"Epoch": "epoch", "Pairs kept": "kept_share"}
    labels |= {"Spoiled pairs kept": "spoiled_kept_share"} if spoiled else {}
    labels |= {"Seeds at the floor": "floor_bound"}
    rows = []
    for name, epochs in filtered.items():
        for epoch in epochs:
            shares = epoch.spoiled_kept_per_seed
            kept = [epoch.kept_share] + ([None if shares is None else fmean(shares)] * spoiled)
            rows.append(
                [
                    Cell(look(name).label, values=(name,), method=name),
                    Cell(str(epoch.epoch), values=(epoch.epoch,)),
                    *(Cell(percent(share), values=(share,)) for share in kept),
                    Cell(str(epoch.floor_bound), values=(epoch.floor_bound,)),
                ]
            )
    columns = [METHOD, *(Column(label, (key,)) for label, key in labels.items())]
    return Table("filtering", "Pairs kept by the filter", columns, rows)
