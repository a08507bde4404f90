"""RecoveryProbe: against steps by hand from kept weights; training does not notice it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import PackNet, RecoveryProbe, Task, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = {name: classification(i, 148).tensors for i, name in enumerate("abc")}
TRAIN, VAL = (
    {name: TensorDataset(x[part], y[part]) for name, (x, y) in DATA.items()} for part in (slice(48), slice(48, 148))
)


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


class Scheduled(Classifier):
    """With a schedule that ends at next to nothing."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(root, callbacks, ckpt_path=None, names="ab", **settings):
    torch.manual_seed(0)
    net = Scheduled(dropout=0.3, batch_norm=True, lr=0.1, optimizer=momentum)
    torch.manual_seed(1)
    run = trainer(root, callbacks, **{"max_epochs": 3} | settings)
    data = TaskDataModule([Task(name, TRAIN[name], val=VAL[name]) for name in names], batch_size=8)
    fit_tasks(run, net, data, ckpt_path)
    return net


class Ends(Callback):
    """The network at the start and at the end of each task."""

    def __init__(self):
        self.starts, self.ends = [], []

    def on_train_start(self, trainer, pl_module):
        self.starts.append(copy.deepcopy(pl_module.net).eval())

    def on_train_end(self, trainer, pl_module):
        self.ends.append(copy.deepcopy(pl_module.net).eval())


def loss(net, data):
    x, y = data.tensors
    return torch.nn.functional.cross_entropy(net(x), y)


def after_steps(net, data, steps, lr=0.1):
    net = copy.deepcopy(net)
    optimizer = momentum(net.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, data).backward()
        optimizer.step()
    return net


def test_all_numbers_are_those_of_the_steps_by_hand(tmp_path):
    probe, seen = RecoveryProbe(steps=4, samples=48, held_out=100, batch_size=48, when="every task"), Ends()
    fit(tmp_path, [probe, seen, TaskMatrix()], names="abc")
    assert {at: list(found) for at, found in probe.results.items()} == {"b": ["a"], "c": ["a", "b"]}
    for at, results in probe.results.items():
        for name, found in results.items():
            start, end, now = seen.starts["abc".index(name)], seen.ends["abc".index(name)], seen.ends["abc".index(at)]
            expected = {
                "learnt": loss(end, VAL[name]),
                "now": loss(now, VAL[name]),
                "after": loss(after_steps(now, TRAIN[name], 4), VAL[name]),
                "before": loss(start, VAL[name]),
                "anew": loss(after_steps(start, TRAIN[name], 4), VAL[name]),
            }
            wanted = {key: float(value) for key, value in expected.items()}
            assert [found[key] for key in ("learnt", "now", "after")] == pytest.approx(
                [wanted[key] for key in ("learnt", "now", "after")], rel=1e-4
            )
            assert found["control"]["before"] == pytest.approx(wanted["before"], rel=1e-4)
            assert found["control"]["after"] == pytest.approx(wanted["anew"], rel=1e-4)
            if found["share"] is not None:
                share = (wanted["now"] - wanted["after"]) / (wanted["now"] - wanted["learnt"])
                assert found["share"] == pytest.approx(share, rel=1e-2)
    (report,) = tmp_path.rglob("report.json")
    found = json.loads(report.read_text())
    assert found["recovery"]["after"] == probe.results
    assert found["recovery"]["steps"] == 4
    words = " ".join(found["methods"]["RecoveryProbe"]["sentences"])
    assert "a: 4 steps on 48 of its samples bring back" in words
    assert "the same steps before it was learnt led to" in words


def test_training_is_the_same_with_and_without_and_after_a_resume(tmp_path):
    def run(folder, callbacks, ckpt_path=None):
        keeper = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        return fit(tmp_path / folder, [*callbacks, keeper], ckpt_path).state_dict()

    probe = RecoveryProbe(steps=3, samples=10, held_out=5)
    ours, theirs = run("with", [probe]), run("without", [])
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert list(probe.results) == ["b"]
    (inside,) = (tmp_path / "with").rglob("step=28.ckpt")
    (boundary,) = (tmp_path / "with").rglob("0-a.ckpt")
    for number, path in enumerate((inside, boundary)):
        again = RecoveryProbe(steps=3, samples=10, held_out=5)
        weights = run(f"again{number}", [again], path)
        assert all(torch.equal(weights[name], value) for name, value in ours.items())
        assert again.results == probe.results


def test_nothing_can_be_recovered_where_each_task_keeps_its_own(tmp_path):
    with pytest.raises(MisconfigurationException, match="RecoveryProbe with PackNet"):
        fit(tmp_path, [RecoveryProbe(), PackNet()])


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"samples": -1}, {"held_out": 0}, {"batch_size": 0}, {"lr": 0}, {"when": "now"}, {"seed": None}],
)
def test_a_wrong_argument_is_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        RecoveryProbe(**wrong)
