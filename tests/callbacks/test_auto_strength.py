"""`strength="auto"`: the strength against norms that a spy computes from outside, at the steps where it is chosen."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from regularized import TASKS, AtStep, Steps, adamw, assert_same, fit, logits_of, seeded, weights
from torch.utils.data import TensorDataset
from toys import Classifier, classification

from lightning_cl import EWC, KFACEWC, L2SP, MAS, SI, RWalk
from lightning_cl.callbacks.regularization.auto_strength import AutoStrength

METHODS = {
    "MAS": lambda **s: MAS("auto", outputs=logits_of, **s),
    "EWC": lambda **s: EWC("auto", outputs=logits_of, **s),
    "KFACEWC": lambda **s: KFACEWC("auto", outputs=logits_of, **s),
    "RWalk": lambda **s: RWalk("auto", every=3, **s),
    "SI": lambda **s: SI("auto", **s),
    "L2SP": lambda **s: L2SP("auto", **s),
}
DUE = (4, 6, 9, 13)  # so many steps of a task are taken when the strength is chosen
THREE = TASKS | {"c": classification(3)}


def norm(tensors):
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


class Spied(Classifier):
    """What a penalty did in each optimizer step: to the gradients and to the weights."""

    def __init__(self, method, **settings):
        super().__init__(**settings)
        self.method, self.raw, self.rows = method, Steps(), []

    def on_before_optimizer_step(self, optimizer):
        self.used = {n: p.grad.clone() for n, p in self.named_parameters()}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        stepped = {}
        hook = optimizer.optimizer.register_step_post_hook(lambda *_: stepped.update(weights(self)))
        # The first hook of a step: before those that methods registered.
        hooks = optimizer.optimizer._optimizer_step_post_hooks
        hooks.move_to_end(hook.id, last=False)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        hook.remove()
        if not self.raw.before or not self.raw.before[-1]:
            return
        before, now = self.raw.before[-1][-1], weights(self)
        self.rows.append(
            {
                "task": len(self.raw.before) - 1,
                "step": len(self.raw.before[-1]) - 1,
                "factor": self.method.factor,
                "gradient": norm(g for _, g in before.values()),
                "added": norm(self.used[n] - g for n, (_, g) in before.items()),
                "step size": norm(stepped[n] - v for n, (v, _) in before.items()),
                "moved": norm(now[n] - stepped[n] for n in now),
                "stepped": stepped,
            }
        )


def spied(root, method, tasks=THREE, epochs=3, **settings):
    torch.manual_seed(0)
    module = Spied(method, **settings.pop("module", {}))
    fit(root, [module.raw, method], module, tasks, max_epochs=epochs, **settings)
    return module


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, adamw])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_mode_has_its_share_of_the_tasks_gradient_when_it_is_chosen(tmp_path, name, optimizer):
    method = METHODS[name](share=0.2)
    module = spied(tmp_path, method, TASKS, module={"optimizer": optimizer})
    assert len(module.rows) == 2 * 18
    for row in module.rows:
        assert row["moved"] == 0.0
        if row["task"] > 0 and row["step"] in DUE:
            assert row["added"] / row["gradient"] == pytest.approx(0.2, rel=1e-3)
    shares = [row["added"] / row["gradient"] for row in module.rows if row["task"] > 0 and row["step"] not in DUE]
    assert max(abs(share - 0.2) for share in shares) > 0.02  # between choices it is what it comes to


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, adamw])
@pytest.mark.parametrize("name", METHODS)
def test_proximal_mode_moves_by_its_share_of_the_optimizers_step_when_it_is_chosen(tmp_path, name, optimizer):
    # An implicit step of a small share is shorter than the explicit one by about that share.
    method = METHODS[name](share=0.02, apply="proximal")
    module = spied(tmp_path, method, TASKS, module={"optimizer": optimizer})
    for row in module.rows:
        assert row["added"] == 0.0
        if row["task"] > 0 and row["step"] in DUE:
            assert row["moved"] / row["step size"] == pytest.approx(0.02, rel=0.06)


def test_proximal_mode_is_chosen_by_what_strength_one_wants(tmp_path):
    method, held = MAS("auto", outputs=logits_of, apply="proximal", share=0.3), {}
    torch.manual_seed(0)
    module = Spied(method, optimizer=adamw)

    def hold(m):
        held.update({n: (i.clone(), method.anchor[n].clone()) for n, i in method.importance.items()})

    fit(tmp_path, [module.raw, method, AtStep(hold)], module, max_epochs=3)
    for row in module.rows:
        if row["task"] == 1 and row["step"] in DUE:
            pull = norm(0.01 * i * (row["stepped"][n] - a) for n, (i, a) in held.items())  # adamw: lr / 5
            assert row["factor"] == pytest.approx(0.3 * row["step size"] / pull, rel=1e-3)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_it_is_chosen_after_4_6_9_13_steps_and_holds_until_the_next_choice(tmp_path, apply):
    method = MAS("auto", outputs=logits_of, apply=apply)
    module = spied(tmp_path, method)
    rows = module.rows
    assert all(row["factor"] == 0.0 and row["added"] == row["moved"] == 0.0 for row in rows[: 18 + 4])
    changed = [(b["task"], b["step"]) for a, b in pairwise(rows) if a["factor"] != b["factor"]]
    assert changed == [(task, step) for task in (1, 2) for step in DUE]
    # Until a later task's first choice the last one holds, and is applied.
    assert rows[36]["factor"] == rows[35]["factor"] > 0
    assert rows[38]["added"] + rows[38]["moved"] > 0
    chosen = [(c["task"], c["step"], c["strength"]) for c in method.report()["chosen"]]
    assert chosen == [("bc"[t - 1], s, rows[18 * t + s]["factor"]) for t in (1, 2) for s in DUE]
    assert method.report()["share"] == 0.1


def test_a_step_is_one_of_the_optimizer(tmp_path):
    method = MAS("auto", outputs=logits_of, share=0.2)
    module = spied(tmp_path, method, batch_size=4, accumulate_grad_batches=2)
    assert len(module.rows) == 3 * 18
    for row in module.rows:
        if row["task"] > 0 and row["step"] in DUE:
            assert row["added"] / row["gradient"] == pytest.approx(0.2, rel=1e-3)


def test_the_share_is_of_the_tasks_gradient_without_other_penalties(tmp_path):
    for order in (False, True):
        method, strong = MAS("auto", outputs=logits_of, share=0.2), EWC(3.0, estimator="empirical")
        torch.manual_seed(0)
        module = Spied(method)
        chosen = {}

        class Look(L.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer, chosen=chosen, method=method):
                theta = dict(pl_module.named_parameters())
                if method.importance:
                    pull = norm(method.importance[n] * (p.detach() - method.anchor[n]) for n, p in theta.items())
                    chosen[len(chosen)] = 0.2 * norm(p.grad for p in theta.values()) / max(pull, 1e-30)

        methods = [strong, method] if order else [method, strong]
        fit(tmp_path, [module.raw, Look(), *methods], module, max_epochs=1)
        row = module.rows[6 + 4]
        assert row["factor"] == pytest.approx(chosen[4], rel=1e-4)


def test_the_start_as_an_anchor_is_held_from_the_first_task_on(tmp_path):
    method = L2SP("auto", anchor="start", share=0.2)
    module = spied(tmp_path, method, TASKS)
    for row in module.rows:
        if row["step"] in DUE:
            assert row["added"] / row["gradient"] == pytest.approx(0.2, rel=1e-3)
    assert module.rows[0]["added"] == 0.0
    assert module.rows[10]["added"] > 0


class Overflowing(Spied):
    """The step at which the strength is chosen overflows."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 4 else loss


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_an_overflow_at_the_step_of_the_choice_does_not_make_it_infinite(tmp_path, apply, fused):
    method = MAS("auto", outputs=logits_of, apply=apply, share=0.2)
    torch.manual_seed(0)
    module = Overflowing(method, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, fused=fused))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(tmp_path, [method], module, max_epochs=2, plugins=[plugin])
    assert plugin.scaler.get_scale() < 1024.0
    assert 0 < method.factor < 1e6
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_not_in_the_strength(tmp_path, fused):
    found = []
    for scale in (None, 1024.0):
        method = MAS("auto", outputs=logits_of, share=0.2)
        module = seeded(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, fused=fused))
        settings = {}
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        fit(tmp_path, [method], module, max_epochs=1, **settings)
        found.append(method.factor)
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_the_choice_survives_a_resume(tmp_path):
    def run(root, ckpt_path=None):
        method = KFACEWC("auto", outputs=logits_of, share=0.2)
        checkpoint = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = fit(root, [method, checkpoint], seeded(optimizer=adamw), max_epochs=3, ckpt_path=ckpt_path)
        return weights(module), method.report()["chosen"], method.factor

    reference = run(tmp_path / "1")
    assert len(reference[1]) == len(DUE)
    for step in (18 + 2, 18 + 6, 18 + 9):
        (checkpoint,) = (tmp_path / "1").rglob(f"1-b/step={step}.ckpt")
        resumed = run(tmp_path / f"resumed{step}", checkpoint)
        assert_same(resumed[0], reference[0], rtol=0, atol=0)
        assert resumed[1:] == reference[1:]


