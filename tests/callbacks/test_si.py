"""SI against a plain loop in lockstep, and against the trajectory that a spy sees in the Trainer."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, TaskDataModule, fit_tasks


class Trajectory(L.Callback):
    """Sees, from outside, the loss's gradient and the way of the weights of every optimizer step."""

    def __init__(self, si=None):
        self.si, self.tasks, self.omegas, self.ends, self.batches = si, [], [], [], []

    def on_train_start(self, trainer, pl_module):
        self.path = {n: torch.zeros_like(p) for n, p in pl_module.named_parameters()}
        self.gradients = {n: torch.zeros_like(p) for n, p in pl_module.named_parameters()}
        self.before = copy.deepcopy(dict(pl_module.named_parameters()))
        self.batches.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches[-1].append(batch)

    def on_after_backward(self, trainer, pl_module):
        # Gradients as backward left them, accumulated so far; no callback edits them before the step.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        self.gradients = {n: p.grad / scale for n, p in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, p in pl_module.named_parameters():
            step = p - self.before[name]
            self.before[name] = p.clone()
            self.path[name] -= torch.where(step == 0, 0.0, self.gradients[name] * step)

    def on_train_end(self, trainer, pl_module):
        self.tasks.append(self.path)
        self.ends.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        if self.si is not None:
            self.omegas.append({n: o.clone() for n, o in self.si.omega.items()})


def seeded(**settings):
    torch.manual_seed(0)
    return Classifier(**settings)


TASKS = {"a": classification(1), "b": classification(2)}


def fit(root, callbacks, module=None, tasks=TASKS, batch_size=8, max_epochs=2, **settings):
    module = module if module is not None else seeded()
    run = trainer(root, callbacks, max_epochs=max_epochs, **settings)
    fit_tasks(run, module, TaskDataModule(tasks, batch_size=batch_size, seed=0))
    return module


def assert_same(actual, expected, rtol, atol):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr / 5, weight_decay=0.1)


def lockstep(module, batches_of_tasks, strength, damping):
    """SI from the paper's equations: a plain loop that knows nothing of Lightning or of the library."""
    theta = dict(module.named_parameters())
    importance = {n: torch.zeros_like(p) for n, p in theta.items()}
    omegas, anchor = [], {}
    for batches in batches_of_tasks:
        start = {n: p.detach().clone() for n, p in theta.items()}
        omega = {n: torch.zeros_like(p) for n, p in theta.items()}
        optimizer = module.make_optimizer(theta.values(), lr=module.lr)
        for x, y in batches:
            loss = F.cross_entropy(module(x), y)
            gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
            before = {n: p.detach().clone() for n, p in theta.items()}
            for n, p in theta.items():
                pull = strength * importance[n] * (p.detach() - anchor[n]) if anchor else 0.0
                p.grad = gradients[n] + pull
            optimizer.step()
            for n, p in theta.items():
                omega[n] -= gradients[n] * (p.detach() - before[n])
        anchor = {n: p.detach().clone() for n, p in theta.items()}
        xi = damping
        if damping == "auto":
            xi = torch.cat([((anchor[n] - start[n]) ** 2).flatten() for n in theta]).mean()
        for n in theta:
            importance[n] += omega[n].clamp(min=0) / ((anchor[n] - start[n]) ** 2 + xi)
        omegas.append(omega)
    return omegas, importance, anchor


@pytest.mark.parametrize(
    ("optimizer", "damping", "strength"), [(momentum, 0.01, 2.0), (adamw, 0.01, 2.0), (adamw, "auto", 0.02)]
)
def test_lockstep_with_a_plain_loop_over_two_tasks(tmp_path, optimizer, damping, strength):
    si = SI(strength, damping, normalize=False)
    spy = Trajectory(si)
    module = fit(tmp_path, [si, spy], seeded(optimizer=optimizer))
    reference = seeded(optimizer=optimizer)
    omegas, importance, anchor = lockstep(reference, spy.batches, strength, damping)
    for actual, expected in zip(spy.omegas, omegas, strict=True):
        assert_same(actual, expected, rtol=1e-3, atol=1e-6)
    assert_same(si.importance, importance, rtol=1e-3, atol=1e-5)
    assert_same(si.anchor, anchor, rtol=1e-4, atol=1e-6)
    assert_same(module.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-6)


def test_weights_that_went_uphill_have_no_importance(tmp_path):
    class Uphill(Classifier):
        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters(), "maximize": True}, {"params": self.net[4].parameters()}]
            return torch.optim.SGD(groups, lr=0.05)

    torch.manual_seed(0)
    si, module = SI(), Uphill()
    spy = Trajectory(si)
    fit(tmp_path, [si, spy], module, {"a": TASKS["a"]})
    assert (spy.omegas[0]["net.0.weight"] < 0).all()
    assert not si.importance["net.0.weight"].any()
    assert (si.importance["net.4.weight"] > 0).all()


def test_normalized_shares_have_mean_one_per_task(tmp_path):
    si = SI(normalize=True)
    fit(tmp_path, [si])
    values = torch.cat([f.flatten() for f in si.importance.values()])
    assert values.mean().item() == pytest.approx(2.0, rel=1e-4)  # two tasks, each with mean one


