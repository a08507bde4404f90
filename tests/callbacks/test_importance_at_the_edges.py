"""What must not go wrong in silence: numbers that are not finite, parts that are frozen or grown, odd data."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import Growing, assert_each, fit, logits_of, plain_fit, seeded
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import EWC, KFACEWC, L2SP, MAS, SI, Replay, RWalk, TaskDataModule, fit_tasks
from lightning_cl.callbacks.regularization.diagnosis import mean_by_layer
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.functional import add_penalty_gradient_

pytestmark = pytest.mark.filterwarnings("ignore")


class Infinite(Classifier):
    """One weight whose loss has an infinite derivative in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.odd = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (0.0 * self.odd if self.training else self.odd.sqrt())


@pytest.mark.parametrize("method", [EWC, KFACEWC], ids=lambda kind: kind.__name__)
def test_an_importance_that_is_not_finite_is_said_and_does_not_spread(tmp_path, method):
    ewc, module = method(1.0, estimator="empirical"), seeded(Infinite)
    with pytest.warns(UserWarning, match=r"importance of 1 weights is not finite"):
        fit(tmp_path, [ewc], module, max_epochs=1)
    assert float(ewc.importance["odd"]) == 0
    assert all(value.isfinite().all() for value in ewc.importance.values())
    assert all(p.isfinite().all() for p in module.parameters())


class Cleaning(Classifier):
    """Somebody's hook makes zeros of gradients that are NaN."""

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.nan_to_num_(nan=0.0)


def spoilt(seed, rows=(3, 17)):
    """A task with two samples that are NaN."""
    x, y = classification(seed).tensors
    x[list(rows)] = torch.nan
    return TensorDataset(x, y)


def by_hand(module, method, dataset):
    """The importance of all samples that are numbers, one by one."""
    total, count = {n: torch.zeros_like(p) for n, p in module.named_parameters()}, 0
    for x, y in dataset:
        if x.isnan().any():
            continue
        count += 1
        logits = module(x[None])
        p, log_p = logits.detach().softmax(-1)[0], logits.log_softmax(-1)[0]
        terms = {"EWC": [-(p[y] ** 0) * log_p[y]], "MAS": [logits.square().sum()]}.get(type(method).__name__)
        if getattr(method, "estimator", None) == "exact":
            terms = [-(p[c] ** 0.5) * log_p[c] for c in range(3)]
        for term in terms:
            gradients = torch.autograd.grad(term, list(module.parameters()), retain_graph=True)
            for n, g in zip(total, gradients, strict=True):
                total[n] += g.abs() if isinstance(method, MAS) else g.square()
    return {n: value / count for n, value in total.items()}


@pytest.mark.parametrize(
    "method",
    [
        lambda **more: EWC(1.0, "empirical", normalize=False, **more),
        lambda **more: EWC(1.0, "exact", normalize=False, **more),
        lambda **more: MAS(1.0, normalize=False, **more),
    ],
)
def test_samples_that_are_nan_are_left_out_and_counted(tmp_path, method):
    """Not the importance of all weights: that would be NaN, and then nothing at all."""
    method, module, tasks = method(outputs=logits_of), seeded(Cleaning), {"a": spoilt(1)}
    with pytest.warns(UserWarning, match=rf"{type(method).__name__}.*'a'.*the loss of 2 samples is NaN"):
        fit(tmp_path, [method], module, tasks, max_epochs=1)
    assert_each(method.importance, by_hand(module, method, tasks["a"]), 1e-4)
    assert method.report()["importance"][0]["left_out"] == 2
    assert any("the loss of 2 samples" in said for said in method.report()["sentences"])


def test_factors_are_those_of_the_samples_that_are_numbers(tmp_path):
    method, module, tasks = KFACEWC(1.0, "empirical", normalize=False), seeded(Cleaning), {"a": spoilt(1)}
    with pytest.warns(UserWarning, match=r"KFACEWC.*the loss of 2 samples is NaN"):
        fit(tmp_path, [method], module, tasks, max_epochs=1)
    x, y = tasks["a"].tensors
    x, y = x[~x.isnan().any(1)], y[~x.isnan().any(1)]
    logits = module(x)
    g = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), logits)[0]
    found = method.factors["net.0.weight"], method.factors["net.4.weight"]
    torch.testing.assert_close(found[0].inputs, x.T @ x / len(x))
    torch.testing.assert_close(found[1].outputs, g.T @ g / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "words"), [("herding", "left out"), ("k_center", "left out"), ("surprise", "for 0")]
)
def test_samples_that_cannot_be_ranked_are_said(tmp_path, policy, words):
    method = Replay(30, 0.2, policy=policy, storage="memory")
    with pytest.warns(UserWarning, match=rf"Replay: .*'a'.* of 2 samples is NaN or infinite: .*{words}"):
        fit(tmp_path, [method], seeded(Cleaning), {"a": spoilt(1)}, max_epochs=1)
    assert len(method.buffer) == 30
    if policy != "surprise":
        assert not any(sample[0].isnan().any() for sample in method.buffer.items)


