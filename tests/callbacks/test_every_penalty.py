"""What every quadratic method promises, whatever its importance: both modes, no-op, order, accumulation, resume."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from regularized import (
    MASKED,
    TASKS,
    AtStep,
    Growing,
    Sequences,
    SomebodysLM,
    adamw,
    assert_each,
    assert_same,
    fit,
    logits_of,
    momentum,
    plain_fit,
    seeded,
    weights,
)
from toys import Classifier, classification

from lightning_cl import EWC, KFACEWC, L2SP, MAS, SI, LwF, Replay, RWalk

METHODS = {
    "MAS": lambda **s: MAS(**{"outputs": logits_of} | s),
    "RWalk": lambda **s: RWalk(**{"every": 3} | s),
    "L2SP": lambda **s: L2SP(**s),
    "L2SP from the start": lambda **s: L2SP(**{"anchor": "start"} | s),
    "KFACEWC": lambda **s: KFACEWC(**{"outputs": logits_of} | s),
    "EWC": lambda **s: EWC(**{"outputs": logits_of} | s),
    "SI": lambda **s: SI(**s),
}
STRENGTH = {"KFACEWC": 0.1, "L2SP": 3.0, "L2SP from the start": 3.0}
every_method = pytest.mark.parametrize("name", METHODS)
new_method = pytest.mark.parametrize("name", [n for n in METHODS if n not in ("EWC", "SI")])  # they have their own
both_modes = pytest.mark.parametrize("apply", ["gradient", "proximal"])
pytestmark = pytest.mark.filterwarnings("ignore")


class Watched(Classifier):
    """Keeps what the optimizer is about to use and what came of it. Its hooks run after those of callbacks."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.look = None

    def on_before_optimizer_step(self, optimizer):
        if self.look:
            self.look("before", self)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.look:
            self.look("after", self)