@pytest.mark.parametrize("ewc_first", [True, False])
def test_omega_is_of_the_gradient_without_penalties(tmp_path, ewc_first):
    # A penalty that is strong beside the task's gradient: a polluted omega would be far off.
    si, ewc = SI(strength=1.0), EWC(strength=1.0, estimator="empirical")
    spy = Trajectory(si)
    fit(tmp_path, [ewc, si, spy] if ewc_first else [si, ewc, spy])
    assert_same(spy.omegas[1], spy.tasks[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_the_order_of_callbacks_changes_nothing(tmp_path, apply):
    # Bit for bit, with different anchors: sums round by their order, and proximal moves do not commute.
    tasks, results = TASKS | {"c": classification(3)}, []
    for reverse in (False, True):
        ewc = EWC(strength=0.5, estimator="empirical", mode="separate", apply=apply)
        si = SI(strength=0.5, apply=apply)
        module = fit(tmp_path, [si, ewc] if reverse else [ewc, si], tasks=tasks)
        results.append((module.state_dict(), si.importance))
    for left, right in zip(*results, strict=True):
        assert_same(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_the_step_is_the_one_really_taken(tmp_path, apply):
    # Decoupled weight decay and the proximal move change weights without a gradient; they belong to the step.
    si = SI(strength=20.0, normalize=True, apply=apply)
    spy = Trajectory(si)
    fit(tmp_path, [si, spy], seeded(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, weight_decay=1.0)))
    for omega, path in zip(spy.omegas, spy.tasks, strict=True):
        assert_same(omega, path, rtol=1e-3, atol=1e-6)


def test_small_full_batch_steps_add_up_to_the_drop_of_the_loss(tmp_path):
    data = classification(1)
    module, si = seeded(lr=0.01), SI()
    start = F.cross_entropy(module(data.tensors[0]), data.tensors[1]).item()
    spy = Trajectory(si)
    fit(tmp_path, [si, spy], module, {"a": data}, batch_size=48, max_epochs=150)
    drop = start - F.cross_entropy(module(data.tensors[0]), data.tensors[1]).item()
    assert drop > 0.1
    assert sum(o.sum().item() for o in spy.omegas[0].values()) == pytest.approx(drop, rel=0.01)


def test_accumulated_batches_are_one_batch(tmp_path):
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        si, module = SI(strength=1.0), seeded(optimizer=momentum)
        spy = Trajectory(si)
        for data in TASKS.values():
            run = trainer(tmp_path, [si, spy], max_epochs=2, accumulate_grad_batches=accumulate)
            run.fit(module, DataLoader(data, batch_size=size))
        results.append((spy.omegas, si.importance, module.state_dict()))
    (omegas, importance, weights), (omegas_4, importance_4, weights_4) = results
    for one, four in zip(omegas, omegas_4, strict=True):
        assert_same(four, one, rtol=1e-3, atol=1e-6)
    assert_same(importance_4, importance, rtol=1e-3, atol=1e-4)
    assert_same(weights_4, weights, rtol=1e-4, atol=1e-5)


def test_strength_zero_is_plain_training_bit_for_bit(tmp_path):
    settings = {"dropout": 0.3, "batch_norm": True}
    si = SI(strength=0.0)
    with_si = fit(tmp_path / "a", [si], seeded(**settings)).state_dict()
    plain = fit(tmp_path / "b", [], seeded(**settings)).state_dict()
    assert all(torch.equal(with_si[name], plain[name]) for name in plain)
    assert sum(f.sum() for f in si.importance.values()) > 0  # and yet it was measured


class Overflowing(Classifier):
    """The third step of a task overflows, as fp16 training does now and then."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_does_not_poison_omega(tmp_path, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(0)
    module = Overflowing(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, weight_decay=0.1, fused=fused))
    si = SI(strength=0.5)
    spy = Trajectory(si)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(tmp_path, [si, spy], module, max_epochs=1, plugins=[precision])
    assert scaler.get_scale() < 1024.0  # there was an overflow, and the scaler noticed
    for omega, path in zip(spy.omegas, spy.tasks, strict=True):
        assert_same(omega, path, rtol=1e-3, atol=1e-6)
    assert all(f.isfinite().all() for f in si.importance.values())


def test_frozen_parameters_cost_nothing(tmp_path):
    module, si = seeded(), SI()
    module.net[0].requires_grad_(False)
    fit(tmp_path, [si], module)
    assert set(si.importance) == set(si.anchor) == {"net.4.weight", "net.4.bias"}


def test_a_grown_head_keeps_its_rows_and_new_rows_have_no_importance(tmp_path):
    module, si = seeded(), SI(strength=1.0)
    trainer(tmp_path, [si], max_epochs=1).fit(module, DataLoader(TASKS["a"], batch_size=8))
    before, old = si.importance["net.4.weight"].clone(), module.net[4]
    module.net[4] = nn.Linear(16, 5)
    with torch.no_grad():
        module.net[4].weight[:3], module.net[4].bias[:3] = old.weight, old.bias
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((si.importance["net.4.weight"].clone(), si.penalty(pl_module)))

    trainer(tmp_path, [si, Look()], max_epochs=1).fit(module, DataLoader(TASKS["b"], batch_size=8))
    head, penalty = seen[0]
    torch.testing.assert_close(head[:3], before, rtol=0, atol=0)
    assert head.shape == (5, 16)
    assert not head[3:].any()
    assert penalty == 0.0
    assert si.importance["net.4.weight"][3:].any()  # measured from then on


def test_a_task_that_trains_nothing_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"(?s)SI.*importance.*zero.*can do nothing.*trained"):
        fit(tmp_path, [SI()], seeded(lr=0.0), {"a": TASKS["a"]}, max_epochs=1)
