"""The moving average of weights: a loop by hand, its no-op, what methods measure, resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from regularized import adamw, assert_same, fit, momentum, seeded, weights
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, Replay, TaskDataModule, TaskMatrix, WeightAverage, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


def test_two_tasks_follow_a_loop_by_hand(tmp_path):
    module = fit(tmp_path, [WeightAverage(0.7)], module=seeded(optimizer=momentum), batch_size=16)
    hand = seeded(optimizer=momentum)
    tasks = TaskDataModule({"a": classification(1), "b": classification(2)}, batch_size=16, seed=0)
    tasks.setup()
    for task in tasks.tasks:
        optimizer, average = hand.configure_optimizers(), weights(hand)
        loader = tasks.train_loader(task)
        for epoch in range(2):
            loader.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(hand(x), y).backward()
                optimizer.step()
                average = {n: 0.7 * average[n] + 0.3 * p.detach() for n, p in hand.named_parameters()}
        hand.load_state_dict(average)
    assert_same(weights(module), weights(hand), rtol=1e-4, atol=1e-6)


def test_accumulation_and_16_bits(tmp_path):
    """One update for each step and not for each batch; in bf16 small moves are not lost."""
    method = WeightAverage(0.9)
    fit(tmp_path, [method], accumulate_grad_batches=3, tasks={"a": classification(1)})
    assert method.report()["remains"]["a"] == pytest.approx(0.9**4)  # 6 batches an epoch, 2 epochs
    slow = WeightAverage(0.999)

    class Watch(L.Callback):
        kinds: set = set()  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            Watch.kinds |= {t.dtype for t in slow.average.values()}

    fit(tmp_path / "bf16", [slow, Watch()], module=seeded().bfloat16(), precision="bf16-true")
    assert Watch.kinds == {torch.float32}


def test_a_decay_of_zero_is_plain_training_bit_for_bit(tmp_path):
    plain = fit(tmp_path / "plain", [], module=seeded(optimizer=adamw))
    none = fit(tmp_path / "none", [WeightAverage(0.0)], module=seeded(optimizer=adamw))
    assert all(torch.equal(p, weights(none)[n]) for n, p in weights(plain).items())


def test_frozen_parameters_have_no_average_and_keep_every_bit(tmp_path):
    module = seeded()
    module.net[0].requires_grad_(False)
    before = weights(module)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert set(method.average) == {"net.4.weight", "net.4.bias"}

    method = WeightAverage(0.5)
    fit(tmp_path, [method, Watch()], module=module)
    assert all(torch.equal(weights(module)[n], before[n]) for n in ("net.0.weight", "net.0.bias"))


@pytest.mark.parametrize("order", [1, -1])
def test_importances_are_measured_where_the_task_ends(tmp_path, order):
    method = EWC(1.0, samples=8)
    module = fit(tmp_path, [method, WeightAverage(0.5)][::order])
    assert all(torch.equal(method.anchor[n], p) for n, p in weights(module).items())


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def run(root, ckpt_path=None):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        saver = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks = [SI(0.5), WeightAverage(0.6), Replay(20, 0.3), TaskMatrix(), saver]
        data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("ab")}, batch_size=8)
        fit_tasks(trainer(root, callbacks, max_epochs=1), module, data, ckpt_path)
        return weights(module), callbacks[3].matrix

    whole, matrix = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 5
    for number, path in enumerate(checkpoints):
        again, rows = run(tmp_path / f"again-{number}", path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert torch.equal(matrix, rows), path


def test_a_task_that_is_too_short_for_its_decay_is_said(tmp_path):
    method = WeightAverage(0.999)
    with pytest.warns(UserWarning, match=r"99% of its average are the weights it started with"):
        fit(tmp_path, [method], tasks={"a": classification(1)})
    assert "WeightAverage(decay=…), 0.999 now" in method.advice("learn")


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9"])
def test_arguments_out_of_their_range(decay):
    with pytest.raises(ValueError, match="decay="):
        WeightAverage(decay)