# ---------------------------------------------------------------------- by itself


def test_due_steps():
    auto = AutoStrength(0.1)
    for _ in range(2):
        auto.begin_task()
        due = []
        for steps in range(40):
            if auto.is_due(steps):
                due.append(steps)
                auto.choose(1.0, 1.0, "a", steps)
        assert due == [4, 6, 9, 13, 19, 28]


def test_after_an_overflow_the_next_step_chooses():
    auto = AutoStrength(0.1)
    auto.begin_task()
    auto.choose(float("inf"), 1.0, "a", 4)
    assert auto.value == 0
    assert auto.is_due(5)
    auto.choose(1.0, 1.0, "a", 5)
    assert auto.value == pytest.approx(0.1)
    assert not auto.is_due(6)
    assert auto.is_due(7)


def test_share_times_wanted_over_pull():
    auto = AutoStrength(0.25)
    auto.begin_task()
    assert auto.value == 0
    auto.choose(6.0, 3.0, "a", 4)
    assert auto.value == pytest.approx(0.5)


def test_a_penalty_that_wants_nothing_chooses_nothing():
    auto = AutoStrength(0.25)
    auto.begin_task()
    auto.choose(6.0, 3.0, "a", 4)
    auto.choose(6.0, 0.0, "a", 8)
    assert auto.value == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match="share"):
        MAS("auto", share=share)