class Raw(L.Callback):
    """Weights and gradients of this step before any method has touched them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.theta, self.gradient = weights(pl_module), {n: p.grad.clone() for n, p in pl_module.named_parameters()}


def slope(method, module, direction, step=0.5):
    """The derivative of `penalty` along a direction: central differences, which are exact for a quadratic."""
    kept, values = weights(module), []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(kept[n] + sign * step * direction[n])
        values.append(method.penalty(module))
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.copy_(kept[n])
    return (values[0] - values[1]) / (2 * step)


def directions(module, count=4):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield {n: torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()}


def dot(one, other):
    return sum((one[n].double() * other[n].double()).sum().item() for n in one)


@every_method
@both_modes
def test_what_is_applied_is_the_gradient_of_the_penalty(tmp_path, name, apply):
    """`gradient`: what is added to `.grad`. `proximal`: the step that minimises penalty + distance² / (2 lr)."""
    method, raw, module = METHODS[name](strength=STRENGTH.get(name, 1.0), apply=apply), Raw(), seeded(Watched)
    checked = []

    def look(when, m):
        if method.tasks_done != 1 or raw.count < 4:
            return
        if when == "before":
            added = {n: p.grad - raw.gradient[n] for n, p in m.named_parameters()}
            pull = added if apply == "gradient" else None
            if apply == "proximal":
                assert all(not a.any() for a in added.values())
        else:
            # Stationary in penalty(θ) + ‖θ − (θ_before − lr g)‖² / (2 lr).
            stepped = {n: raw.theta[n] - m.lr * raw.gradient[n] for n in raw.theta}
            pull = {n: (stepped[n] - p.detach()) / m.lr for n, p in m.named_parameters()}
            pull = pull if apply == "proximal" else None
        if pull:
            for direction in directions(m):
                scale = (dot(pull, pull) * dot(direction, direction)) ** 0.5
                assert scale > 0
                assert dot(pull, direction) == pytest.approx(slope(method, m, direction), abs=2e-3 * scale)
            checked.append(sum(p.abs().max().item() for p in pull.values()))

    class Count(L.Callback):
        def on_train_start(self, trainer, pl_module):
            raw.count = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            raw.count += 1

    module.look = look
    fit(tmp_path, [raw, Count(), method], module, max_epochs=1)
    assert len(checked) == 3  # of the second task's six steps
    assert min(checked) > 0


@every_method
@both_modes
def test_the_penalty_is_zero_at_the_anchor_and_grows_with_the_strength(tmp_path, name, apply):
    method = METHODS[name](strength=0.5, apply=apply)
    module = fit(tmp_path, [method], max_epochs=1)
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.copy_(method.anchor[n])
    assert method.penalty(module) == pytest.approx(0.0, abs=1e-9)
    (direction,) = directions(module, 1)
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.add_(direction[n])
    one = method.penalty(module)
    assert one > 0
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.add_(direction[n])
    assert method.penalty(module) == pytest.approx(4 * one, rel=1e-4)
    method.strength = 1.5
    assert method.penalty(module) == pytest.approx(12 * one, rel=1e-4)


@new_method
@both_modes
def test_strength_zero_is_plain_training_bit_for_bit(tmp_path, name, apply):
    settings = {"dropout": 0.3, "batch_norm": True, "optimizer": adamw}
    method = METHODS[name](strength=0.0, apply=apply)
    watched = fit(tmp_path / "1", [method], seeded(**settings), max_epochs=1).state_dict()
    plain = fit(tmp_path / "2", [], seeded(**settings), max_epochs=1).state_dict()
    assert all(torch.equal(watched[n], plain[n]) for n in plain)
    importance = sum(f.sum() for f in method.importance.values())
    factors = sum(f.trace() for f in getattr(method, "factors", {}).values())
    assert importance + factors > 0  # and yet it was measured


@new_method
@both_modes
def test_the_penalty_holds_weights_where_they_were(tmp_path, name, apply):
    def way(strength):
        module = seeded()
        method = METHODS[name](strength=strength, apply=apply)
        at = {}
        fit(tmp_path, [method, AtStep(lambda m: at.update(weights(m)))], module)
        return sum((p.detach() - at[n]).square().sum().item() for n, p in module.named_parameters()) ** 0.5

    free, held = way(0.0), way(STRENGTH.get(name, 1.0))
    assert held < 0.95 * free


@both_modes
@pytest.mark.parametrize("name", ["MAS", "RWalk", "L2SP", "L2SP from the start", "KFACEWC"])
def test_the_order_of_callbacks_changes_nothing(tmp_path, name, apply):
    tasks, results = TASKS | {"c": classification(3)}, []
    for reverse in (False, True):
        methods = [
            METHODS[name](strength=0.5, apply=apply),
            EWC(0.5, estimator="empirical", mode="separate", apply=apply),
            SI(0.5, apply=apply),
        ]
        module = fit(tmp_path, methods[::-1] if reverse else methods, tasks=tasks, max_epochs=1)
        results.append([weights(module), *(dict(m.importance) for m in methods), *(m.anchor for m in methods)])
    for left, right in zip(*results, strict=True):
        assert_same(left, right, rtol=0, atol=0)


@new_method
@both_modes
def test_accumulated_batches_are_one_batch(tmp_path, name, apply):
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        settings = {"estimator": "empirical"} if "EWC" in name else {}
        method, module = METHODS[name](strength=1.0, apply=apply, **settings), seeded(optimizer=momentum)
        for seed in (1, 2):
            plain_fit(tmp_path, [method], module, seed, size, accumulate_grad_batches=accumulate)
        factors = {n: f.diagonal() for n, f in getattr(method, "factors", {}).items()}
        results.append((weights(module), dict(method.importance), factors))
    for one, four in zip(*results, strict=True):
        assert_each(four, one, 2e-3)


@new_method
def test_the_penalty_carries_the_scale_that_the_gradients_carry(tmp_path, name):
    # A fused optimizer unscales by itself: the penalty is added to gradients that are 1024 times as long.
    ends = []
    for strength, scale in ((0.0, None), (STRENGTH.get(name, 1.0), None), (STRENGTH.get(name, 1.0), 1024.0)):
        method = METHODS[name](strength=strength)
        module = seeded(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, fused=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if scale else []
        ends.append(weights(fit(tmp_path, [method], module, plugins=plugins)))
    free, held, scaled = (torch.cat([p.flatten() for p in end.values()]) for end in ends)
    assert (scaled - held).norm() < 0.2 * (free - held).norm()


@every_method
def test_the_report_has_each_tasks_importance_in_numbers(tmp_path, name):
    method = METHODS[name](strength=0.0)
    fit(tmp_path, [method], max_epochs=1)
    rows = method.report()["importance"]
    assert [row["task"] for row in rows] == ["a", "b"]
    for row in rows:
        assert row["parameters"] == 195
        assert row["total"] == pytest.approx(195, rel=1e-3)  # normalised to mean one


@pytest.mark.parametrize("name", ["MAS", "KFACEWC", "EWC"])
def test_an_importance_of_zero_warns_and_says_why(tmp_path, name):
    class Indifferent(Classifier):
        def forward(self, x):
            return 0.0 * super().forward(x)

    settings = {"estimator": "empirical"} if "EWC" in name else {}
    with pytest.warns(UserWarning, match=rf"(?s){name}.*importance.*zero.*can do nothing"):
        fit(tmp_path, [METHODS[name](**settings)], seeded(Indifferent), {"a": TASKS["a"]}, max_epochs=1)


@new_method
def test_frozen_parameters_cost_nothing(tmp_path, name):
    method, module = METHODS[name](), seeded()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.clone()
    fit(tmp_path, [method], module)
    names = {"net.4.weight", "net.4.bias"}
    assert set(method.importance) | set(getattr(method, "factors", ())) == set(method.anchor) == names
    assert method.state_bytes() <= 16 * (48 + 3) + 4 * 16**2
    assert torch.equal(module.net[0].weight, before)


@every_method
def test_tied_weights_count_once(tmp_path, name):
    # The pull on a shared matrix is that of one matrix.
    settings = {"estimator": "empirical"} if "EWC" in name else {}
    outputs = {} if name in ("RWalk", "L2SP", "L2SP from the start", "SI") else {"outputs": None}
    method, data = METHODS[name](strength=0.5, **settings, **outputs), Sequences(1, MASKED)
    module = seeded(SomebodysLM, tie=True)
    fit(tmp_path, [method], module, {"a": data, "b": Sequences(2, MASKED)}, batch_size=4, max_epochs=1)
    trainable = {n for n, p in module.named_parameters()}
    assert "model.lm_head.weight" not in trainable
    assert set(method.importance) | set(getattr(method, "factors", ())) == set(method.anchor) == trainable
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.copy_(method.anchor[n])
        module.model.lm_head.weight[3, 5] += 2.0
    embedding = method.importance["model.model.embed_tokens.weight"][3, 5].item()
    assert embedding > 0
    assert method.penalty(module) == pytest.approx(0.5 * 0.5 * embedding * 4.0, rel=1e-3)


@pytest.mark.parametrize("name", ["MAS", "RWalk", "L2SP", "L2SP from the start"])
def test_a_grown_head_keeps_its_rows_and_new_rows_are_free(tmp_path, name):
    method, module = METHODS[name](strength=1.0), seeded(Growing)
    plain_fit(tmp_path, [method], module, 1)
    before, anchor = method.importance["net.4.weight"].clone(), method.anchor["net.4.weight"].clone()
    module.widen_head()
    seen = {}

    def look(m):
        seen["importance"], seen["anchor"] = method.importance["net.4.weight"].clone(), method.anchor["net.4.weight"]
        seen["gap"] = (m.net[4].weight - method.anchor["net.4.weight"])[3:].abs().max().item()
        start = method.penalty(m)
        with torch.no_grad():
            m.net[4].weight[3:] += 7.0
        seen["moved"] = method.penalty(m) - start
        with torch.no_grad():
            m.net[4].weight[3:] -= 7.0

    plain_fit(tmp_path, [method, AtStep(look, task=0)], module, 2)
    torch.testing.assert_close(seen["importance"][:3], before, rtol=0, atol=0)
    assert seen["importance"].shape == (5, 16)
    torch.testing.assert_close(seen["anchor"][:3], anchor, rtol=0, atol=0)
    assert seen["gap"] == 0.0  # new rows are their own anchor
    if not name.startswith("L2SP"):
        assert not seen["importance"][3:].any()
        assert seen["moved"] == 0.0
        assert method.importance["net.4.weight"][3:].any()  # measured from then on
    assert method.importance["net.4.weight"].shape == method.anchor["net.4.weight"].shape == (5, 16)


# ---------------------------------------------------------------------- resume


class Hard(Classifier):
    """Everything that makes resuming hard: dropout, batch norm, momentum, a schedule."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True, lr=0.01, optimizer=torch.optim.AdamW)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def everything():
    return {
        "mas": MAS(0.5, outputs=logits_of, samples=10),
        "mas auto": MAS("auto", outputs=logits_of, apply="proximal", share=0.2),
        "rwalk": RWalk(0.5, every=4),
        "rwalk proximal": RWalk(0.5, every=5, apply="proximal", state_dtype="bfloat16"),
        "l2sp": L2SP("auto"),
        "l2sp start": L2SP(0.5, anchor="start", apply="proximal", state_device="cpu"),
        "kfac": KFACEWC(0.5, outputs=logits_of, samples=10),
        "kfac proximal": KFACEWC("auto", outputs=logits_of, estimator="empirical", apply="proximal", decay=0.9),
        "lwf": LwF(0.5, outputs=logits_of),
        "lwf base": LwF(0.3, outputs=logits_of, teacher="base", where="replayed"),
        "ewc": EWC("auto", outputs=logits_of, state_dtype="bfloat16", state_device="cpu", mode="separate"),
        "replay": Replay(20, 0.3, storage="memory"),
    }


