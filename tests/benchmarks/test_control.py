"""The shuffled-label control's verdict."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies.control import compare_gains, control
from shared.config import InputError
from shared.stages import read_json

NEAR_ZERO = [-0.02, 0.03, 0.01, -0.01, 0.02]
ABOVE = [0.41, 0.39, 0.45, 0.40, 0.38]


def verdict(true: list[float], shuffled: list[float]) -> bool:
    return compare_gains({"dpo": true}, {"dpo": shuffled})["dpo"]["holds"]


def test_it_holds_if_only_true_labels_gain():
    assert verdict(ABOVE, NEAR_ZERO)


def test_it_fails_if_shuffled_labels_gain_too():
    assert not verdict(ABOVE, [x / 2 for x in ABOVE])


def test_it_fails_if_true_labels_gain_nothing():
    assert not verdict(NEAR_ZERO, NEAR_ZERO[::-1])


def test_it_fails_if_shuffled_labels_lose():
    assert not verdict(ABOVE, [-x for x in ABOVE])


def test_the_difference_is_paired_by_seed():
    noise = [0.3, -0.4, 0.2, -0.1, 0.1]
    true = [a + n for a, n in zip(ABOVE, noise, strict=True)]
    found = compare_gains({"dpo": true}, {"dpo": noise})["dpo"]["difference"]
    low, high = stats.ttest_1samp(ABOVE, 0).confidence_interval(0.95)
    assert abs(found["low"] - low) < 1e-9
    assert abs(found["high"] - high) < 1e-9


def test_limits_for_many_methods_hold_together():
    """Of 400 tables of eight methods that gain nothing, 5 % and no more fail somewhere."""
    rng, failed = np.random.default_rng(0), 0
    for _ in range(400):
        shuffled = {str(i): row.tolist() for i, row in enumerate(rng.normal(size=(8, 5)))}
        true = {name: [x + 100 for x in gains] for name, gains in shuffled.items()}
        verdicts = compare_gains(true, shuffled).values()
        failed += not all(v["holds"] for v in verdicts)
    assert 0.02 < failed / 400 < 0.09


def test_the_tables_go_to_a_folder_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gains = iter([{"dpo": ABOVE}, {"dpo": NEAR_ZERO}])
    monkeypatch.setattr("benchmarks.studies.control._gains", lambda experiment, runs: next(gains))
    out = tmp_path / "a" / "new" / "one"
    assert control(out=out, overrides=("--name", "mine"))
    assert read_json(out / "mine.json")["methods"]["dpo"]["gain_true"]["per_seed"] == ABOVE
    assert "| dpo |" in (out / "mine.md").read_text()


def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.studies.control._gains", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.out: cannot make this folder: Not a directory"):
        control(out=tmp_path / "file" / "out")
