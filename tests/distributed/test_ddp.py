"""Two processes: they agree with each other, and with one process that sees the same batches."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch

SCRIPT = Path(__file__).parent / "run_ddp.py"


def run(out, ranks, kind="data sets", ckpt_path=None):
    out.mkdir(parents=True, exist_ok=True)
    forked.run_ranks(ranks, SCRIPT, out, ranks, kind, *([ckpt_path] if ckpt_path else []))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("ddp")
    return {"one": run(root / "one", 1), "two": run(root / "two", 2), "root": root}


@pytest.mark.parametrize("what", ["weights", "ewc", "si"])
def test_ranks_agree_bit_for_bit(results, what):
    first, second = results["two"]
    assert first[what].keys() == second[what].keys()
    assert all(torch.equal(first[what][name], second[what][name]) for name in first[what])


def test_ranks_hold_the_same_buffer_within_the_global_budget(results):
    first, second = results["two"]
    assert len(first["buffer"]) == 20
    assert torch.equal(first["buffer"], second["buffer"])
    assert torch.equal(first["buffer"], results["one"][0]["buffer"])


def test_two_ranks_together_see_the_batches_of_one_process(results):
    one = [sorted(batch.tolist()) for batch in results["one"][0]["seen"]]
    first, second = (rank["seen"] for rank in results["two"])
    together = [torch.cat(parts).tolist() for parts in zip(first, second, strict=True)]
    assert len(one) == len(together)
    for single, both in zip(one, together, strict=True):
        assert set(single) == set(both)
        assert len(both) <= 8


def test_the_fisher_is_that_of_one_process(tmp_path, results):
    """Each rank takes half of the samples; sums of squares are added, gradients are never averaged first.

    Compared after the first task with equal batches on both sides, so that the weights are equal too.
    """
    one = torch.load(results["root"] / "one" / "tasks" / "0-a.ckpt", weights_only=True)
    two = torch.load(results["root"] / "two" / "tasks" / "0-a.ckpt", weights_only=True)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    one_state, two_state = (checkpoint["lightning_cl"]["methods"]["EWC"]["state"] for checkpoint in (one, two))
    for name, value in one_state["importance"].items():
        torch.testing.assert_close(two_state["importance"][name], value, rtol=1e-4, atol=1e-6)
    one_state, two_state = (checkpoint["lightning_cl"]["methods"]["SI"]["state"] for checkpoint in (one, two))
    for name, value in one_state["importance"].items():
        torch.testing.assert_close(two_state["importance"][name], value, rtol=1e-3, atol=1e-5)


def test_costs_count_the_samples_of_all_ranks(results):
    one = torch.load(results["root"] / "one" / "tasks" / "2-c.ckpt", weights_only=True)["lightning_cl"]["costs"]
    two = torch.load(results["root"] / "two" / "tasks" / "2-c.ckpt", weights_only=True)["lightning_cl"]["costs"]
    assert [cost["new_samples"] for cost in one] == [80, 80, 80]
    # The last batch of an epoch may be odd: then one rank repeats a sample.
    assert all(80 <= cost["new_samples"] <= 96 for cost in two)


@pytest.mark.parametrize("kind", ["dropout", "loaders"])
def test_resume_on_two_ranks_equals_never_stopped(tmp_path, kind):
    whole = run(tmp_path / "whole", 2, kind)
    checkpoint = sorted((tmp_path / "whole" / "checkpoints" / "1-b").glob("*.ckpt"))[1]
    resumed = run(tmp_path / "resumed", 2, kind, checkpoint)
    for one, other in zip(whole, resumed, strict=True):
        for what in ("weights", "ewc", "si"):
            assert all(torch.equal(one[what][name], other[what][name]) for name in one[what])
        assert torch.equal(one["buffer"], other["buffer"])
        assert torch.equal(one["matrix"], other["matrix"])


def test_sharded_parameters_give_what_whole_ones_give_and_resume(tmp_path):
    """FSDP2: importance, anchor and path integral live on the shards; a checkpoint holds the whole tensors."""
    whole, sharded = run(tmp_path / "whole", 2, "whole"), run(tmp_path / "sharded", 2, "sharded")
    checkpoint = sorted((tmp_path / "sharded" / "checkpoints" / "1-b").glob("*.ckpt"))[0]
    resumed = run(tmp_path / "resumed", 2, "sharded", checkpoint)
    for what in ("weights", "si"):
        for name, value in whole[0][what].items():
            torch.testing.assert_close(sharded[0][what][name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(resumed[0][what][name], sharded[0][what][name])
    assert any(value.count_nonzero() for value in whole[0]["si"].values())


def test_penalties_and_teachers_on_two_ranks_are_those_of_one_process(tmp_path):
    """Samples are shared, also where there are fewer than ranks; sums are the same, and so is what they lead to."""
    (one,), (first, second) = run(tmp_path / "one", 1, "penalties"), run(tmp_path / "two", 2, "penalties")
    assert one["factors"]
    for what, values in one.items():
        assert values.keys() == first[what].keys() == second[what].keys()
        for name, value in values.items():
            assert torch.equal(first[what][name], second[what][name]), (what, name)
            torch.testing.assert_close(
                first[what][name], value, rtol=2e-2, atol=1e-3, msg=lambda m, w=what: f"{w}: {m}"
            )
