"""Defaults of pretrained models: what a file says stands, and what it leaves out has one."""

from typing import Any

import pytest

from benchmarks.pipeline.defaults import with_defaults

MODEL = {"pretrained": "a/b"}


def arms_of(**raw: Any) -> dict[str, Any]:
    return with_defaults({"model": MODEL, **raw})["arms"]


def test_a_changed_setting_of_a_default_arm_leaves_the_others():
    settings = [{"beta": 0.3}]
    usual = arms_of()
    found = arms_of(arms={"dpo": {"settings": settings}})
    assert found == {**usual, "dpo": {**usual["dpo"], "settings": settings}}


def test_own_arms_take_the_place_of_all_defaults():
    own = {"dpo": {"kind": "direct", "loss": "dpo", "settings": [{"beta": 0.3}]}}
    assert arms_of(arms=own) == own
    unknown = {"mine": {"settings": [{"beta": 0.3}]}}
    assert arms_of(arms=unknown) == unknown  # and is refused, with its name, for want of a kind


def test_a_model_from_scratch_has_none_of_them():
    assert with_defaults({"name": "x"}) == {"name": "x"}


def test_what_a_file_says_stands():
    found = with_defaults({"model": MODEL, "reward": {"optimizer": {"learning_rate": 1.0}}})
    assert found["reward"]["optimizer"] == {"learning_rate": 1.0, "precision": "bfloat16"}
    whole, lora = with_defaults({"model": MODEL}), with_defaults({"model": MODEL, "lora": {}})
    rate = lora["direct"]["optimizer"]["learning_rate"]
    assert rate == pytest.approx(10 * whole["direct"]["optimizer"]["learning_rate"])