class InfiniteLayer(Classifier):
    """A layer whose loss has an infinite derivative at its output in evaluation mode, and is finite."""

    def __init__(self):
        super().__init__()
        self.odd = torch.nn.Linear(8, 2)
        torch.nn.init.zeros_(self.odd.weight)
        torch.nn.init.zeros_(self.odd.bias)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (0.0 if self.training else self.odd(batch[0]).sqrt().sum())

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters(), lr=self.lr)


def test_factors_that_are_not_finite_are_said(tmp_path):
    method = KFACEWC(1.0, estimator="empirical")
    with pytest.warns(UserWarning, match=r"KFACEWC: after task 1/2 'a' the importance of 18 weights is not finite"):
        fit(tmp_path, [method], seeded(InfiniteLayer), max_epochs=1)
    assert "odd.weight" not in method.factors
    assert float(method.importance["odd.weight"].abs().sum()) == 0
    assert method.factors["net.0.weight"].trace() > 0


@pytest.mark.parametrize("kind", [SI, RWalk], ids=lambda kind: kind.__name__)
def test_a_gradient_that_a_hook_has_cleaned_spoils_nothing(tmp_path, kind):
    """One NaN made the importance NaN for ever, and with the penalty the next task learnt nothing."""
    clean, method = kind(0.01), kind(0.01)
    ends = []
    for one, tasks in ((clean, {"a": classification(1)}), (method, {"a": spoilt(1)})):
        module = fit(tmp_path, [one], seeded(Cleaning), tasks | {"b": classification(2)}, max_epochs=3)
        with torch.no_grad():
            x, y = classification(2).tensors
            ends.append(float(torch.nn.functional.cross_entropy(module(x), y)))
    assert all(value.isfinite().all() for value in method.importance.values())
    assert all(p.isfinite().all() for p in module.parameters())
    assert ends[1] < ends[0] + 0.05  # the second task was learnt
    entries = method.report()["importance"]
    assert entries[0]["spoilt_steps"] > 0
    assert entries[0]["total"] > 0
    assert entries[1]["spoilt_steps"] == 0
    assert any("steps a gradient was NaN" in said for said in method.report()["sentences"])


class Switch(L.Callback):
    """Freezes or unfreezes the first layer when the second epoch starts."""

    def __init__(self, trainable):
        self.trainable = trainable

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(self.trainable)


@pytest.mark.parametrize("kind", [EWC, SI, MAS, RWalk, L2SP, KFACEWC], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("thaws", [True, False], ids=["unfrozen", "frozen"])
def test_parts_that_are_unfrozen_or_frozen_inside_a_task(tmp_path, kind, thaws):
    method = kind(0.1, **({"outputs": logits_of} if kind in (MAS, KFACEWC) else {}))
    module = seeded()
    module.net[0].requires_grad_(not thaws)
    fit(tmp_path, [method, Switch(thaws)], module, max_epochs=2)
    assert method.tasks_done == 2
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "method",
    [
        lambda: MAS(0.1),
        lambda: EWC(0.1, estimator="sample"),
        lambda: KFACEWC(0.1, estimator="exact"),
        lambda: EWC(0.1, outputs=lambda module, batch: batch["no such key"]),
    ],
)
def test_logits_that_cannot_be_reached_are_found_before_anything_is_trained(tmp_path, method):
    module = seeded()
    with pytest.raises((MisconfigurationException, TypeError)):
        fit(tmp_path, [method()], module)
    assert module.trainer.global_step == 0


class Peek(L.Callback):
    """What is kept of the head's importance while the second task is trained."""

    def __init__(self, method):
        self.method, self.seen = method, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen = self.method.importance["net.4.weight"].clone()


