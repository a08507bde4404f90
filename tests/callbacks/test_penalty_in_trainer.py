"""The quadratic penalty inside the Trainer: when it acts, how often, on what, and where training then ends."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, TaskDataModule, fit_tasks


def snapshot(module):
    return {n: (p.detach().clone(), p.grad.clone()) for n, p in module.named_parameters()}


class Before(L.Callback):
    """Weights and gradients of each optimizer step, before any method has touched them."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(snapshot(pl_module))


class Watched(Classifier):
    """Keeps what the optimizer is about to use, and what it made of it. Its hooks run after those of callbacks."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.steps, self.ends = [], []

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(snapshot(self))

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.ends.append({n: p.detach().clone() for n, p in self.named_parameters()})


class Overflowing(Watched):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


def watched(kind=Watched, **settings):
    torch.manual_seed(0)
    return kind(**settings)


def primed(module, strength, **settings):
    """An EWC that has an importance and an anchor away from the weights already, as after an earlier task."""
    ewc = EWC(strength=strength, estimator="empirical", samples=1, **settings)
    generator = torch.Generator().manual_seed(7)
    for name, p in module.named_parameters():
        ewc.importance[name] = 2 * torch.rand(p.shape, generator=generator)
        ewc.anchor[name] = p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
    ewc.importance["net.0.bias"][:4] = 0.0
    return ewc


def keep(ewc):
    return {n: (ewc.importance[n].clone(), ewc.anchor[n].clone()) for n in ewc.importance}


def fit(root, module, callbacks, batch_size=8, seed=1, **settings):
    run = trainer(root, callbacks, **{"max_epochs": 1} | settings)
    run.fit(module, DataLoader(classification(seed), batch_size=batch_size))
    return module


def assert_weights(left, right, rtol, atol):
    left, right = left.state_dict(), right.state_dict()
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def scaled(scale=1024.0):
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def assert_added(before, after, quadratic, strength, scale=1.0):
    for old, new in zip(before, after, strict=True):
        for name, (importance, anchor) in quadratic.items():
            theta, gradient = old[name]
            expected = gradient + scale * strength * importance * (theta - anchor)
            torch.testing.assert_close(new[name][1], expected, rtol=1e-5, atol=1e-6 * scale)


# ---------------------------------------------------------------------- gradient mode


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4)])
def test_the_penalty_is_added_once_per_optimizer_step(tmp_path, batch_size, accumulate):
    module, before = watched(), Before()
    ewc = primed(module, strength=0.7)
    quadratic = keep(ewc)
    fit(tmp_path, module, [before, ewc], batch_size, accumulate_grad_batches=accumulate)
    assert len(before.steps) == len(module.steps) == 6
    assert_added(before.steps, module.steps, quadratic, strength=0.7)


def test_an_incomplete_window_gets_the_whole_penalty(tmp_path):
    # Six batches in windows of four: the second window has two, and its loss is still divided by four.
    module, before = watched(), Before()
    ewc = primed(module, strength=0.7)
    quadratic = keep(ewc)
    fit(tmp_path, module, [before, ewc], 8, accumulate_grad_batches=4)
    assert len(module.steps) == 2
    assert_added(before.steps, module.steps, quadratic, strength=0.7)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_accumulated_batches_are_one_batch(tmp_path, apply):
    ends = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        module = watched()
        ewc = primed(module, strength=2.0, apply=apply)
        ends.append(fit(tmp_path, module, [ewc], batch_size, accumulate_grad_batches=accumulate))
    assert_weights(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_clipping_sees_the_penalised_gradient(tmp_path):
    # With a huge penalty every SGD step has the length lr · clip; a penalty added after clipping would be far longer.
    module = watched(lr=0.01)
    fit(tmp_path, module, [primed(module, strength=1e3)], gradient_clip_val=0.1)
    for start, end in zip(module.steps, module.ends, strict=True):
        length = sum((end[n] - start[n][0]).square().sum() for n in end) ** 0.5
        assert length.item() == pytest.approx(0.01 * 0.1, rel=1e-3)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_two_strengths_add_up(tmp_path, apply):
    module = watched()
    twice = [primed(module, strength=strength, apply=apply) for strength in (0.5, 2.0)]
    twice = fit(tmp_path, module, twice)
    module = watched()
    once = fit(tmp_path, module, [primed(module, strength=2.5, apply=apply)])
    assert_weights(twice, once, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- proximal mode


def test_proximal_leaves_gradients_alone_and_shrinks_the_way_to_the_anchor(tmp_path):
    module, before = watched(lr=0.05), Before()
    ewc = primed(module, strength=30.0, apply="proximal")
    quadratic = keep(ewc)
    fit(tmp_path, module, [before, ewc])
    assert len(module.steps) == 6
    for old, new, end in zip(before.steps, module.steps, module.ends, strict=True):
        for name, (importance, anchor) in quadratic.items():
            theta, gradient = old[name]
            assert torch.equal(new[name][1], gradient)
            stepped = theta - 0.05 * gradient
            expected = anchor + (stepped - anchor) / (1 + 0.05 * 30.0 * importance)
            torch.testing.assert_close(end[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [1e12, 1e300])
def test_proximal_with_a_huge_strength_pins_and_stays_finite(tmp_path, strength):
    module = watched()
    free = module.net[0].bias.detach()[:4].clone()
    ewc = primed(module, strength=strength, apply="proximal")
    quadratic = keep(ewc)
    fit(tmp_path, module, [ewc])
    for name, p in module.named_parameters():
        importance, anchor = quadratic[name]
        assert p.isfinite().all()
        torch.testing.assert_close(p.detach()[importance > 0], anchor[importance > 0], rtol=0, atol=1e-6)
    assert not torch.equal(module.net[0].bias.detach()[:4], free)  # without importance it learns freely


def test_proximal_follows_the_learning_rate_of_each_group(tmp_path):
    class TwoRates(Watched):
        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters(), "lr": 0.1}, {"params": self.net[4].parameters()}]
            return torch.optim.SGD(groups, lr=0.02)

    module = watched(TwoRates)
    ewc = primed(module, strength=30.0, apply="proximal")
    quadratic = keep(ewc)
    fit(tmp_path, module, [ewc])
    (importance, anchor), (start, gradient) = quadratic["net.0.weight"], module.steps[0]["net.0.weight"]
    expected = anchor + (start - 0.1 * gradient - anchor) / (1 + 0.1 * 30.0 * importance)
    torch.testing.assert_close(module.ends[0]["net.0.weight"], expected, rtol=1e-5, atol=1e-6)
    (importance, anchor), (start, gradient) = quadratic["net.4.weight"], module.steps[0]["net.4.weight"]
    expected = anchor + (start - 0.02 * gradient - anchor) / (1 + 0.02 * 30.0 * importance)
    torch.testing.assert_close(module.ends[0]["net.4.weight"], expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- precision


def fused_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def plain_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr)


@pytest.mark.parametrize(("optimizer", "scale"), [(torch.optim.SGD, 1.0), (plain_adamw, 1.0), (fused_adamw, 1024.0)])
def test_the_penalty_carries_the_scale_that_the_gradients_carry(tmp_path, optimizer, scale):
    # A fused optimizer unscales by itself, so gradients are still scaled when the penalty is added.
    module, before = watched(optimizer=optimizer, lr=0.01), Before()
    ewc = primed(module, strength=0.7)
    quadratic = keep(ewc)
    fit(tmp_path, module, [before, ewc], plugins=[scaled()])
    assert len(module.steps) == 6
    assert_added(before.steps, module.steps, quadratic, strength=0.7, scale=scale)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, fused_adamw])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_ends_where_fp32_ends(tmp_path, precision, optimizer, apply):
    ends = []
    for settings in ({}, {"plugins": [scaled()]} if precision == "16-mixed" else {"precision": precision}):
        module = watched(optimizer=optimizer, lr=0.02)
        ends.append(fit(tmp_path, module, [primed(module, strength=2.0, apply=apply)], **settings))
    tolerance = 2e-3 if precision == "16-mixed" else 1e-2
    assert_weights(ends[1], ends[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", [plain_adamw, fused_adamw])
def test_an_overflow_step_moves_nothing(tmp_path, optimizer, apply):
    module = watched(Overflowing, optimizer=optimizer, lr=0.01)
    plugin = scaled()
    fit(tmp_path, module, [primed(module, strength=5.0, apply=apply)], plugins=[plugin])
    assert plugin.scaler.get_scale() == 512.0
    moved = [
        any((end[n] != start[n][0]).any() for n in end) for start, end in zip(module.steps, module.ends, strict=True)
    ]
    assert moved == [True, True, False, True, True, True]


# ---------------------------------------------------------------------- several methods, checkpoints


def test_two_ewcs_keep_separate_state_in_a_safe_checkpoint(tmp_path):
    torch.manual_seed(0)
    raw, normal = EWC(strength=0.1, estimator="empirical", normalize=False), EWC(strength=0.2, estimator="empirical")
    run = trainer(tmp_path, [raw, normal, SI()], max_epochs=1, enable_checkpointing=True)
    fit_tasks(run, Classifier(), TaskDataModule({"a": classification(1), "b": classification(2)}, batch_size=8))
    run.save_checkpoint(tmp_path / "own.ckpt")
    for path in (tmp_path / "own.ckpt", *tmp_path.rglob("tasks/1-b.ckpt")):
        methods = torch.load(path, weights_only=True)["lightning_cl"]["methods"]
        assert set(methods) == {"EWC", "EWC-2", "SI"}
        for name, ewc in (("EWC", raw), ("EWC-2", normal)):
            stored = methods[name]["state"]
            assert stored["importance"].keys() == ewc.importance.keys()
            assert all(torch.equal(stored["importance"][n], ewc.importance[n]) for n in ewc.importance)
            assert all(torch.equal(stored["anchor"][n], ewc.anchor[n]) for n in ewc.anchor)
    assert len(list(tmp_path.rglob("tasks/1-b.ckpt"))) == 1
    assert not torch.equal(raw.importance["net.4.bias"], normal.importance["net.4.bias"])


# ---------------------------------------------------------------------- the optimum of two tasks


class LinearGaussian(L.LightningModule):
    """``y = x·θ + noise`` of variance one; the loss is the mean negative log likelihood up to a constant."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return 0.5 * (y - x @ self.theta).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def linear_gaussian(optimum, scales):
    """Axis-parallel inputs with residuals ±1 at the optimum: curvature and empirical Fisher are both scales²/4."""
    x = torch.diag(scales).repeat(2, 1)
    residual = torch.cat([torch.ones(4), -torch.ones(4)])
    return TensorDataset(x, x @ optimum + residual)


