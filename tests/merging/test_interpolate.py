"""Interpolation at a task's end, and during it: algebra, order of callbacks, resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from regularized import Ends, adamw, assert_same, fit, seeded, weights
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, Interpolate, Replay, RWalk, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


class Unmerged(L.Callback):
    """The weights as training leaves each task, before any method changes them."""

    def __init__(self):
        self.ends = []

    def on_train_end(self, trainer, pl_module):
        self.ends.append(weights(pl_module))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_weights_between_the_start_and_the_end_of_a_task(tmp_path, share):
    ends = Ends()
    method = Interpolate(share)
    module = fit(tmp_path, [ends, method], tasks={"a": classification(1)})
    old, new = ends.starts[0], ends.weights[0]
    assert_same(weights(module), {n: old[n] + share * (new[n] - old[n]) for n in old})
    moved = sum((new[n] - old[n]).square().sum() for n in old) / sum(old[n].square().sum() for n in old)
    assert method.report()["moved"]["a"] == pytest.approx(float(moved.sqrt()), rel=1e-5)


def test_the_next_task_starts_from_the_interpolated_weights(tmp_path):
    ends = Ends()
    fit(tmp_path, [ends, Interpolate(0.5)])
    halfway = {n: torch.lerp(ends.starts[0][n], ends.weights[0][n], 0.5) for n in ends.starts[0]}
    assert_same(ends.starts[1], halfway)


def test_the_anchor_can_be_the_weights_before_the_first_task(tmp_path):
    ends = Ends()
    module = fit(tmp_path, [ends, Interpolate(0.25, anchor="start")])
    start, last = ends.starts[0], ends.weights[1]
    assert_same(weights(module), {n: torch.lerp(start[n], last[n], 0.25) for n in start})


def test_a_share_of_one_is_plain_training_and_of_zero_is_no_training_bit_for_bit(tmp_path):
    plain = fit(tmp_path / "plain", [])
    for during in (None, 0.25):
        one = fit(tmp_path / f"one-{during}", [Interpolate(1.0, during=during)])
        assert all(torch.equal(p, weights(plain)[n]) for n, p in weights(one).items())
    none = fit(tmp_path / "none", [Interpolate(0.0)])
    assert all(torch.equal(p, weights(seeded())[n]) for n, p in weights(none).items())


def test_during_a_task_it_follows_a_loop_by_hand(tmp_path):
    """Six steps a task, a period of a third: after steps 2, 4 and 6, and the optimizer's state is kept."""
    module = fit(tmp_path, [Interpolate(0.4, during=1 / 3)], module=seeded(optimizer=adamw), batch_size=16)
    hand = seeded(optimizer=adamw)
    tasks = TaskDataModule({"a": classification(1), "b": classification(2)}, batch_size=16, seed=0)
    tasks.setup()
    for task in tasks.tasks:
        optimizer, old, step = hand.configure_optimizers(), weights(hand), 0
        loader = tasks.train_loader(task)
        for epoch in range(2):
            loader.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(hand(x), y).backward()
                optimizer.step()
                step += 1
                if step % 2 == 0:
                    with torch.no_grad():
                        for name, p in hand.named_parameters():
                            p.copy_(old[name] + 0.4 * (p - old[name]))
        assert step == 6
    assert_same(weights(module), weights(hand), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", [lambda: EWC(1.0, samples=8), lambda: SI(1.0), lambda: RWalk(1.0)])
def test_the_order_of_the_callbacks_changes_no_bit_and_anchors_are_interpolated(tmp_path, penalty):
    found = []
    for name, order in (("before", 1), ("after", -1)):
        method = penalty()
        module = fit(tmp_path / name, [method, Interpolate(0.5)][::order])
        assert all(torch.equal(method.anchor[n], p) for n, p in weights(module).items())
        found.append((weights(module), method.importance))
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_the_path_of_si_ends_where_training_ended(tmp_path):
    """Ω = max(ω, 0) / (Δθ² + ξ) with Δθ of the unmerged path: the first task's importance is that without merging."""
    tasks = {"a": classification(1)}
    alone, merged = SI(0.0, damping=0.1, normalize=False), SI(0.0, damping=0.1, normalize=False)
    fit(tmp_path / "alone", [alone], tasks=tasks)
    fit(tmp_path / "merged", [Interpolate(0.3), merged], tasks=tasks)
    assert all(torch.equal(alone.importance[n], merged.importance[n]) for n in alone.importance)
    assert any(not torch.equal(alone.anchor[n], merged.anchor[n]) for n in alone.anchor)


def methods(during):
    saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
    return [EWC(1.0, samples=8), SI(0.5), Interpolate(0.5, during=during), Replay(20, 0.3), TaskMatrix(), saver]


@pytest.mark.parametrize("during", [None, 0.3])
def test_resumed_anywhere_equals_never_stopped(tmp_path, during):
    def run(root, ckpt_path=None):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        callbacks = methods(during)
        data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("ab")}, batch_size=8)
        fit_tasks(trainer(root, callbacks, max_epochs=1), module, data, ckpt_path)
        return weights(module), callbacks

    whole, callbacks = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 6
    for number, path in enumerate(checkpoints):
        again, others = run(tmp_path / f"again-{number}", path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert torch.equal(callbacks[4].matrix, others[4].matrix), path
        for one, other in zip(callbacks[:2], others[:2], strict=True):
            assert all(torch.equal(one.importance[n], other.importance[n]) for n in one.importance), path


class FailsAtItsEnd(Interpolate):
    """Breaks once at a task's end, when the weights have been changed already."""

    broken = False

    def on_task_end(self, trainer, pl_module):
        if not FailsAtItsEnd.broken and self.task.index == 1:
            FailsAtItsEnd.broken = True
            raise RuntimeError("the disk is full")


def test_an_end_that_fails_after_the_weights_changed_is_not_done_twice(tmp_path):
    def run(root, kind, ckpt_path=None):
        L.seed_everything(3, verbose=False)
        module = seeded(optimizer=adamw)
        saver = ModelCheckpoint(save_last=True, save_on_exception=True, every_n_epochs=1)
        callbacks = [SI(0.5), kind(0.5), saver]
        data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("ab")}, batch_size=8)
        fit_tasks(trainer(root, callbacks, max_epochs=1), module, data, ckpt_path)
        return weights(module), callbacks[0].importance

    class Plain(FailsAtItsEnd):
        def on_task_end(self, trainer, pl_module):
            pass

    Plain.__name__ = "FailsAtItsEnd"
    whole, importance = run(tmp_path / "whole", Plain)
    with pytest.raises(RuntimeError, match="disk"):
        run(tmp_path / "broken", FailsAtItsEnd)
    for path in sorted((tmp_path / "broken").rglob("*.ckpt")):
        again, measured = run(tmp_path / f"again-{path.stem}-{path.parent.name}", FailsAtItsEnd, path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert all(torch.equal(importance[n], measured[n]) for n in importance), path


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"share": 1.5}, "share=1.5"), ({"anchor": "base"}, "anchor='base'"), ({"during": 0.0}, "during=0.0")],
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Interpolate(**settings)