def test_new_rows_of_a_head_are_not_held(tmp_path):
    method, module = L2SP(1.0), seeded(Growing)
    plain_fit(tmp_path, [method], module, 1)
    module.widen_head()
    peek = Peek(method)
    plain_fit(tmp_path, [method, peek], module, 2)
    assert peek.seen.tolist() == [[1.0] * 16] * 3 + [[0.0] * 16] * 2


def test_a_second_sequence_has_a_start_of_its_own(tmp_path):
    method = L2SP(1.0, anchor="start")
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = Classifier()
        start = module.net[0].weight.detach().clone()
        fit_tasks(trainer(tmp_path, [method], max_epochs=1), module, TaskDataModule({"a": classification(1)}))
        assert torch.equal(method.anchor["net.0.weight"], start)


def test_a_task_shorter_than_the_logging_interval_has_a_share_too(tmp_path):
    method = EWC(0.1)
    fit(tmp_path, [method], max_epochs=1, log_every_n_steps=50)
    assert method.report()["importance"][1]["largest_share"] > 0


def test_a_penalty_that_does_nothing_says_which_strength_would(tmp_path):
    with pytest.warns(UserWarning, match=r"EWC: in task 2/2 'b' the penalty's gradient was at most .*strength='auto'"):
        fit(tmp_path, [EWC(1e-12)], max_epochs=1)


class Augmented(Dataset):
    """Another sample at each look."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randn(8), index % 3


def test_data_that_is_augmented_at_random_is_measured_in_batches(tmp_path, monkeypatch):
    sizes = []
    method = EWC(0.1, estimator="sample", outputs=lambda m, b: (sizes.append(len(b[0])), m(b[0]))[1])
    fit(tmp_path, [method], tasks={"a": Augmented()}, max_epochs=1)
    assert sizes[-3:] == [8, 8, 8]


def test_ids_without_a_length_axis(tmp_path):
    class Rated(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.users = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 2)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.head(self.users(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = TensorDataset(torch.arange(20) % 5, torch.arange(20) % 2)
    ewc, module = EWC(0.1, estimator="empirical", normalize=False), seeded(Rated)
    fit(tmp_path, [ewc], module, {"a": data}, max_epochs=1)
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for user, rating in data:
        loss = module.training_step((user[None], rating[None]), 0)
        for total, g in zip(expected.values(), torch.autograd.grad(loss, list(module.parameters())), strict=True):
            total += g.square() / len(data)
    for name, value in expected.items():
        torch.testing.assert_close(ewc.importance[name], value)


def test_kinds_belong_to_their_batches_where_one_is_passed_over(tmp_path):
    marked = TensorDataset(torch.cat([torch.full((24, 1), 1.0), torch.zeros(24, 7)], 1), torch.arange(24) % 3)
    plain = TensorDataset(torch.zeros(24, 8), torch.arange(24) % 3)
    count = []

    def collate(samples):
        count.append(0)
        return None if len(count) == 9 else torch.utils.data.default_collate(samples)

    class Kinds(L.Callback):
        right = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kinds = TaskCoordinator.of(trainer).kinds
            if kinds is not None and batch is not None:
                replayed = [samples[0][0] for samples in kinds]
                self.right = (*self.right, replayed == (batch[0][:, 0] == 1).tolist())

    watch = Kinds()
    for data in (marked, plain):
        run = trainer(tmp_path, [watch, replay := watch.__dict__.setdefault("replay", Replay(24, 0.3))], max_epochs=1)
        run.fit(Classifier(), DataLoader(data, 4, collate_fn=collate))
    assert replay.tasks_done == 2
    assert len(watch.right) > 4
    assert all(watch.right)


def test_two_towers_have_layers_of_their_own():
    found = mean_by_layer(
        {
            "text.layers.0.fc.weight": torch.ones(2),
            "image.layers.0.fc.weight": 3 * torch.ones(2),
            "scale": torch.ones(1),
        }
    )
    assert found == {
        "text.layers.*.fc.weight": {"0": 1.0},
        "image.layers.*.fc.weight": {"0": 3.0},
        "scale": {"": 1.0},
    }


def test_a_penalty_in_fp16_does_not_underflow_on_its_way():
    weight = torch.ones(1, dtype=torch.float16)
    weight.grad = torch.zeros_like(weight)
    anchor = {"w": torch.full((1,), 1 - 2**-10, dtype=torch.float16)}
    add_penalty_gradient_({"w": weight}, anchor, {"w": torch.full((1,), 1e-6)}, strength=1e6)
    assert float(weight.grad) == pytest.approx(2**-10, rel=1e-3)