@pytest.mark.parametrize("mode", ["online", "separate"])
@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_quadratic_tasks_end_at_the_joint_optimum(tmp_path, apply, mode):
    # With λ = 1 and the true Fisher, the Laplace approximation of a Gaussian is exact: (A+B+C)⁻¹ (Aa+Bb+Cc).
    generator = torch.Generator().manual_seed(1)
    optima = [torch.randn(4, generator=generator) for _ in range(2)]
    scales = [1.5 + torch.rand(4, generator=generator) for _ in range(2)]
    tasks = {f"t{i}": linear_gaussian(o, s) for i, (o, s) in enumerate(zip(optima, scales, strict=True))}
    ewc = EWC(strength=1.0, estimator="empirical", normalize=False, apply=apply, mode=mode)
    module = LinearGaussian()
    fit_tasks(trainer(tmp_path, [ewc], max_epochs=120), module, TaskDataModule(tasks, batch_size=8))
    curvatures = [s.square() / 4 for s in scales]
    joint = sum(c * o for c, o in zip(curvatures, optima, strict=True)) / sum(curvatures)
    torch.testing.assert_close(module.theta.detach(), joint, rtol=0, atol=1e-4)
    assert (module.theta.detach() - optima[1]).abs().max() > 0.1  # not where plain training ends
