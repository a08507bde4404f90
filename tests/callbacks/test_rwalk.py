"""RWalk against the paper's equations: on the way that a spy sees, and in a plain loop in lockstep."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from regularized import TASKS, Steps, adamw, assert_each, assert_same, fit, momentum, plain_fit, seeded, weights
from torch.nn import functional as F
from toys import Classifier

from lightning_cl import EWC, RWalk


class Way(Steps):
    """The whole way of the weights through each task, and what the method holds after each."""

    def __init__(self, method):
        super().__init__()
        self.method, self.after, self.kept = method, [], []

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.after.append([])
        if len(self.batches) > 1:
            self.keep()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[-1].append(weights(pl_module))

    def keep(self):
        names = ("fisher", "score", "importance", "anchor")
        self.kept.append({kind: {n: v.clone() for n, v in getattr(self.method, kind).items()} for kind in names})

    def ways(self):
        """For each task its steps: name to (weights before, gradient, weights after), in float64."""
        for before, after in zip(self.before, self.after, strict=True):
            yield [
                {n: (v.double(), gradient.double(), end[n].double()) for n, (v, gradient) in start.items()}
                for start, end in zip(before, after, strict=True)
            ]


def unit_range(values):
    """All values of all tensors between their common smallest and largest."""
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
    return {n: (v - low) / (high - low) for n, v in values.items()}


class Equations:
    """Equations 6 to 8: state over the tasks, fed with steps. The first average of squares is taken whole."""

    def __init__(self, names, rate=0.9, every=3, damping=1e-3):
        self.names, self.rate, self.every, self.damping = list(names), rate, every, damping
        self.fisher, self.score, self.importance = {}, {}, {}

    def task(self, steps):
        self.new, interval = dict.fromkeys(self.names, 0.0), []
        for number, step in enumerate(steps, 1):
            interval.append(step)
            if number % self.every == 0 or number == len(steps):  # a task's last interval may be shorter
                terms = {n: self.terms(n, [one[n] for one in interval]) for n in self.names}
                damping = self.damping
                if damping == "auto":
                    damping = torch.cat([distance.flatten() for _, distance in terms.values()]).double().mean()
                for n, (drop, distance) in terms.items():
                    self.new[n] = self.new[n] + drop.clamp(min=0) / (distance + damping)
                interval = []
        self.score = {n: (self.score[n] + new) / 2 if self.score else new for n, new in self.new.items()}
        fisher, score = unit_range(self.fisher), unit_range(self.score)
        self.importance = {n: fisher[n] + score[n] for n in self.names}
        return self

    def terms(self, n, interval):
        square = sum(gradient**2 for _, gradient, _ in interval) / len(interval)
        drop = sum(-gradient * (after - before) for before, gradient, after in interval)
        self.fisher[n] = self.rate * square + (1 - self.rate) * self.fisher[n] if n in self.fisher else square
        return drop, 0.5 * self.fisher[n] * (interval[-1][2] - interval[0][0]) ** 2


def rwalk(**settings):
    return RWalk(**{"normalize": False, "every": 3} | settings)


def assert_equations(way, error=1e-4, **settings):
    """What the method holds after each task follows from the way that the weights went."""
    way.keep()
    equations = Equations(way.after[0][0], **settings)
    assert len(way.kept) == len(way.after)
    for kept, steps in zip(way.kept, way.ways(), strict=True):
        equations.task(steps)
        for kind in ("fisher", "score", "importance"):
            assert_each(kept[kind], getattr(equations, kind), error)
        assert_same(kept["anchor"], {n: after.float() for n, (_, _, after) in steps[-1].items()}, 0, 0)
    return equations


# ---------------------------------------------------------------------- the equations


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, adamw])
@pytest.mark.parametrize(
    "settings",
    [
        {"every": 3, "rate": 0.9, "damping": 1e-6},  # so small that the distance decides the score
        {"every": 1, "rate": 0.9, "damping": 1e-6},
        {"every": 4, "rate": 0.3, "damping": 1e-3},
        {"every": 12, "rate": 1.0, "damping": 1.0},
        {"every": 4, "rate": 0.9, "damping": "auto"},
    ],
    ids=str,
)
def test_the_equations_over_two_tasks(tmp_path, optimizer, settings):
    method = rwalk(strength=0.5, **settings)
    way = Way(method)
    fit(tmp_path, [method, way], seeded(optimizer=optimizer))
    assert [len(steps) for steps in way.after] == [12, 12]
    assert_equations(way, **settings)


@pytest.mark.parametrize("every", [5, 100])
def test_a_tasks_last_steps_count_although_the_interval_is_not_full(tmp_path, every):
    method = rwalk(every=every, damping=1e-5)
    way = Way(method)
    fit(tmp_path, [method, way])
    assert_equations(way, every=every, damping=1e-5)


class Lockstep:
    """A training loop with the penalty that knows nothing of Lightning or of the library."""

    def __init__(self, module, strength, **settings):
        self.module, self.strength = module, strength
        self.equations = Equations(dict(module.named_parameters()), **settings)
        self.anchor = None

    def task(self, batches):
        theta, steps = dict(self.module.named_parameters()), []
        optimizer = self.module.make_optimizer(theta.values(), lr=self.module.lr)
        for x, y in batches:
            loss = F.cross_entropy(self.module(x), y)
            gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
            before = weights(self.module)
            for n, p in theta.items():
                importance = self.equations.importance.get(n, 0.0)
                pull = self.strength * importance * (before[n] - self.anchor[n]) if self.anchor else 0.0
                p.grad = gradients[n] + pull
            optimizer.step()
            steps.append({n: (before[n], gradients[n], p.detach().clone()) for n, p in theta.items()})
        self.equations.task(steps)
        self.anchor = weights(self.module)


@pytest.mark.parametrize("optimizer", [momentum, adamw])
def test_lockstep_with_a_plain_loop_over_two_tasks(tmp_path, optimizer):
    method = rwalk(strength=0.5)
    way = Way(method)
    module = fit(tmp_path, [method, way], seeded(optimizer=optimizer))
    reference = Lockstep(seeded(optimizer=optimizer), 0.5)
    for batches in way.batches:
        reference.task(batches)
    assert_same(weights(module), weights(reference.module), rtol=1e-4, atol=1e-6)
    assert_each(method.fisher, reference.equations.fisher, 1e-3)
    assert_each(method.score, reference.equations.score, 1e-3)
    assert_each(method.importance, reference.equations.importance, 1e-3)
    free = fit(tmp_path, [], seeded(optimizer=optimizer))
    assert (module.net[4].weight - free.net[4].weight).abs().max() > 1e-3  # the penalty did something


# ---------------------------------------------------------------------- ranges and averages


def test_both_parts_are_brought_to_the_unit_range_over_all_tensors_together(tmp_path):
    method = rwalk()
    fit(tmp_path, [method])
    parts = [torch.cat([v.flatten() for v in part.values()]) for part in (method.fisher, method.score)]
    unit = [(part - part.min()) / (part.max() - part.min()) for part in parts]
    actual = torch.cat([method.importance[n].flatten() for n in method.fisher])
    torch.testing.assert_close(actual, sum(unit), rtol=1e-5, atol=1e-6)
    assert actual.min() >= 0
    assert 1 <= actual.max() <= 2


def test_normalized_importance_has_mean_one_after_every_task(tmp_path):
    raw, normal = rwalk(strength=0.0), rwalk(strength=0.0, normalize=True)
    ways = [Way(raw), Way(normal)]
    fit(tmp_path, [raw, normal, *ways])
    for one in ways:
        one.keep()
    for before, after in zip(*(one.kept for one in ways), strict=True):
        mean = torch.cat([v.flatten() for v in before["importance"].values()]).mean()
        assert_each(after["importance"], {n: v / mean for n, v in before["importance"].items()}, 1e-5)


def test_scores_are_averaged_and_not_added(tmp_path):
    # The same task twice, at a learning rate that hardly moves anything: both scores are nearly the same.
    method = rwalk(strength=0.0)
    way = Way(method)
    fit(tmp_path, [method, way], seeded(lr=1e-4), {"a": TASKS["a"], "b": TASKS["a"]})
    first, second = (sum(v.sum().item() for v in s.values()) for s in (way.kept[0]["score"], method.score))
    assert second == pytest.approx(first, rel=0.05)


# ---------------------------------------------------------------------- what counts as gradient and as way


@pytest.mark.parametrize("ewc_first", [True, False])
def test_the_gradient_is_that_without_penalties(tmp_path, ewc_first):
    # A penalty that is strong beside the task's gradient: what it edits must not be in F and s.
    method, ewc = rwalk(strength=0.5), EWC(strength=1.0, estimator="empirical")
    way = Way(method)
    fit(tmp_path, [*((ewc, method) if ewc_first else (method, ewc)), way])
    assert_equations(way)


def test_weight_decay_and_the_proximal_move_belong_to_the_way(tmp_path):
    def decaying(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr / 5, weight_decay=1.0)

    method = rwalk(strength=20.0, damping=1e-4, apply="proximal")
    way = Way(method)
    fit(tmp_path, [method, way], seeded(optimizer=decaying))
    assert_equations(way, damping=1e-4)


def test_accumulated_batches_are_one_batch(tmp_path):
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        method, module = rwalk(strength=0.5), seeded(optimizer=momentum)
        for seed in (1, 2):
            plain_fit(tmp_path, [method], module, seed, size, accumulate_grad_batches=accumulate, max_epochs=2)
        results.append((method.fisher, method.score, method.importance, weights(module)))
    for one, four in zip(*results, strict=True):
        assert_each(four, one, 1e-3)


class Overflowing(Classifier):
    """The third step of a task overflows, as fp16 training does now and then."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_does_not_poison_what_is_measured(tmp_path, fused):
    # The scale of a fused optimizer's gradients is in them: 1024, and half of it after each overflow.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = seeded(Overflowing, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, fused=fused))
    method = rwalk(every=1, rate=0.5, strength=0.1)
    way = Way(method)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(tmp_path, [method, way], module, max_epochs=1, plugins=[precision])
    assert scaler.get_scale() == 256.0
    for part in (method.fisher, method.score, method.importance):
        assert all(v.isfinite().all() for v in part.values())
    way.keep()
    equations, scale = Equations(method.fisher, rate=0.5, every=1), 1024.0
    for kept, steps in zip(way.kept, way.ways(), strict=True):
        real = []
        for step in steps:
            if all(gradient.isfinite().all() for _, gradient, _ in step.values()):
                real.append({n: (b, g / scale if fused else g, a) for n, (b, g, a) in step.items()})
            else:
                scale /= 2
        assert len(real) == 5
        equations.task(real)
        for kind in ("fisher", "score", "importance"):
            assert_each(kept[kind], getattr(equations, kind), 1e-3)


