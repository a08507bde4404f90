"""The guard against forgetting: what it measures, when it looks, each action, rollback and resume bit for bit."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import SI, ForgettingBudget, PackNet, Replay, Task, TaskDataModule, fit_tasks
from lightning_cl.callbacks.monitoring.guard_schedule import SHARE, Schedule
from lightning_cl.functional.guard import paired_rise

pytestmark = pytest.mark.filterwarnings("ignore")


class Scheduled(Classifier):
    """Dropout, AdamW and a schedule that falls to nothing: all that a way back must restore."""

    def __init__(self, **settings):
        super().__init__(**{"dropout": 0.1, "optimizer": torch.optim.AdamW, "lr": 0.05} | settings)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def task(name, seed, train=48):
    x, y = classification(seed, 96).tensors
    return Task(name, TensorDataset(x[:train], y[:train]), val=TensorDataset(x[48:], y[48:]))


class Trace(L.Callback):
    """Learning rate and losses of each step, and the number of batches that were really trained on."""

    def __init__(self, stop_at=None):
        self.lrs, self.steps, self.batches, self.stop_at = [], [], [], stop_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.steps.append(trainer.global_step)
        self.batches.append(batch[0].clone())
        if len(self.steps) == self.stop_at:
            raise RuntimeError("killed")


def run(root, guard=(), others=(), *, lr=0.05, names="ab", ckpt_path=None, **settings):
    """Tasks of six steps an epoch, three epochs."""
    torch.manual_seed(0)
    module = Scheduled(lr=lr)
    callbacks = [*([guard] if isinstance(guard, ForgettingBudget) else guard), *others]
    tasks = TaskDataModule([task(name, 1 + "abcd".index(name)) for name in names], batch_size=8, seed=0)
    fit_tasks(trainer(root, callbacks, **{"max_epochs": 3} | settings), module, tasks, ckpt_path)
    return module


def saver(every=5):
    return ModelCheckpoint(every_n_train_steps=every, save_top_k=-1, filename="{step}")


def budget(*action, **settings):
    defaults = {"unit": "nats", "every": 3, "samples": 48, "patience": 1, "confidence": 0.9}
    return ForgettingBudget(0.02, action=list(action), **defaults | settings)


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# ---------------------------------------------------------------------- what it measures


def test_losses_are_those_of_each_sample_and_training_does_not_notice(tmp_path):
    guard = ForgettingBudget(0.5, every=2, samples=48, action=[])
    guarded = run(tmp_path / "guard", guard)
    plain = run(tmp_path / "plain")
    assert same(guarded, plain)
    one = guard.sets.sets["a"]
    data = task("a", 1).val
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    guarded.eval()
    losses = torch.nn.functional.cross_entropy(guarded(data.tensors[0]), data.tensors[1], reduction="none")
    torch.testing.assert_close(one.now, losses[order].double(), rtol=1e-5, atol=1e-6)
    last = [entry for entry in guard.looks if entry["task"] == "a"][-1]
    assert (last["step"], last["training"]) == (36, "b")
    assert {entry["task"] for entry in guard.looks} == {"a"}
    gave = (one.before - one.reference).mean()
    assert last["allowed"] == pytest.approx(0.5 * float(gave))
    expected = paired_rise(one.now, one.reference, 0.5 * (one.before - one.reference), 0.05)
    assert (last["D"], last["SE"], last["n"]) == (expected.mean, expected.error, 48)


def test_watched_tasks_are_compared_with_the_time_before_the_first_task(tmp_path):
    guard = budget(every=9, tasks=["w"])
    torch.manual_seed(0)
    x, y = classification(5, 48).tensors
    tasks = [task("a", 1), Task("w", val=TensorDataset(x, y))]
    start = Scheduled()
    module = Scheduled()
    module.load_state_dict(start.state_dict())
    fit_tasks(trainer(tmp_path, [guard], max_epochs=3), module, TaskDataModule(tasks, batch_size=8, seed=0))
    start.eval()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(start(x), y, reduction="none")[order].double()
    torch.testing.assert_close(guard.sets.sets["w"].reference, losses, rtol=1e-5, atol=1e-6)
    assert [entry["step"] for entry in guard.looks] == [9, 18]
    assert list(guard.sets.sets) == ["w"]


def test_looks_come_at_optimizer_steps_and_not_at_batches(tmp_path):
    guard = budget("warn", every=2, grace_steps=3)
    run(tmp_path, guard, accumulate_grad_batches=2)
    assert [entry["step"] - 9 for entry in guard.looks] == [3, 5, 7, 9]


@pytest.mark.parametrize("steps", [None, 200, 1000])
def test_looks_by_themselves_take_two_percent_of_the_work(steps):
    loader = SimpleNamespace(batch_size=8, dataset=None)
    made = Schedule.of_task(
        SimpleNamespace(train_dataloader=loader, accumulate_grad_batches=2, world_size=1), steps, [1.0] * 3, 64, None, 0
    )
    looks, step = 0, 0
    for step in range(1, (steps or 5000) + 1):
        if step >= made.next:
            made.looked(step, made.samples * made.look_work)
            looks += 1
    assert made.spent <= SHARE * step * 16
    assert looks >= 3
    assert made.samples == {None: 64, 200: 16, 1000: 64}[steps]
    assert made.may_look_longer(1e9) == (steps is None)


# ---------------------------------------------------------------------- actions


def acted(guard):
    return [(entry["step"], entry["action"]) for entry in guard.looks if entry["action"]]


def test_the_learning_rate_is_halved_below_a_schedule(tmp_path):
    guard, trace = budget("warn", "lr"), Trace()
    run(tmp_path, guard, [trace])
    (_, first), *halvings = acted(guard)
    assert first == "warn"
    assert {action for _, action in halvings} == {"lr"}
    for step, lr in zip(trace.steps, trace.lrs, strict=True):
        halved = sum(at <= step for at, _ in halvings)
        assert lr == pytest.approx(0.05 * (1 - step % 18 / 100) * 0.5**halved)


def test_replay_takes_places_of_new_samples_and_the_steps_stay(tmp_path):
    guard, trace = budget("replay", replay_cap=0.9), Trace()
    run(tmp_path, guard, [Replay(40, 0.3), trace], lr=0.1)
    found = acted(guard)
    assert len(found) >= 2
    new = {tuple(row) for row in task("b", 2).train.tensors[0].tolist()}
    replayed = [sum(tuple(row) not in new for row in batch.tolist()) / len(batch) for batch in trace.batches]
    of_b = [(step, share) for step, share in zip(trace.steps, replayed, strict=True) if step >= 18]
    before = [share for step, share in of_b if step < found[0][0]]
    after = [share for step, share in of_b if step >= found[1][0]]
    assert sum(before) / len(before) == pytest.approx(0.3, abs=0.1)
    assert sum(after) / len(after) == pytest.approx(0.9, abs=0.12)
    epoch = math.ceil(48 / 0.7 / 8)
    assert len(trace.steps) == 18 + 3 * epoch


def test_interpolation_brings_the_guarded_loss_back(tmp_path):
    guard = budget("interpolate")
    before = {}

    class Spy(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            before["weights"] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if guard.looks and guard.looks[-1]["action"] and "end" not in before:
                before["safe"] = dict(guard._safe)
                before["end"] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
                before["excess"] = guard._excess(trainer, pl_module, ["a"])

    run(tmp_path, guard, [Spy()])
    assert acted(guard)
    end, safe = before["end"], before["safe"]
    assert all(torch.equal(end[n], safe[n]) for n in end) or before["excess"] <= 0


def test_a_stop_ends_this_task_and_not_the_next(tmp_path):
    guard, trace = budget("stop"), Trace()
    run(tmp_path, guard, [trace], names="abd")
    (step, _), *_ = acted(guard)
    assert 18 < step < 36
    assert max(trace.steps) >= step + 2  # the third task
    assert {entry["training"] for entry in guard.looks} == {"b", "d"}


def test_a_rollback_restores_everything_bit_for_bit(tmp_path):
    """What follows is trained again: the run ends as one that was only watched, and each look is seen once more."""

    def one(name, *action):
        guard, trace = budget(*action), Trace()
        si, replay = SI(1e-4), Replay(30, 0.1, fill="training")
        callbacks = [si, replay, trace, saver(100)]
        module = run(tmp_path / name, guard, callbacks, lr=0.2)
        return guard, trace, si, replay, module

    guard, trace, si, replay, module = one("back", "rollback", "warn")
    watching, plain, si_plain, replay_plain, expected = one("plain")
    number, first = next((i, entry) for i, entry in enumerate(guard.looks) if entry["action"])
    assert first["action"] == "rollback, warn"
    assert len(trace.steps) > len(plain.steps)
    numbers = [(entry["step"], entry["D"], entry["SE"]) for entry in guard.looks]
    expected_numbers = [(entry["step"], entry["D"], entry["SE"]) for entry in watching.looks]
    assert numbers[: number + 1] == expected_numbers[: number + 1]
    assert numbers[number + 1 :] == expected_numbers[len(expected_numbers) - len(numbers) + number + 1 :]
    assert same(module, expected)
    assert all(torch.equal(value, si_plain.importance[name]) for name, value in si.importance.items())
    mine, others = ([sample[0] for sample in one.buffer.items] for one in (replay, replay_plain))
    assert all(torch.equal(x, y) for x, y in zip(mine, others, strict=True))
    assert not (tmp_path / "back" / "guard").exists()


def test_after_a_rollback_remedies_stay_and_the_last_ends_the_task(tmp_path):
    guard, trace = budget("lr", "replay", "rollback"), Trace()
    run(tmp_path, guard, [Replay(40, 0.3), trace, saver(100)], lr=0.2)
    actions = [action for _, action in acted(guard) if action]
    assert actions[:3] == ["lr", "replay", "rollback, stop"]
    guard, trace = budget("lr", "rollback", "lr", "warn"), Trace()
    run(tmp_path / "again", guard, [trace, saver(100)], lr=0.2)
    actions = [action for _, action in acted(guard)]
    assert actions[:2] == ["lr", "rollback, lr"]
    back = next(i for i in range(1, len(trace.steps)) if trace.steps[i] <= trace.steps[i - 1] and i > 18)
    assert trace.lrs[back] == pytest.approx(0.2 * (1 - (trace.steps[back] - 18) / 100) * 0.25)


def test_a_run_that_is_killed_and_resumed_decides_and_ends_as_one_that_was_not(tmp_path):
    """Killed before the first action, and after the rollback before the next checkpoint."""

    def parts():
        return budget("lr", "replay", "rollback", "lr", "interpolate"), [Replay(40, 0.3, fill="training"), saver(2)]

    guard, others = parts()
    trace = Trace()
    expected = run(tmp_path / "whole", guard, [*others, trace], lr=0.1)
    assert [action for _, action in acted(guard)][:3] == ["lr", "replay", "rollback, lr"]
    back = next(i for i in range(1, len(trace.steps)) if trace.steps[i] <= trace.steps[i - 1])
    for stop_at in (21, back + 1):
        root = tmp_path / f"killed-{stop_at}"
        killed, callbacks = parts()
        with pytest.raises(RuntimeError, match="killed"):
            run(root, killed, [*callbacks, Trace(stop_at)], lr=0.1)
        resumed, callbacks = parts()
        module = run(root, resumed, callbacks, lr=0.1, ckpt_path="last")
        assert resumed.looks == guard.looks
        assert same(module, expected)


def test_no_false_alarm_on_the_old_tasks_own_data_and_a_planted_rise_within_two_looks():
    """A few runs of the benchmark, which has the figures of 200."""
    script = Path(__file__).parents[1] / "benchmarks" / "guard.py"
    spec = importlib.util.spec_from_file_location("guard_benchmark", script)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for seed in (1000, 1001):
        looks = benchmark.one_run(seed).looks
        assert not any(entry["action"] for entry in looks if entry["step"] <= benchmark.PLANTED)
        first = next(entry["step"] for entry in looks if entry["action"])
        assert first - benchmark.PLANTED <= 2 * benchmark.EVERY


# ---------------------------------------------------------------------- report and refusals


def test_report_and_losses_file(tmp_path):
    from lightning_cl import TaskMatrix

    guard = budget("warn")
    run(tmp_path, guard, [TaskMatrix()])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["guard"] == guard.looks
    assert "guard" not in report["methods"]["ForgettingBudget"]
    assert {"step", "training", "task", "D", "SE", "n", "allowed", "decision", "action"} == set(report["guard"][0])
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["trained"] == 2
    assert losses["tasks"]["a"]["now"] == guard.sets.sets["a"].now.tolist()
    assert losses["tasks"]["b"]["learnt"] == losses["tasks"]["b"]["now"]
    told = report["methods"]["ForgettingBudget"]["sentences"]
    assert told[0].startswith("ForgettingBudget, a: loss +")
    one = guard.sets.sets["a"]
    assert one.now.mean() > one.before.mean()
    assert told[0].endswith("all that its training gave is lost, and more")
    one.now = one.reference + 0.25 * (one.before - one.reference)
    assert guard.report()["sentences"][0].endswith("75% of what its training gave is kept")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 1.0}, "budget=1.0: expected a share"),
        ({"budget": -0.1, "unit": "nats"}, "expected nats, at least 0"),
        ({"unit": "percent"}, "unit='percent'"),
        ({"every": 0}, "every=0"),
        ({"samples": 4}, "samples=4"),
        ({"unit": "nats"}, "give budget, the rise"),
        ({"action": "warn"}, "expected a list of warn, replay"),
        ({"action": ["reboot"]}, "reboot"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"confidence": 0.05}, "confidence=0.05"),
        ({"tasks": "a"}, "tasks='a'"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match="(?s)" + words):
        ForgettingBudget(**arguments)


@pytest.mark.parametrize(
    ("guard", "others", "words"),
    [
        (budget("replay"), [], "no method that replays"),
        (budget("rollback"), [], "a rollback needs a checkpoint"),
        (budget(), [PackNet()], "with PackNet"),
        (budget(tasks=["z"]), [], "no task 'z'"),
    ],
)
def test_wrong_runs_are_refused_before_training(tmp_path, guard, others, words):
    trace = Trace()
    with pytest.raises((MisconfigurationException, ValueError), match=words):
        run(tmp_path, guard, [*others, trace])
    assert not trace.steps


def test_a_plain_fit_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="fit_tasks"):
        trainer(tmp_path, [budget()], max_epochs=1).fit(
            Classifier(), torch.utils.data.DataLoader(classification(1), batch_size=8)
        )


def test_a_task_that_is_too_short_for_a_look_is_named(tmp_path):
    with pytest.warns(UserWarning, match="it is not guarded"):
        run(tmp_path, ForgettingBudget(0.9), max_epochs=1)
