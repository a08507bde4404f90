"""What any method can answer: shown with methods of a few lines that this library does not ship."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from toys import Classifier, classification, trainer

from lightning_cl import TaskDataModule, fit_tasks
from lightning_cl.callbacks import ContinualCallback


class DecayInTheLoss(ContinualCallback):
    """``0.05 ‖θ‖²`` as an extra loss."""

    def extra_loss(self, trainer, pl_module, batch):
        return 0.05 * sum(p.square().sum() for p in pl_module.parameters())


class DecayInTheGradient(ContinualCallback):
    """The same in closed form."""

    def edit_gradients(self, trainer, pl_module, optimizer, scale):
        for p in pl_module.parameters():
            p.grad.add_(p.detach(), alpha=0.1 * scale)


def weights_after(tmp_path, callbacks, **settings):
    L.seed_everything(0, verbose=False)
    module = Classifier()
    data = TaskDataModule({"a": classification(0, 48)}, batch_size=8)
    fit_tasks(trainer(tmp_path, callbacks, max_epochs=2, **settings), module, data)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def scaled():
    """The scaler's path on a CPU, in full precision."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulation", "clipping"],
)
def test_an_extra_loss_has_the_gradient_of_its_closed_form(tmp_path, settings):
    in_loss = weights_after(tmp_path, [DecayInTheLoss()], **settings)
    torch.testing.assert_close(in_loss, weights_after(tmp_path, [DecayInTheGradient()], **settings))
    assert not torch.allclose(in_loss, weights_after(tmp_path, [], **settings), atol=1e-4)


def test_an_extra_loss_carries_the_loss_scale(tmp_path):
    in_loss = weights_after(tmp_path, [DecayInTheLoss()], plugins=[scaled()])
    closed = weights_after(tmp_path, [DecayInTheGradient()], plugins=[scaled()])
    torch.testing.assert_close(in_loss, closed, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(in_loss, weights_after(tmp_path, [], plugins=[scaled()]), atol=5e-3)


class Diary(ContinualCallback):
    """Notes what it is asked."""

    def __init__(self, pages, name, edit_order=0):
        super().__init__()
        self.pages, self.name, self.edit_order = pages, name, edit_order

    def on_task_start(self, trainer, pl_module):
        self.pages.append((self.name, "start", self.task.index))

    def observe_gradients(self, trainer, pl_module, optimizer, scale):
        self.pages.append((self.name, "observe"))

    def edit_gradients(self, trainer, pl_module, optimizer, scale):
        self.pages.append((self.name, "edit"))

    def edit_weights(self, trainer, pl_module, optimizer):
        self.pages.append((self.name, "move"))

    def after_step(self, trainer, pl_module, optimizer):
        self.pages.append((self.name, "after"))

    def on_task_end(self, trainer, pl_module):
        self.pages.append((self.name, "end", self.task.index))


def test_questions_are_asked_in_phases_once_per_step_and_task(tmp_path):
    pages = []
    callbacks = [Diary(pages, "projects", edit_order=1), Diary(pages, "penalises")]
    data = TaskDataModule({"a": classification(0, 16), "b": classification(1, 16)}, batch_size=8)
    fit_tasks(trainer(tmp_path, callbacks, max_epochs=1, accumulate_grad_batches=2), Classifier(), data)
    step = [(name, phase) for phase in ("observe", "edit", "move", "after") for name in ("penalises", "projects")]
    expected = []
    for task in (0, 1):
        expected += [("projects", "start", task), ("penalises", "start", task)]
        expected += step
        expected += [("projects", "end", task), ("penalises", "end", task)]
    assert pages == expected
