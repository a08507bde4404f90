"""Merging and architecture on two processes: the ranks agree to the bit, and both are one process up to rounding."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch

SCRIPT = Path(__file__).parent / "run_third_family.py"


def run(out, ranks, kind):
    out.mkdir(parents=True, exist_ok=True)
    forked.run_ranks(ranks, SCRIPT, out, ranks, kind)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("kind", ["interpolate", "merge", "inputs", "adapters"])
def test_two_ranks_are_one_process(tmp_path, kind):
    (one,), (first, second) = run(tmp_path / "one", 1, kind), run(tmp_path / "two", 2, kind)
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
