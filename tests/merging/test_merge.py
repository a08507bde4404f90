"""Merging of tasks: the algebra through real runs, what is deployed and what is trained, resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import logits, peft_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import TASKS, Ends, adamw, assert_same, fit, seeded, weights
from toys import Classifier, classification, trainer

from lightning_cl import EWC, Interpolate, Merge, Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.functional.merge import generator_of
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
THREE = {name: classification(i, 40) for i, name in enumerate("abc")}


def by_hand(method, start, ends, scale, density=0.5, seed=3):
    """Entry by entry, in fp64 and plain Python."""
    result = {}
    for name, base in start.items():
        vectors = [(end[name].double() - base.double()).flatten().tolist() for end in ends]
        if method == "ties":
            for vector in vectors:
                count = max(1, int(density * len(vector) + 0.5))
                kept = sorted(range(len(vector)), key=lambda i, v=vector: -abs(v[i]))[:count]
                vector[:] = [value if i in kept else 0.0 for i, value in enumerate(vector)]
        if method == "dare":
            for t, vector in enumerate(vectors):
                stays = (torch.rand(base.shape, generator=generator_of(seed, t, name)) < density).flatten().tolist()
                vector[:] = [value / density if stay else 0.0 for value, stay in zip(vector, stays, strict=True)]
        merged = []
        for values in zip(*vectors, strict=True):
            total = sum(values)
            if method == "magmax":
                merged.append(max(values, key=abs))
            elif method == "ties":
                agreeing = [v for v in values if v != 0 and (v > 0) == (total >= 0)]
                merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
            else:
                merged.append(total if method == "arithmetic" else total / len(values))
        result[name] = (base.double() + scale * torch.tensor(merged, dtype=torch.double).view(base.shape)).float()
    return result


@pytest.mark.parametrize("tasks", ["sequential", "independent"])
@pytest.mark.parametrize("method", ["mean", "arithmetic", "magmax", "ties", "dare"])
def test_the_module_is_left_with_the_merge(tmp_path, method, tasks):
    ends = Ends()
    merging = Merge(method, scale=0.7, tasks=tasks, seed=3)
    module = fit(tmp_path, [ends, merging], tasks=THREE)
    assert_same(weights(module), by_hand(method, ends.starts[0], ends.weights, 0.7), rtol=1e-4, atol=1e-6)
    assert merging.report()["merged"] == ["a", "b", "c"]
    copies = 3 if method in ("ties", "dare") else 1
    assert merging.state_bytes() == (1 + copies) * sum(p.numel() * 4 for p in module.parameters())


def test_the_merge_of_one_task_is_the_task(tmp_path):
    for method in ("mean", "arithmetic", "magmax"):
        ends = Ends()
        module = fit(tmp_path / method, [ends, Merge(method)], tasks={"a": classification(1)})
        assert_same(weights(module), ends.weights[0], rtol=1e-6, atol=1e-7)


def test_sequential_training_is_that_without_it_bit_for_bit(tmp_path):
    plain, merged = Ends(), Ends()
    fit(tmp_path / "plain", [plain], tasks=THREE)
    fit(tmp_path / "merged", [merged, Merge("ties"), TaskMatrix()], tasks=THREE)
    for one, other in zip(plain.weights + plain.starts, merged.weights + merged.starts, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_independent_tasks_all_start_from_the_first_weights(tmp_path):
    fit(tmp_path, [Peek(), Merge(tasks="independent")], tasks=THREE)
    started = Peek.seen
    assert all(torch.equal(start[n], started[0][n]) for start in started for n in start)
    assert all(torch.equal(p, weights(seeded())[n]) for n, p in started[0].items())


class Peek(EWC):
    """Another method, before Merge in the list: what it finds when a task starts."""

    relies_on = frozenset()
    seen: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__(0.0, samples=2)
        Peek.seen = []

    def on_task_start(self, trainer, pl_module):
        Peek.seen.append(weights(pl_module))
        super().on_task_start(trainer, pl_module)


def test_a_further_sequence_trains_on_from_the_training_weights(tmp_path):
    """One run of three tasks, and one of two followed by a call with one more."""
    whole, parts, split = Ends(), Ends(), seeded()
    module = fit(tmp_path / "whole", [whole, Merge()], tasks=THREE)
    run = trainer(tmp_path / "parts", [Peek(), parts, Merge()], max_epochs=2)
    torch.manual_seed(1)
    fit_tasks(run, split, TaskDataModule({n: THREE[n] for n in "ab"}, batch_size=8, seed=0))
    between = weights(split)
    assert any(not torch.equal(between[n], parts.weights[1][n]) for n in between)
    fit_tasks(run, split, TaskDataModule({"c": THREE["c"]}, batch_size=8, seed=0))
    assert all(torch.equal(Peek.seen[2][n], parts.weights[1][n]) for n in between)
    assert all(torch.equal(whole.starts[2][n], Peek.seen[2][n]) for n in between)
    assert_same(weights(split), by_hand("mean", parts.starts[0], parts.weights, 1.0), atol=1e-6)
    assert set(weights(module)) == set(between)


def methods(method, tasks):
    saver = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
    kept = [EWC(1.0, samples=8), Replay(20, 0.3)] if tasks == "sequential" else [Interpolate(0.7)]
    return [*kept, Merge(method, density=0.4, tasks=tasks), TaskMatrix(), saver]


@pytest.mark.parametrize(("method", "tasks"), [("dare", "sequential"), ("magmax", "independent")])
def test_resumed_anywhere_equals_never_stopped(tmp_path, method, tasks):
    def run(root, names="ab", ckpt_path=None):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        callbacks = methods(method, tasks)
        data = TaskDataModule({name: THREE[name] for name in names}, batch_size=8)
        run = trainer(root, callbacks, max_epochs=1)
        fit_tasks(run, module, data, ckpt_path)
        return weights(module), callbacks[-2].matrix

    whole, matrix = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 4
    for number, path in enumerate(checkpoints):
        again, rows = run(tmp_path / f"again-{number}", ckpt_path=path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert torch.equal(matrix, rows), path
    boundaries = [path for path in checkpoints if path.parent.name == "tasks"]
    assert len(boundaries) == 2
    for row, path in enumerate(sorted(boundaries), start=1):
        found = evaluate_tasks(
            trainer(tmp_path, methods(method, tasks)),
            Classifier(dropout=0.2, optimizer=adamw),
            TaskDataModule({name: THREE[name] for name in "ab"}, batch_size=8),
            ckpt_path=path,
        )
        assert [metrics["val_loss"] for metrics in found.values()] == matrix[row].tolist()
    added, _ = run(tmp_path / "added", "abc", sorted(boundaries)[-1])
    at_once, _ = run(tmp_path / "at-once", "abc")
    assert all(torch.equal(added[n], at_once[n]) for n in added)


def test_a_checkpoint_of_a_finished_module_still_has_the_training_weights(tmp_path):
    ends = Ends()
    module, run = seeded(), trainer(tmp_path, [Peek(), ends, Merge()], max_epochs=1)
    data = {name: THREE[name] for name in "ab"}
    fit_tasks(run, module, TaskDataModule(data, batch_size=8, seed=0))
    run.save_checkpoint(tmp_path / "finished.ckpt")
    again = trainer(tmp_path / "more", [Peek(), Merge()], max_epochs=1)
    fit_tasks(again, seeded(), TaskDataModule(THREE, batch_size=8, seed=0), tmp_path / "finished.ckpt")
    start = Peek.seen[0]
    assert all(torch.equal(start[n], ends.weights[1][n]) for n in start)


# ---------------------------------------------------------------------- low-rank adapters


class Adapted(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = peft_model()
        for name, parameter in self.named_parameters():
            if "lora_B" in name:  # an adapter that is not new
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))

    def training_step(self, batch, batch_idx):
        return self.lm(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.03)


def products(values):
    found = {}
    for name, a in values.items():
        if "lora_A" in name:
            found[name] = values[name.replace("lora_A", "lora_B")] @ a
    return found


@pytest.mark.parametrize("method", ["mean", "ties"])
def test_adapters_are_merged_by_their_products(tmp_path, method):
    """Against the merge of dense products and the best matrix of the same rank; the base keeps every bit."""
    tasks = {
        n: torch.utils.data.TensorDataset(torch.randint(300, (12, 9), generator=torch.Generator().manual_seed(i)))
        for i, n in enumerate("ab")
    }
    ends = Ends()
    module = fit(tmp_path, [ends, Merge(method)], module=Adapted(), tasks=tasks, batch_size=4)
    start, ended = products(ends.starts[0]), [products(end) for end in ends.weights]
    expected = by_hand(method, start, ended, 1.0)
    for name, product in products(weights(module)).items():
        u, s, v = torch.linalg.svd(expected[name])
        nearest = (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(product, nearest, rtol=1e-3, atol=1e-4)
        if method == "mean":  # of ranks 4 and 4: the exact mean has rank 8
            assert 1e-4 < float((product - expected[name]).norm() / expected[name].norm()) < 1
    trained = {n for n in ends.starts[0] if "lora_" in n}
    assert all(torch.equal(p, ends.starts[0][n]) for n, p in weights(module).items() if n not in trained)
    assert logits(module.lm).isfinite().all()


# ---------------------------------------------------------------------- what is refused


def test_what_does_not_go_together_is_said(tmp_path):
    for other, words in ((Replay(20), "earlier samples would"), (EWC(1.0), "the penalty would pull")):
        with pytest.raises(MisconfigurationException, match=f"{type(other).__name__} with Merge: .*{words}"):
            fit(tmp_path, [Merge(tasks="independent"), other])
    with pytest.raises(MisconfigurationException, match="Merge and Merge-2 each decide"):
        fit(tmp_path, [Merge(), Merge("ties")])


def test_another_module_and_other_parameters_are_refused(tmp_path):
    merging = Merge()
    fit(tmp_path, [merging], tasks={"a": TASKS["a"]})
    with pytest.raises(MisconfigurationException, match="tasks of another module"):
        fit(tmp_path / "other", [merging], module=Classifier())
    module = seeded()

    class Freezes(L.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(False)

    with pytest.raises(MisconfigurationException, match=r"'net.0.bias' is not what was trained.*none in"):
        fit(tmp_path / "fewer", [Freezes(), Merge()], module=module)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "sum"}, "method='sum'"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"density": 0.0}, "density=0.0"),
        ({"tasks": "parallel"}, "tasks='parallel'"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Merge(**settings)