# ---------------------------------------------------------------------- a task that saturates


@pytest.mark.parametrize(
    ("wanted", "force"),
    [
        (8.0, 0.8),  # as much as at its start: the share
        (4.0, 0.4),  # half of it: still the share
        (2.0, 0.8),  # a quarter: the share has doubled, and counts from half of the start
        (0.5, 3.2),
        (0.4, 4.0),  # a tenth of half of the start: the share has grown to 1
        (1e-6, 4.0),  # learnt perfectly: no more than half of the largest pull
    ],
)
def test_the_share_rises_where_a_task_saturates(wanted, force):
    auto = AutoStrength(0.1)
    auto.begin_task()
    auto.choose(8.0, 1.0, "a", 4)
    auto.choose(wanted, 2.0, "a", 6)
    assert auto.value == pytest.approx(force / 2.0)


def test_what_an_earlier_task_wanted_does_not_count():
    auto = AutoStrength(0.1)
    for wanted in (8.0, 1.0):
        auto.begin_task()
        auto.choose(wanted, 1.0, "a", 4)
        assert auto.value == pytest.approx(0.1 * wanted)


def test_the_most_that_a_task_wanted_survives_a_checkpoint():
    auto, resumed = AutoStrength(0.1), AutoStrength(0.1)
    auto.choose(8.0, 1.0, "a", 4)
    resumed.load(auto.state())
    for one in (auto, resumed):
        one.choose(0.1, 1.0, "a", 6)
    assert resumed.state() == auto.state()
    assert resumed.value == pytest.approx(4.0)


def test_a_state_of_an_earlier_version_is_read():
    auto = AutoStrength(0.1)
    auto.load({"value": 2.0, "next": 9, "chosen": []})
    auto.choose(3.0, 1.0, "a", 9)
    assert auto.value == pytest.approx(0.3)


def saturating(tmp_path, strength, apply):
    """Two tasks whose labels contradict each other, each learnt until its loss is next to nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator)
    tasks = {"a": TensorDataset(x, (x[:, 0] > 0).long()), "b": TensorDataset(x + 1.0, (x[:, 1] > 0).long())}
    method = L2SP(strength, apply=apply)
    module = seeded(optimizer=lambda p, lr: torch.optim.Adam(p, lr=0.05))
    fit(tmp_path, [method], module, tasks, max_epochs=60)
    with torch.no_grad():
        logits = module(x)
    return torch.nn.functional.cross_entropy(logits, tasks["a"].tensors[1]).item(), method


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_a_task_that_is_learnt_perfectly_does_not_switch_the_penalty_off(tmp_path, apply):
    plain, _ = saturating(tmp_path / "plain", 0.0, apply)
    held, method = saturating(tmp_path / "auto", "auto", apply)
    assert held < 0.5 * plain  # 3.15; before the share rose it was 2.7
    assert method.factor > 0


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_default_of_all_quadratic_methods(method):
    kind = type(METHODS[method]())
    assert kind().strength == kind(apply="proximal").strength == "auto"


def test_a_task_too_short_for_a_choice_says_that_nothing_was_protected(tmp_path):
    with pytest.warns(UserWarning, match=r"L2SP: in task 2/2 'b' strength='auto' has chosen nothing in 3 steps"):
        fit(tmp_path, [L2SP()], max_steps=3)
