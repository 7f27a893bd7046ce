"""One function makes every seed of a run: no two streams meet."""

import ast

import pytest
from invariants.test_layers import TREES

from shared.seeds import seed_of


@pytest.mark.parametrize(
    ("stream", "seed"),
    [  # printf '0 labels 0' | sha256sum: its first 8 hex digits, halved
        ((0, "labels"), 0x9A032BC4 >> 1),
        ((7, "rollout", 12), 0x4001DF7B >> 1),
    ],
)
def test_a_seed_is_a_known_hash(stream, seed):
    assert seed_of(*stream) == seed


def test_no_two_streams_of_many_runs_meet():
    purposes = ("rollout", "filter", "batches")
    seeds = {seed_of(run, name, n) for run in range(40) for name in purposes for n in range(100)}
    assert len(seeds) >= 40 * 3 * 100 - 3  # 12,000 of 2**31: 0.03 expected to meet


def test_run_and_number_are_not_read_as_one():
    assert seed_of(1, "a", 11) != seed_of(1, "a 1", 1) != seed_of(11, "a", 1)


def test_no_module_calculates_a_seed_on_its_own():
    """Neither arithmetic on a seed nor a list of them: `seed * 1000 + epoch` meets other runs'."""
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp | ast.List) and path.name != "seeds.py":
                names = {ast.unparse(child) for child in ast.iter_child_nodes(node)}
                found += [f"{path.name}: {n}" for n in names if n.split(".")[-1] == "seed"]
    assert not found
