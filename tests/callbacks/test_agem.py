"""A-GEM inside the Trainer, against a loop of its own that knows nothing of the library, and what must not change."""

import copy
import math
from collections import deque
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import (
    MASKED,
    AtStep,
    Ends,
    Sequences,
    SomebodysLM,
    Steps,
    adamw,
    assert_same,
    fit,
    momentum,
    seeded,
    weights,
)
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric
from toys import Classifier, classification, trainer

from lightning_cl import EWC, Replay, TaskDataModule, fit_tasks
from lightning_cl.callbacks.replay import agem as module_of_agem
from lightning_cl.callbacks.replay.agem import AGEM
from lightning_cl.functional.agem import Projection


def opposed(seed):
    """A task whose labels are another permutation of those of `classification(1)`, more or less."""
    x, y = classification(1, 48).tensors
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x + 0.5 * noise, (y + seed) % 3)


TASKS = {"a": classification(1), "b": opposed(1)}


class Watched(Classifier):
    """Keeps the gradients that the optimizer gets, before clipping: its hook runs after those of callbacks."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.edited = []

    def on_train_start(self):
        self.edited.append([])

    def on_before_optimizer_step(self, optimizer):
        self.edited[-1].append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


class AGEMSpy(AGEM):
    """Keeps the samples that it draws: for each step a list of batches. In the alphabet it is before all penalties."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.drawn = []

    def on_task_start(self, trainer, pl_module):
        super().on_task_start(trainer, pl_module)
        self.drawn.append([])

    def memory_batches(self, trainer, count, seed):
        self.drawn[-1].append([])
        for batch in super().memory_batches(trainer, count, seed):
            self.drawn[-1][-1].append(copy.deepcopy(batch))
            yield batch


def gradient_at(module, tensors, batches):
    """The mean loss's gradient at other weights, in double precision, as one vector."""
    tensors = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in module.named_buffers()}
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = torch.nn.functional.cross_entropy(functional_call(module, tensors | buffers, (x.double(),)), y)
    return flat(torch.autograd.grad(loss, list(tensors.values())))


def flat(tensors):
    tensors = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def run(root, method, module=None, tasks=TASKS, **settings):
    steps, ends = Steps(), Ends()
    module = module if module is not None else seeded(Watched)
    fit(root, [steps, ends, *([method] if method is not None else [])], module, tasks, **settings)
    return SimpleNamespace(module=module, steps=steps, ends=ends, method=method)


# ---------------------------------------------------------------------- the method


def sgd_with_agem(module, tasks, memory, lr, accumulate=1, clip=None):
    """A-GEM as in the paper, on one flat vector in double precision: SGD with momentum, nothing of the library."""
    shapes = [(n, p.shape, p.numel()) for n, p in module.named_parameters()]
    theta = flat(module.parameters())

    def named(vector):
        parts = vector.split([size for *_, size in shapes])
        return {n: part.view(shape) for (n, shape, _), part in zip(shapes, parts, strict=True)}

    ends = []
    for batches, draws in zip(tasks, memory, strict=True):
        velocity = torch.zeros_like(theta)
        windows = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
        for number, window in enumerate(windows):
            g = sum(gradient_at(module, named(theta), [batch]) for batch in window) / accumulate
            if draws:
                g_ref = gradient_at(module, named(theta), draws[number])
                if g @ g_ref < 0:
                    g = g - (g @ g_ref) / (g_ref @ g_ref) * g_ref
            if clip is not None:
                g = g * min(1.0, clip / g.norm().item())
            velocity = 0.9 * velocity + g
            theta = theta - lr * velocity
        ends.append({n: t.float() for n, t in named(theta).items()})
    return ends


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.3}, {"method": {"buffer_size": 30, "batch_size": 20}}],
    ids=["plain", "accumulated", "clipped", "three passes"],
)
def test_training_is_that_of_a_loop_of_its_own(tmp_path, settings):
    settings = dict(settings)
    method = AGEMSpy(**{"buffer_size": 12} | settings.pop("method", {}))
    done = run(tmp_path, method, seeded(Watched, optimizer=momentum, lr=0.02), TASKS | {"c": opposed(2)}, **settings)
    expected = sgd_with_agem(
        seeded(Watched),
        done.steps.batches,
        method.drawn,
        lr=0.02,
        accumulate=settings.get("accumulate_grad_batches", 1),
        clip=settings.get("gradient_clip_val"),
    )
    for actual, theirs in zip(done.ends.weights, expected, strict=True):
        assert_same(actual, theirs, rtol=1e-3, atol=1e-5)
    steps = 12 // settings.get("accumulate_grad_batches", 1)
    assert [len(draws) for draws in method.drawn] == [0, steps, steps]
    assert 1 <= sum(method.interference[task]["projected"] for task in "bc") < 2 * steps


