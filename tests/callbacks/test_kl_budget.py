"""KLBudget: the divergence that a task reaches, against its budget; by hand, and after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from regularized import logits_of
from toys import Classifier, classification, trainer

from lightning_cl import EWC, L2SP, KLBudget, LwF, Task, TaskDataModule, fit_tasks
from lightning_cl.functional.kl_budget import controlled_strength

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {"a": classification(1, 64), "b": classification(2, 64)}


class Decaying(Classifier):
    """The learning rate of each task falls to a tenth, as in most runs."""

    def configure_optimizers(self):
        optimizer, steps = super().configure_optimizers(), self.trainer.max_epochs * 4
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(root, callbacks, ckpt_path=None, batch_size=16, **settings):
    torch.manual_seed(0)
    net = Decaying(lr=0.02, optimizer=torch.optim.Adam)
    run = trainer(root, callbacks, **{"max_epochs": 40} | settings)
    tasks = [Task("a", TASKS["a"], max_epochs=min(run.max_epochs, 6)), Task("b", TASKS["b"])]
    fit_tasks(run, net, TaskDataModule(tasks, batch_size=batch_size, seed=0), ckpt_path)
    return net


class Ends(Callback):
    def __init__(self):
        self.nets = []

    def on_train_end(self, trainer, pl_module):
        self.nets.append(copy.deepcopy(pl_module.net).eval())


def divergence(before, now, x):
    with torch.no_grad():
        p, q = (net(x).double().log_softmax(-1) for net in (before, now))
    return float((p.exp() * (p - q)).sum(-1).mean())


METHODS = {
    "EWC": lambda budget: EWC(strength=budget, estimator="exact", outputs=logits_of),
    "proximal EWC": lambda budget: EWC(strength=budget, estimator="exact", outputs=logits_of, apply="proximal"),
    "L2SP": lambda budget: L2SP(strength=budget),
    "LwF": lambda budget: LwF(strength=budget, outputs=logits_of),
}


@pytest.mark.parametrize(
    ("kind", "target"),
    [("EWC", 0.3), ("EWC", 0.05), ("proximal EWC", 0.1), ("L2SP", 0.1), ("LwF", 0.3), ("LwF", 0.05)],
)
def test_a_task_ends_within_15_percent_of_its_budget(tmp_path, kind, target):
    ends = Ends()
    method = METHODS[kind](KLBudget(target, samples=64, every=4, outputs=logits_of))
    fit(tmp_path, [method, ends])
    reached = divergence(*ends.nets, TASKS["b"].tensors[0])
    assert reached == pytest.approx(target, rel=0.15)
    report = method.report()
    assert report["reached"] == {"b": pytest.approx(reached, rel=1e-4)}
    assert report["strength"] == f"KLBudget({target:g})"
    assert {choice["task"] for choice in report["chosen"]} == {"b"}
    assert any(f"its budget is {target:g}" in words for words in report["sentences"])


@pytest.mark.parametrize("kind", ["EWC", "LwF"])
def test_resumed_inside_a_task_is_never_stopped(tmp_path, kind):
    def run(folder, ckpt_path=None):
        method = METHODS[kind](KLBudget(0.1, samples=20, outputs=logits_of))
        keeper = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=19, save_top_k=-1)
        settings = {"max_epochs": 6, "accumulate_grad_batches": 2}
        net = fit(tmp_path / folder, [method, keeper], ckpt_path, 8, **settings)
        return net.state_dict(), method.report()["chosen"], method.report()["reached"]

    whole = run("whole")
    assert len(whole[1]) > 5
    (path,) = (tmp_path / "whole").rglob("step=38.ckpt")
    again = run("again", path)
    assert all(torch.equal(again[0][name], value) for name, value in whole[0].items())
    assert again[1:] == whole[1:]


def test_measuring_alone_changes_nothing(tmp_path, monkeypatch):
    from lightning_cl.callbacks.regularization.kl_budget import KLStrength

    monkeypatch.setattr(KLStrength, "choose", lambda self, *args: None)
    method = L2SP(strength=KLBudget(0.1, every=1, outputs=logits_of))
    ours = fit(tmp_path / "a", [method], max_epochs=3).state_dict()
    theirs = fit(tmp_path / "b", [L2SP(strength=0)], max_epochs=3).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert method.report()["reached"]["b"] > 0


def test_the_base_is_the_reference_in_all_tasks(tmp_path):
    ends, start = Ends(), []

    class Begin(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(copy.deepcopy(pl_module.net).eval())

    method = L2SP(strength=KLBudget(0.1, of="base", samples=64, outputs=logits_of), anchor="start")
    fit(tmp_path, [method, Begin(), ends], max_epochs=4)
    expected = [divergence(start[0], net, TASKS[name].tensors[0]) for name, net in zip("ab", ends.nets, strict=True)]
    assert list(method.report()["reached"].values()) == pytest.approx(expected, rel=1e-4)
    assert method.state_bytes() == 2 * 4 * sum(p.numel() for p in ends.nets[0].parameters())


def test_the_controller_settles_on_a_plant_with_a_known_answer():
    # The divergence of a quadratic loss with gradient g and curvature h: (g / (h + strength))², reached with a lag.
    strength, kl, last = 1e-3, 1e-4, None
    for _ in range(120):
        kl += 0.3 * ((1 / (0.5 + strength)) ** 2 - kl)
        strength, last = controlled_strength(strength, kl, last, 0.04), kl
    assert kl == pytest.approx(0.04, rel=0.02)
    assert strength == pytest.approx(4.5, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kl": 0}, "kl=0"),
        ({"kl": float("inf")}, "kl=inf"),
        ({"kl": True}, "kl=True"),
        ({"kl": 0.1, "of": "me"}, "of='me'"),
        ({"kl": 0.1, "every": 0}, "every=0"),
        ({"kl": 0.1, "samples": 0}, "samples=0"),
    ],
)
def test_a_wrong_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        KLBudget(**arguments)


def test_a_strength_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="or a KLBudget"):
        EWC(strength="kl")