def run(root, ckpt_path=None):
    L.seed_everything(7, verbose=False)
    methods = everything()
    checkpoint = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    tasks = {name: classification(i, 40) for i, name in enumerate("abc")}
    module = fit(root, [*methods.values(), checkpoint], Hard(), tasks, ckpt_path=ckpt_path)
    return module, methods


def fingerprint(module, methods):
    """Everything that must be equal: weights, and all that each method would keep, in its own form."""
    state = {f"module.{n}": v.clone() for n, v in module.state_dict().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.linspace(-1, 1, p.numel()).view(p.shape))  # away from the anchors

    def flatten(prefix, value):
        if torch.is_tensor(value):
            state[prefix] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                flatten(f"{prefix}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for number, part in enumerate(value):
                flatten(f"{prefix}.{number}", part)
        else:
            state[prefix] = value

    for name, method in methods.items():
        flatten(name, method.continual_state())
        if hasattr(method, "penalty"):
            state[f"{name}.penalty"] = method.penalty(module)
            state[f"{name}.factor"] = method.factor
    return state


def test_resume_from_boundaries_and_from_inside_of_tasks_equals_never_stopped(tmp_path):
    reference = fingerprint(*run(tmp_path / "reference"))
    assert sum(reference.get(f"{name}.penalty", 0) > 0 for name in everything()) == 9
    checkpoints = {path.relative_to(tmp_path / "reference").as_posix(): path for path in tmp_path.rglob("*.ckpt")}
    boundaries = ["tasks/0-a.ckpt", "tasks/1-b.ckpt"]
    inside = [n for n in sorted(checkpoints) if "0-a/step=3." in n or "1-b/step=" in n or "2-c/step=" in n]
    assert len(inside) > 20
    for name in [*boundaries, *inside[:: len(inside) // 5]]:
        resumed = fingerprint(*run(tmp_path / "resumed" / name, checkpoints[name]))
        assert reference.keys() == resumed.keys()
        differing = [
            n
            for n, v in reference.items()
            if not (torch.equal(v, resumed[n]) if torch.is_tensor(v) else v == resumed[n] or v != v)
        ]
        assert not differing, name


def test_checkpoints_hold_no_pickle_and_no_live_tensor(tmp_path):
    module, methods = run(tmp_path)
    stored = torch.load(tmp_path / "tasks" / "2-c.ckpt", weights_only=True)["lightning_cl"]["methods"]
    assert len(stored) == len(methods)
    before = copy.deepcopy({name: method.continual_state() for name, method in methods.items()})
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    assert fingerprint_of(before) == fingerprint_of({name: m.continual_state() for name, m in methods.items()})


def fingerprint_of(state):
    return {k: v.tolist() if torch.is_tensor(v) else v for k, v in flat(state).items()}


def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, part in enumerate(value) for k, v in flat(part, f"{prefix}.{key}").items()}
    return {prefix: value}