@pytest.mark.parametrize("optimizer", [momentum, adamw])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_gradient_points_against_the_memory_and_the_others_keep_every_bit(tmp_path, optimizer, accumulate):
    method = AGEMSpy(12)
    done = run(tmp_path, method, seeded(Watched, optimizer=optimizer), accumulate_grad_batches=accumulate, max_epochs=6)
    kinds = []
    for at, after, draws in zip(done.steps.before[1], done.module.edited[1], method.drawn[1], strict=True):
        g_ref = gradient_at(seeded(Watched), {n: theta for n, (theta, _) in at.items()}, draws)
        g, edited = flat(gradient for _, gradient in at.values()), flat(after)
        kinds.append(bool(g @ g_ref < 0))
        if kinds[-1]:
            assert abs(edited @ g_ref) < 1e-6 * g.norm() * g_ref.norm()
            torch.testing.assert_close(edited, g - (g @ g_ref) / (g_ref @ g_ref) * g_ref, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(edited, g)
    assert True in kinds
    assert accumulate > 1 or optimizer is adamw or False in kinds
    assert method.interference["b"]["projected"] == sum(kinds)


def test_half_a_batch_twice_is_the_batch(tmp_path):
    """With four samples in memory both draw the same: all of them."""
    ends = [
        run(tmp_path, AGEM(4), batch_size=size, accumulate_grad_batches=accumulate).ends.weights[1]
        for size, accumulate in ((8, 1), (4, 2))
    ]
    assert_same(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asked", [None, 5, 8, 20, 100])
def test_how_many_samples_are_drawn(tmp_path, asked):
    """As many as in a batch of the task, in passes of at most as many; never more than there are, and none twice."""
    method = AGEMSpy(30, asked)
    run(tmp_path, method, batch_size=8, max_epochs=1)
    sizes = {None: [8], 5: [5], 8: [8], 20: [7, 7, 6], 100: [8, 8, 7, 7]}[asked]  # 100: there are 30
    assert method.drawn[1]
    for draws in method.drawn[1]:
        assert [len(x) for x, _ in draws] == sizes
        assert len({value for x, _ in draws for value in x[:, 0].tolist()}) == sum(sizes)


class Rank:
    """A Trainer, as one of two processes sees it."""

    world_size = 2

    def __init__(self, trainer, rank):
        self.trainer, self.global_rank = trainer, rank

    def __getattr__(self, name):
        return getattr(self.trainer, name)


class OnTwoRanks(AGEM):
    """The mean over what two processes compute."""

    def _reference(self, trainer, pl_module, parameters):
        first, second = (super(OnTwoRanks, self)._reference(Rank(trainer, r), pl_module, parameters) for r in (0, 1))
        return {name: (first[name] + second[name]) / 2 for name in first}


@pytest.mark.parametrize("asked", [1, 13, 20])
def test_ranks_share_the_samples_and_weigh_them_as_one_process_does(tmp_path, asked):
    """13 are passes of 7 and 6 for one process, and 7 beside 6 for two; one is no sample for the second."""
    one, two = (run(tmp_path, kind(30, asked)) for kind in (AGEM, OnTwoRanks))
    assert one.method.interference["b"]["projected"] == two.method.interference["b"]["projected"] > 0
    assert_same(two.ends.weights[1], one.ends.weights[1], rtol=1e-4, atol=1e-6)


def test_every_step_draws_anew_and_from_earlier_tasks_alone(tmp_path):
    method = AGEMSpy(20)
    run(tmp_path, method)
    draws = [frozenset(x[:, 0].tolist()) for ((x, _),) in method.drawn[1]]
    assert len(set(draws)) == len(draws)
    assert frozenset.union(*draws) <= set(TASKS["a"].tensors[0][:, 0].tolist())
    assert len(frozenset.union(*draws)) == 20


def test_it_holds_the_earlier_task(tmp_path):
    """What it is for: with the same data, less of the first task is lost."""

    def loss_of_first(module):
        with torch.no_grad():
            x, y = TASKS["a"].tensors
            return torch.nn.functional.cross_entropy(module(x), y).item()

    plain = run(tmp_path, None, max_epochs=20)
    held = run(tmp_path, AGEM(48, batch_size=48), max_epochs=20)
    assert_same(held.ends.weights[0], plain.ends.weights[0], rtol=0, atol=0)
    before = copy.deepcopy(plain.module)
    before.load_state_dict(plain.ends.weights[0])
    start, lost, kept = (loss_of_first(module) for module in (before, plain.module, held.module))
    assert lost - start > 0.3
    assert kept - start < 0.5 * (lost - start)


# ---------------------------------------------------------------------- no trace


class Hard(Watched):
    """Everything that a second pass could disturb."""

    def __init__(self, **settings):
        super().__init__(dropout=0.4, batch_norm=True, **settings)
        self.mean = MeanMetric()
        self.losses, self.logged, self.modes = [], [], deque()  # lists are given back as they were

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.losses.append(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.modes.append([part.training for part in self.net])
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        names = ("train_loss", "mean_step", "mean")
        self.logged.append([float(self.trainer.callback_metrics.get(name, -1)) for name in names])


def test_the_pass_over_the_memory_leaves_no_trace(tmp_path, monkeypatch):
    """Without the projection itself, everything is that of a run without A-GEM, bit for bit."""
    found = []

    def no_projection(gradients, reference):
        found.append(flat(reference.values()))
        return Projection(-1.0, 1.0, 1.0, False)

    monkeypatch.setattr(module_of_agem, "project_", no_projection)
    ends = []
    for methods in ([], [AGEM(20)]):
        module = fit(tmp_path, methods, seeded(Hard, optimizer=adamw), TASKS, accumulate_grad_batches=2)
        ends.append((module, torch.get_rng_state()))
    (plain, plain_rng), (other, other_rng) = ends
    assert len(found) == 6
    assert all(reference.norm() > 0 for reference in found)
    assert_same(dict(other.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert torch.equal(plain_rng, other_rng)
    assert plain.logged == other.logged
    assert torch.equal(torch.stack(plain.losses), torch.stack(other.losses))
    for mine, theirs in zip(plain.edited[1], other.edited[1], strict=True):
        assert_same(theirs, mine, rtol=0, atol=0)


def test_the_memory_is_seen_in_the_mode_of_training(tmp_path):
    """Dropout is on, batch norm takes the batch; a part that is in evaluation mode stays so."""
    frozen = AtStep(lambda module: module.net[1].eval())
    module, modes = seeded(Hard), []

    class Watching(AGEM):
        def _reference(self, *args):
            module.modes.clear()
            reference = super()._reference(*args)
            modes.append((module.modes[-1], [part.training for part in module.net]))
            return reference

    fit(tmp_path, [frozen, Watching(20)], module, TASKS)
    assert modes
    assert all(inside == after == [True, False, True, True, True] for inside, after in modes)


def test_nothing_stored_is_plain_training_at_no_cost(tmp_path, monkeypatch):
    def never(*args, **settings):
        raise AssertionError("a pass over an empty memory")

    monkeypatch.setattr(module_of_agem, "training_loss", never)
    plain, other = (
        fit(tmp_path, methods, seeded(Hard), {"a": TASKS["a"]}, gradient_clip_val=0.1) for methods in ([], [AGEM(20)])
    )
    assert_same(dict(other.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


# ---------------------------------------------------------------------- which parameters


class TwoHeads(Watched):
    """Classes from 3 on belong to a second head; a batch uses one."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.second = torch.nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if (y >= 3).all():
            return torch.nn.functional.cross_entropy(self.second(self.net[:4](x)), y - 3)
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        pass


def test_a_head_that_a_step_does_not_move_is_no_part_of_the_inequality(tmp_path):
    x, y = TASKS["b"].tensors
    method = AGEMSpy(12)
    steps, ends = Steps(), Ends()
    steps.on_before_optimizer_step = lambda *args: None  # some have no gradient
    module = seeded(TwoHeads)
    fit(tmp_path, [steps, ends, method], module, {"a": TASKS["a"], "b": TensorDataset(x, y + 3)})
    trunk = ["net.0.weight", "net.0.bias"]
    assert sorted(module.edited[1][0]) == sorted([*trunk, "second.weight", "second.bias"])
    first, last = ends.weights
    for name in ("net.4.weight", "net.4.bias"):
        assert torch.equal(first[name], last[name])
    # In the first step the trunk alone is held against the memory's gradient of the trunk.
    theta = first
    g, g_ref = (
        dict(zip(theta, gradient, strict=True))
        for gradient in (
            _gradients(module, theta, steps.batches[1][0]),
            _gradients(module, theta, method.drawn[1][0][0]),
        )
    )
    dot = sum((g[n] * g_ref[n]).sum() for n in trunk)
    square = sum(g_ref[n].square().sum() for n in trunk)
    for name in trunk:
        expected = g[name] - min(dot / square, 0) * g_ref[name]
        torch.testing.assert_close(module.edited[1][0][name], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(module.edited[1][0]["second.bias"], g["second.bias"])
    assert method.interference["b"]["projected"] > 0


def _gradients(module, theta, batch):
    module = copy.deepcopy(module)
    module.load_state_dict(theta)
    loss = module.training_step(batch, 0)
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)


class OnlyHead(Watched):
    """Its first layer is not in the optimizer, and gathers gradients that nobody zeroes."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[4].parameters(), lr=0.05)


def test_parameters_that_the_optimizer_does_not_have_do_not_count(tmp_path):
    gathering = run(tmp_path, AGEM(12), seeded(OnlyHead))
    frozen = seeded(OnlyHead)
    frozen.net[0].requires_grad_(False)
    steps = AGEM(12)
    fit(tmp_path, [ends := Ends(), steps], frozen, TASKS)
    sizes = [edited["net.0.weight"].norm() for edited in gathering.module.edited[1]]
    assert sizes[-1] > 2 * sizes[0]
    assert_same(gathering.ends.weights[1], ends.weights[1], rtol=1e-6, atol=1e-7)
    assert gathering.method.interference["b"]["projected"] == steps.interference["b"]["projected"] > 0


class Reentrant(Watched):
    """Activations are computed again in the backward pass, in the old way."""

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)


def test_checkpointed_activations_of_the_old_kind(tmp_path):
    one, other = (run(tmp_path, AGEM(12), seeded(kind)) for kind in (Watched, Reentrant))
    assert_same(other.ends.weights[1], one.ends.weights[1], rtol=1e-6, atol=1e-7)
    assert one.method.interference["b"]["projected"] > 0


# ---------------------------------------------------------------------- precision


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr / 5, fused=True)


class InFull(MixedPrecision):
    """The path of the loss scaler, without rounding."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("optimizer", [momentum, adamw, fused])
def test_a_loss_scale_does_not_change_the_run(tmp_path, optimizer):
    """It changes along the way; a fused optimizer gets gradients that still carry it."""
    plain = run(tmp_path, AGEM(12), seeded(Watched, optimizer=optimizer))
    scaled = run(tmp_path, AGEM(12), seeded(Watched, optimizer=optimizer), plugins=[InFull()])
    assert_same(scaled.ends.weights[1], plain.ends.weights[1], rtol=1e-4, atol=1e-6)
    ours, theirs = scaled.method.interference["b"], plain.method.interference["b"]
    assert ours.pop("cosines") == pytest.approx(theirs.pop("cosines"), rel=1e-4)
    assert ours == theirs
    assert ours["projected"] > 0


class Small(Watched):
    """Its gradients pass through fp16, where they are nothing without a loss scale."""

    in_half = True

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x).half().float() if self.in_half else self(x)
        return torch.nn.functional.cross_entropy(logits, y) * 1e-8


class SmallInFull(Small):
    in_half = False


def test_small_gradients_of_the_memory_survive_fp16(tmp_path):
    """The scale that training multiplies its loss with is that of the memory's loss, too."""
    plugin = InFull()
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    half = run(tmp_path, AGEM(12), seeded(Small, lr=5e6), plugins=[plugin])
    full = run(tmp_path, AGEM(12), seeded(SmallInFull, lr=5e6))
    ours, theirs = half.method.interference["b"], full.method.interference["b"]
    assert theirs["projected"] > 0
    assert ours.pop("cosines") == pytest.approx(theirs.pop("cosines"), abs=0.1)
    assert ours == theirs
    assert_same(half.ends.weights[1], full.ends.weights[1], rtol=0, atol=0.01)


class Overflowing(Watched):
    """One batch of the second task overflows; the pass over the memory does not."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 else loss


def test_an_overflow_of_the_tasks_own_gradient_is_no_step(tmp_path):
    method, plugin = AGEM(12), InFull()
    done = run(tmp_path, method, seeded(Overflowing), max_epochs=1, plugins=[plugin])
    assert plugin.scaler.get_scale() < 1024
    assert method.interference["b"]["steps"] == 5
    assert method.interference["b"]["not_finite"] == 0
    assert all(t.isfinite().all() for t in done.ends.weights[1].values())


@pytest.mark.parametrize(("precision", "error"), [("bf16-mixed", 0.02), ("bf16-true", 0.05)])
def test_in_16_bits_training_is_nearly_that_of_32(tmp_path, precision, error):
    whole = run(tmp_path, AGEM(12))
    method = AGEMSpy(12)
    half = run(tmp_path, method, precision=precision)
    ours, theirs = half.ends.weights[1], whole.ends.weights[1]
    assert_same({n: t.float() for n, t in ours.items()}, theirs, rtol=0, atol=error)
    assert method.interference["b"]["projected"] > 0
    for at, after, draws in zip(half.steps.before[1], half.module.edited[1], method.drawn[1], strict=True):
        g_ref = gradient_at(seeded(Watched), {n: theta for n, (theta, _) in at.items()}, draws)
        assert flat(after) @ g_ref > -error * flat(after).norm() * g_ref.norm()


# ---------------------------------------------------------------------- with other methods


def test_penalties_come_first_whatever_the_order(tmp_path):
    """Not the task's gradient is projected, but what the optimizer gets."""
    ends, edits = [], []
    for order in (1, -1):
        methods = [EWC(30.0, estimator="empirical", samples=48), AGEMSpy(12)]
        steps = Steps()
        module = seeded(Watched)
        fit(tmp_path, [steps, *methods[::order]], module, TASKS)
        ends.append(weights(module))
        edits.append((steps, *methods, module))
    assert_same(*ends, rtol=0, atol=0)
    steps, _, method, module = edits[0]
    anchor, importance = Ends(), {}
    plain = seeded(Watched)
    ewc = EWC(30.0, estimator="empirical", samples=48)
    fit(tmp_path, [anchor, ewc], plain, {"a": TASKS["a"]})
    importance = ewc.importance
    projected = 0
    for at, after, draws in zip(steps.before[1], module.edited[1], method.drawn[1], strict=True):
        g_ref = gradient_at(seeded(Watched), {n: theta for n, (theta, _) in at.items()}, draws)
        pulled = {n: g + 30.0 * importance[n] * (theta - anchor.weights[0][n]) for n, (theta, g) in at.items()}
        g = flat(pulled)
        dot = g @ g_ref
        projected += bool(dot < 0)
        expected = g - min(dot / (g_ref @ g_ref), 0) * g_ref
        torch.testing.assert_close(flat(after), expected, rtol=1e-3, atol=1e-5)
    assert 0 < projected < 12


def test_the_buffer_of_replay_can_be_its_memory(tmp_path):
    replay, method = Replay(16, ratio=0.3), AGEMSpy(buffer="Replay")
    run_of = fit(tmp_path, [method, replay], seeded(Watched), TASKS)
    assert method.buffer is replay.buffer
    assert len(method.buffer) == 16
    assert method.state_bytes() == 0
    assert method.report()["buffer"] == "Replay"
    assert method.interference["b"]["steps"] == len(run_of.edited[1]) > 12
    stored = set(TASKS["a"].tensors[0][:, 0].tolist())
    assert {value for ((x, _),) in method.drawn[1] for value in x[:, 0].tolist()} <= stored


def test_two_projections_are_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="AGEM and AGEM-2 both want the projection of gradients"):
        fit(tmp_path, [AGEM(4), AGEM(4)])


class Adapted(SomebodysLM):
    """Somebody's adapter on somebody's model."""

    def __init__(self, **settings):
        from peft import LoraConfig, get_peft_model

        super().__init__(**settings)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        self.model = get_peft_model(self.model, config)
        self.edited = []

    def on_before_optimizer_step(self, optimizer):
        self.edited.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("kind", ["adapter", "checkpointed adapter"])
def test_lora_the_adapters_gradients_are_projected_and_nothing_else_moves(tmp_path, kind):
    tasks = {"a": Sequences(1, MASKED), "b": Sequences(2, MASKED)}
    module, method, seen = seeded(Adapted, lr=0.05), AGEMSpy(4, batch_size=4), []
    clone = copy.deepcopy(module)
    if kind == "checkpointed adapter":
        module.model.enable_input_require_grads()
        module.model.gradient_checkpointing_enable({"use_reentrant": True})

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
            seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in trained.items()})

    base = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    fit(tmp_path, [Look(), method], module, tasks, batch_size=4, max_epochs=4)
    assert all(torch.equal(p, base[n]) for n, p in module.named_parameters() if n in base)
    steps, projected = len(method.drawn[1]), 0
    for at, edited, draws in zip(seen[-steps:], module.edited[-steps:], method.drawn[1], strict=True):
        clone.load_state_dict({n: theta for n, (theta, _) in at.items()}, strict=False)
        trained = {n: p for n, p in clone.named_parameters() if p.requires_grad}
        assert set(edited) == set(at) == set(trained)
        g_ref = flat(torch.autograd.grad(clone.training_step(draws[0], 0), list(trained.values())))
        g = flat(at[n][1] for n in trained)
        projected += bool(g @ g_ref < 0)
        expected = g - min(g @ g_ref / (g_ref @ g_ref), 0) * g_ref
        torch.testing.assert_close(flat(edited[n] for n in trained), expected, rtol=1e-3, atol=1e-5)
    assert method.interference["b"]["projected"] == projected > 0


# ---------------------------------------------------------------------- states


@pytest.mark.parametrize("shared", [False, True])
def test_resumed_is_never_stopped(tmp_path, shared):
    def go(root, ckpt_path=None):
        method = AGEM(buffer="Replay") if shared else AGEM(20)
        callbacks = [method, ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")]
        if shared:
            callbacks.append(Replay(20, 0.3))
        L.seed_everything(7, verbose=False)
        module = Hard(optimizer=adamw, lr=0.02)
        tasks = {name: classification(i, 40) for i, name in enumerate("abc")}
        fit_tasks(
            trainer(root, callbacks, max_epochs=1), module, TaskDataModule(tasks, batch_size=8), ckpt_path=ckpt_path
        )
        return dict(module.state_dict()), method.interference

    state, interference = go(tmp_path / "whole")
    assert sum(counts["projected"] for counts in interference.values()) > 0
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 8
    checkpoints = checkpoints[shared::2]  # inside tasks and between them
    for number, path in enumerate(checkpoints):
        resumed, counts = go(tmp_path / f"resumed{number}", path)
        assert_same(resumed, state, rtol=0, atol=0)
        assert counts == interference


def test_a_stream_of_one_task_is_remembered_while_it_is_trained_on(tmp_path):
    method = AGEMSpy(12, fill="training")
    fit(tmp_path, [method], seeded(Watched), {"a": TASKS["a"]}, max_epochs=2)
    assert method.interference["a"]["steps"] > 0
    assert all(len(x) <= 8 for draws in method.drawn[0] for x, _ in draws)


# ---------------------------------------------------------------------- what it tells


def test_report_and_logs(tmp_path):
    method, logger = AGEM(12), CSVLogger(tmp_path, name="", version="")
    done = run(tmp_path, method, logger=logger, log_every_n_steps=1)
    logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    columns = {name: [line.split(",")[i] for line in lines[1:]] for i, name in enumerate(names)}
    shares, cosines = (
        [float(value) for value in columns[f"continual/AGEM/{name}"] if value] for name in ("interference", "cosine")
    )
    counts = method.interference["b"]
    assert len(shares) == len(cosines) == counts["steps"] == 12
    assert shares[-1] == pytest.approx(counts["projected"] / 12)
    assert sum(cosine < 0 for cosine in cosines) == counts["projected"]
    assert sum(cosines) == pytest.approx(counts["cosines"], rel=1e-4)
    report = method.report()
    assert report["interference"] == {"b": counts | {"share": counts["projected"] / 12}}
    (sentence,) = report["sentences"]
    share, mean = f"{counts['projected']} of 12 steps projected", f"{counts['cosines'] / 12:.2g} on average"
    assert sentence.startswith(f"AGEM, b: {share} (")
    assert sentence.endswith(f"cosine with the buffer's gradient {mean}")
    assert done.ends.weights


def test_a_memory_without_gradient_is_told(tmp_path):
    """Nothing goes through the first task's inputs, and the model has no biases."""
    x, y = TASKS["b"].tensors

    class NoBias(Watched):
        def __init__(self):
            super().__init__()
            self.net[0], self.net[4] = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 3, bias=False)

    tasks = {"a": TensorDataset(torch.zeros_like(x), y), "b": TASKS["b"]}
    plain = run(tmp_path, None, seeded(NoBias), tasks)
    method = AGEM(12)
    with pytest.warns(UserWarning, match=r"none of 12 steps of .*b.* was projected: the loss of the samples in the"):
        done = run(tmp_path, method, seeded(NoBias), tasks)
    assert_same(done.ends.weights[1], plain.ends.weights[1], rtol=0, atol=0)
    assert method.report()["sentences"] == ["AGEM, b: 0 of 12 steps projected (0%); in 12 steps that gradient was zero"]


class NoLoss(Watched):
    """Gives no loss, or none with a graph, for samples of the first task, once the second has begun."""

    gives = "loss"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_old = torch.isin(batch[0][:, 0], TASKS["a"].tensors[0][:, 0]).any()
        return {"loss": loss, "none": None, "constant": loss.detach()}[self.gives if is_old else "loss"]


@pytest.mark.parametrize("gives", ["none", "constant"])
def test_a_memory_without_loss_changes_nothing(tmp_path, gives):
    def at_second(module):
        module.gives = gives

    plain = run(tmp_path, None)
    method = AGEM(12)
    module = seeded(NoLoss)
    with pytest.warns(UserWarning, match="has no gradient"):
        fit(tmp_path, [AtStep(at_second), method], module, TASKS)
    assert_same(weights(module), plain.ends.weights[1], rtol=0, atol=0)
    assert method.interference["b"]["zero"] == 12


def test_tasks_that_never_interfere_are_told(tmp_path):
    """The same task again, with all of it in memory and in every batch: both gradients are one."""
    tasks = {"a": TASKS["a"], "b": TASKS["a"]}
    method = AGEM(48)
    with pytest.warns(UserWarning, match="never pointed against the buffer's"):
        run(tmp_path, method, tasks=tasks, batch_size=48)
    assert method.interference["b"] == {
        "steps": 2, "projected": 0, "zero": 0, "not_finite": 0, "cosines": pytest.approx(2.0)
    }  # fmt: skip


class Spoilt(Watched):
    """After the first task, the loss of its samples is not finite."""

    spoilt = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_old = torch.isin(batch[0][:, 0], TASKS["a"].tensors[0][:, 0]).any()
        return loss * math.nan if self.spoilt and is_old else loss


def test_a_memory_whose_loss_is_not_finite_changes_nothing_and_is_told(tmp_path):
    def spoil(module):
        module.spoilt = True

    plain = run(tmp_path, None)
    method, module = AGEM(12), seeded(Spoilt)
    with pytest.warns(UserWarning, match="gradient of samples in the buffer is not finite in step 12"):
        fit(tmp_path, [AtStep(spoil), method], module, TASKS)
    assert_same(weights(module), plain.ends.weights[1], rtol=0, atol=0)
    assert method.interference["b"]["not_finite"] == 12
    (sentence,) = method.report()["sentences"]
    assert sentence == "AGEM, b: 0 of 12 steps projected (0%); in 12 steps that gradient was not finite"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_batch_size_is_a_positive_number(value):
    with pytest.raises(ValueError, match=r"batch_size=.*expected a positive number of samples"):
        AGEM(batch_size=value)


class DeepSpeedStrategy(SingleDeviceStrategy):
    """One of that name."""


def test_sharding_that_hides_gradients_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="AGEM: the buffer's gradient cannot be taken of parameters"):
        fit(tmp_path, [AGEM()], strategy=DeepSpeedStrategy("cpu"))


@pytest.mark.parametrize(("replicas", "fits"), [(2, True), (1, False)])
def test_tensor_parallel_ranks_are_refused(tmp_path, monkeypatch, replicas, fits):
    sampler = property(lambda self: {"num_replicas": replicas, "rank": 0})
    monkeypatch.setattr(ModelParallelStrategy, "distributed_sampler_kwargs", sampler)
    run_of = trainer(tmp_path, [AGEM()], strategy=ModelParallelStrategy(1, 2), devices=2)
    assert run_of.world_size == 2
    if fits:
        AGEM().setup(run_of, Classifier(), "validate")
        return
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size > 1"):
        AGEM().setup(run_of, Classifier(), "validate")