class Cleaned(Classifier):
    """Somebody's loss is NaN at two steps, and somebody's hook makes zeros of the gradients."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.trainer.global_step in (0, 8) else loss

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.nan_to_num_(nan=0.0)


def test_a_gradient_that_somebody_cleans_is_as_if_that_step_had_not_been(tmp_path):
    method, module = rwalk(every=1, rate=0.5, damping=1e-6), seeded(Cleaned)
    way = Way(method)
    with pytest.warns(UserWarning, match=r"RWalk: in 2 steps of task 1/2 'a' a gradient was NaN"):
        fit(tmp_path, [method, way], module)
    way.keep()
    equations = Equations(method.fisher, rate=0.5, every=1, damping=1e-6)
    for kept, steps, count in zip(way.kept, way.ways(), (10, 12), strict=True):
        real = [step for step in steps if all(gradient.isfinite().all() for _, gradient, _ in step.values())]
        assert len(real) == count
        equations.task(real)
        for kind in ("fisher", "score", "importance"):
            assert_each(kept[kind], getattr(equations, kind), 1e-3)
    assert [entry["spoilt_steps"] for entry in method.report()["importance"]] == [2, 0]
    assert any("in 2 steps a gradient was NaN" in said for said in method.report()["sentences"])


# ---------------------------------------------------------------------- bookkeeping


def test_state_is_sixteen_bytes_per_parameter(tmp_path):
    method, module = RWalk(), seeded()
    fit(tmp_path, [method], module)
    assert method.state_bytes() == 16 * sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "setting",
    [
        {"rate": 0.0},
        {"rate": 1.5},
        {"every": 0},
        {"damping": 0.0},
        {"damping": -1.0},
        {"damping": "Auto"},
        {"strength": -1.0},
    ],
)
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RWalk(**setting)
