"""PackNet on changes: a loop by hand, columns that never change, resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import Ends, adamw, assert_same, fit, momentum, seeded, weights
from toys import Classifier, classification, trainer

from lightning_cl import EWC, GeneralReplay, LwF, PackNet, Replay, TaskDataModule, TaskMatrix, WeightAverage, fit_tasks
from lightning_cl.functional.packnet import task_view
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
THREE = {name: classification(i, 40) for i, name in enumerate("abc")}
WEIGHTS = ("net.0.weight", "net.4.weight")


def test_two_tasks_follow_a_loop_by_hand(tmp_path):
    """Six steps a task, of which two are phase 2; momentum goes through both phases."""
    method = PackNet(share=0.3, retrain=1 / 3)
    tasks = {"a": classification(1), "b": classification(2)}
    module = fit(tmp_path, [method], module=seeded(optimizer=momentum), tasks=tasks, batch_size=16)
    hand = seeded(optimizer=momentum)
    parameters = {n: p for n, p in hand.named_parameters() if n in WEIGHTS}
    base, owner = weights(hand), {n: torch.zeros(p.shape, dtype=torch.int64) for n, p in parameters.items()}
    data = TaskDataModule(tasks, batch_size=16, seed=0)
    data.setup()
    for number, task in enumerate(data.tasks, start=1):
        optimizer, step = momentum(parameters.values(), 0.05), 0
        loader = data.train_loader(task)
        for epoch in range(2):
            loader.set_epoch(epoch)
            for x, y in loader:
                before = weights(hand)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(hand(x), y).backward()
                optimizer.step()
                step += 1
                with torch.no_grad():
                    for n, p in parameters.items():
                        p[owner[n] != (0 if step <= 4 else number)] = before[n][
                            owner[n] != (0 if step <= 4 else number)
                        ]
                        if step == 4:
                            free = (owner[n] == 0).flatten().nonzero().flatten().tolist()
                            change = (p - base[n]).abs().flatten().tolist()
                            for entry in sorted(free, key=lambda i, c=change: -c[i])[: int(0.3 * len(free) + 0.5)]:
                                owner[n].view(-1)[entry] = number
                            p[owner[n] == 0] = base[n][owner[n] == 0]
        assert step == 6
    assert_same(weights(module), weights(hand), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(method.owner[n].long(), owner[n]) for n in owner)


def test_columns_never_change_and_the_base_is_still_there(tmp_path):
    ends, method, matrix = Ends(), PackNet(0.4), TaskMatrix()
    module = fit(tmp_path, [method, ends, matrix], module=seeded(optimizer=adamw), tasks=THREE)
    for column in range(3):
        learnt = matrix.matrix[column + 1 :, column]
        assert (learnt == learnt[0]).all()
        assert learnt[0] < matrix.matrix[0, column]
    start, now = ends.starts[0], weights(module)
    for name in now:
        if name in WEIGHTS:
            free = method.owner[name] == 0
            assert 0 < int(free.sum()) < free.numel()
            assert torch.equal(now[name][free], start[name][free])
        else:
            assert torch.equal(now[name], start[name])
    base = task_view(method.base_weights, {n: now[n] for n in WEIGHTS}, method.owner, 0)
    assert all(torch.equal(value, start[name]) for name, value in base.items())
    left, expected = {n: method.owner[n].numel() for n in WEIGHTS}, []
    for _ in range(3):
        taken = {n: int(0.4 * count + 0.5) for n, count in left.items()}
        left = {n: count - taken[n] for n, count in left.items()}
        expected.append(sum(taken.values()))
    assert list(method.owned().values()) == expected
    assert method.report()["free"][-1] == pytest.approx(sum(left.values()) / 176)


def test_the_view_of_a_task_is_what_it_ended_with(tmp_path):
    """Bit by bit, asked through the Trainer, and the weights are back afterwards."""
    boundaries = []

    class Boundary(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            boundaries.append(None)

    method = PackNet(0.4)
    saver = ModelCheckpoint(save_last=True)
    module, run = seeded(optimizer=adamw), trainer(tmp_path, [method, saver, Boundary()], max_epochs=2)
    data = TaskDataModule(THREE, batch_size=8, seed=0)
    fit_tasks(run, module, data)
    now = weights(module)
    for number, path in enumerate(sorted(tmp_path.rglob("tasks/*.ckpt"))):
        ended = torch.load(path, weights_only=True)["state_dict"]
        with method.deployed(run, module, "abc"[number]):
            assert all(torch.equal(p, ended[n]) for n, p in weights(module).items())
        assert all(torch.equal(p, now[n]) for n, p in weights(module).items())
    with method.deployed(run, module, "watched"):
        assert all(torch.equal(p, now[n]) for n, p in weights(module).items())


def test_one_task_that_owns_everything_is_plain_training_bit_for_bit(tmp_path):
    tasks = {"a": classification(1)}
    plain = fit(tmp_path / "plain", [], module=seeded(optimizer=adamw), tasks=tasks)
    packed = PackNet(1.0, retrain=0.0, targets="all")
    packed = fit(tmp_path / "packed", [packed], module=seeded(optimizer=adamw), tasks=tasks)
    assert all(torch.equal(p, weights(packed)[n]) for n, p in weights(plain).items())


def methods():
    saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
    return [PackNet(0.3, retrain=0.4), WeightAverage(0.2), TaskMatrix(), saver]


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def run(root, names="ab", ckpt_path=None):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        callbacks = methods()
        data = TaskDataModule({name: THREE[name] for name in names}, batch_size=8)
        fit_tasks(trainer(root, callbacks, max_epochs=1), module, data, ckpt_path)
        return weights(module), callbacks[2].matrix, callbacks[0].owner

    whole, matrix, owner = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 5
    for number, path in enumerate(checkpoints):
        again, rows, owners = run(tmp_path / f"again-{number}", ckpt_path=path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert all(torch.equal(owner[n], owners[n]) for n in owner), path
        assert torch.equal(matrix, rows), path
    boundaries = sorted(path for path in checkpoints if path.parent.name == "tasks")
    for row, path in enumerate(boundaries, start=1):
        found = evaluate_tasks(
            trainer(tmp_path, methods()),
            Classifier(dropout=0.2, optimizer=adamw),
            TaskDataModule({name: THREE[name] for name in "ab"}, batch_size=8),
            ckpt_path=path,
        )
        assert [metrics["val_loss"] for metrics in found.values()] == matrix[row].tolist()
    added, _, _ = run(tmp_path / "added", "abc", boundaries[-1])
    at_once, _, _ = run(tmp_path / "at-once", "abc")
    assert all(torch.equal(added[n], at_once[n]) for n in added)


def test_a_task_that_ends_early_gets_its_entries_and_is_warned_of(tmp_path):
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 1

    method, matrix = PackNet(0.4), TaskMatrix()
    with pytest.warns(UserWarning, match="ended after 2 steps, before phase 2"):
        module = fit(tmp_path, [method, matrix, Stops()], tasks=THREE)
    assert method.report()["without_phase_2"] == ["a", "b", "c"]
    assert all(len(set(matrix.matrix[column + 1 :, column].tolist())) == 1 for column in range(3))
    base, now = method.base_weights, weights(module)
    assert all(torch.equal(now[n][method.owner[n] == 0], base[n][method.owner[n] == 0]) for n in base)


def test_little_room_is_warned_of_and_none_is_an_error(tmp_path):
    with pytest.warns(UserWarning, match=r"after task 1/1 'a' \d\.\d% of the entries are free"):
        fit(tmp_path / "little", [PackNet(0.95)], tasks={"a": THREE["a"]})
    method, module = PackNet(1.0), seeded()
    fit(tmp_path / "one", [method], module=module, tasks={"a": THREE["a"]})
    with pytest.raises(MisconfigurationException, match="no entry is left for task 1/1 'b'"):
        fit(tmp_path / "next", [method], module=module, tasks={"b": THREE["b"]})
    with pytest.raises(MisconfigurationException, match=r"share=1.0\): the first of 3 tasks"):
        fit(tmp_path / "three", [PackNet(1.0)], tasks=THREE)


def test_what_does_not_go_together_is_said(tmp_path):
    for other in (EWC(1.0), LwF(), Replay(20)):
        with pytest.raises(MisconfigurationException, match=f"{type(other).__name__} with PackNet: .*Leave one"):
            fit(tmp_path, [other, PackNet()])
    assert not GeneralReplay.relies_on & PackNet.takes_away.keys()

    class Quantised(Classifier):
        def __init__(self):
            super().__init__()
            self.packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(MisconfigurationException, match="'packed' is quantised"):
        fit(tmp_path, [PackNet()], module=Quantised())
    module = seeded()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    with pytest.raises(MisconfigurationException, match="no linear layer whose weight is trainable"):
        fit(tmp_path, [PackNet()], module=module)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"share": 0.0}, "share=0.0"), ({"retrain": 1.0}, "retrain=1.0"), ({"targets": "conv"}, "targets='conv'")],
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        PackNet(**settings)
