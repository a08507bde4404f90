"""Merging and architecture on two processes: the ranks agree to the bit, and both are one process up to rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import run_third_family
from run_third_family import SHARDED, STACKS


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All stacks, one after the other in one start of two processes."""
    out = tmp_path_factory.mktemp("two")
    forked.run_ranks(2, run_third_family.__file__, out, 2)
    return out


@pytest.mark.parametrize("kind", STACKS)
def test_two_ranks_are_one_process(two_ranks, tmp_path, kind):
    run_third_family.main(tmp_path, 1, kind)
    one = torch.load(tmp_path / f"rank0-{kind}.pt", weights_only=True)
    first, second = (torch.load(two_ranks / f"rank{rank}-{kind}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == first.keys() == second.keys()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind in SHARDED else {"rtol": 1e-3, "atol": 1e-4}
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
