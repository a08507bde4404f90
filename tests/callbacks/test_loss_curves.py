"""LossCurves: against losses by hand from kept weights; training does not notice it; the stability gap's definition."""

from __future__ import annotations

import copy
import csv
import json
import math
import random

import pytest
import torch
from adapting import Sentences, SomebodysAdapter
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from toys import Classifier, classification, trainer

from lightning_cl import LossCurves, Task, TaskAdapters, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.evaluation.curves import curve_sentences, describe_switches, geometric_looks, stability_gap
from lightning_cl.evaluation.curves_figure import curves_figure

pytestmark = pytest.mark.filterwarnings("ignore")
VAL = {name: classification(10 + i, 20) for i, name in enumerate("abw")}


def tasks(batch_size=8, samples=48):
    trained = [Task(name, classification(i, samples), val=VAL[name]) for i, name in enumerate("ab")]
    return TaskDataModule([*trained, Task("w", val=VAL["w"])], batch_size=batch_size)


def module(lr=0.3):
    torch.manual_seed(0)
    return Classifier(dropout=0.3, batch_norm=True, lr=lr)


def fit(root, callbacks, net=None, data=None, ckpt_path=None, **settings):
    torch.manual_seed(1)
    run = trainer(root, callbacks, **{"max_epochs": 2} | settings)
    net = net if net is not None else module()
    fit_tasks(run, net, data or tasks(), ckpt_path)
    return run, net


class Weights(Callback):
    """All weights and running statistics before the run and after each of its steps."""

    def __init__(self):
        self.after = {}

    def on_train_start(self, trainer, pl_module):
        self.after.setdefault(trainer.global_step, copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        # Later batches of an accumulation window move the running statistics alone.
        self.after.setdefault(trainer.global_step, copy.deepcopy(pl_module.state_dict()))


def by_hand(state, name):
    net = module().eval()
    net.load_state_dict(state)
    x, y = VAL[name].tensors
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(net(x).double(), y))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_point_is_the_held_out_loss_of_the_weights_at_its_step(tmp_path):
    curves, weights = LossCurves(every=3), Weights()
    fit(tmp_path, [curves, weights], accumulate_grad_batches=2)
    looked = {name: [step for step, _ in points] for name, points in curves.curves.items()}
    assert looked == {"a": [0, 3, 6, 9, 12], "w": [0, 3, 6, 9, 12], "b": [6, 9, 12]}
    for name, points in curves.curves.items():
        assert [loss for _, loss in points] == pytest.approx([by_hand(weights.after[s], name) for s, _ in points])
    assert curves.switches == [{"task": "a", "step": 0}, {"task": "b", "step": 6}]


def test_training_is_the_same_with_and_without_and_after_a_resume(tmp_path):
    def keeper(path):
        return ModelCheckpoint(path, "{step}", every_n_train_steps=5, save_top_k=-1, save_last=False)

    with_run, ours = fit(tmp_path / "with", [LossCurves(every=2), keeper(tmp_path / "kept")])
    without_run, theirs = fit(tmp_path / "without", [keeper(tmp_path / "other")])
    assert same(ours.state_dict(), theirs.state_dict())
    assert with_run.callback_metrics == without_run.callback_metrics
    whole = next(callback for callback in with_run.callbacks if isinstance(callback, LossCurves))
    for step in (5, 20):
        (path,) = (tmp_path / "kept").rglob(f"step={step}.ckpt")
        resumed = LossCurves(every=2)
        _, net = fit(tmp_path / f"from{step}", [resumed, keeper(tmp_path / f"k{step}")], ckpt_path=path)
        assert same(net.state_dict(), ours.state_dict())
        assert resumed.curves == whole.curves
        assert resumed.switches == whole.switches


def test_with_auto_looks_are_dense_after_a_switch_and_cost_at_most_two_percent(tmp_path):
    class Forwards(Callback):
        looked = trained = 0

        def on_train_start(self, trainer, pl_module):
            self.handle = pl_module.net.register_forward_hook(self.count)

        def on_train_end(self, trainer, pl_module):
            self.handle.remove()

        def count(self, part, args, output):
            if torch.is_grad_enabled():
                self.trained += 3 * len(output)
            else:
                self.looked += len(output)

    curves, count = LossCurves(), Forwards()
    # Sanity checks and validation also run without gradients.
    fit(tmp_path, [count, curves], data=tasks(16, 320), max_epochs=8, limit_val_batches=0)
    assert 0 < count.looked / count.trained <= 0.02
    steps = [step - 160 for step, _ in curves.curves["a"] if step > 160]
    gaps = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert steps[0] == 1
    assert steps[-1] == 160
    assert gaps == sorted(gaps)
    assert len(steps) >= 5


def test_a_task_with_its_own_adapter_has_a_flat_curve(tmp_path):
    data = [Task(name, Sentences(i), val=Sentences(i + 5)) for i, name in enumerate(("a", "b"))]

    def run(folder, callbacks):
        torch.manual_seed(0)
        return fit(tmp_path / folder, callbacks, SomebodysAdapter(), TaskDataModule(data, batch_size=4))[1]

    curves = LossCurves(every=1)
    ours, theirs = run("with", [TaskAdapters(), curves]), run("without", [TaskAdapters()])
    assert same(ours.state_dict(), theirs.state_dict())
    begin = curves.switches[1]["step"]
    assert len({loss for step, loss in curves.curves["a"] if step >= begin}) == 1
    assert len({loss for step, loss in curves.curves["a"] if step <= begin}) > 3
    assert len({loss for step, loss in curves.curves["b"]}) > 3


def test_report_picture_and_loggers_have_the_curves(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run, _ = fit(tmp_path, [LossCurves(every=4), TaskMatrix()], module(lr=3.0), logger=logger)
    curves = next(c for c in run.callbacks if isinstance(c, LossCurves))
    (report,) = tmp_path.rglob("report.json")
    found = json.loads(report.read_text())["curves"]
    assert found["tasks"] == curves.curves
    assert [(switch["task"], switch["step"]) for switch in found["switches"]] == [("a", 0), ("b", 12)]
    assert found["switches"][1]["gaps"]["a"]["before"] == dict(map(tuple, curves.curves["a"]))[12]
    assert (report.parent / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row.get("continual/curves/a")]
    assert {int(row["step"]): float(row["continual/curves/a"]) for row in rows} == pytest.approx(
        {int(step): loss for step, loss in curves.curves["a"]}
    )


# ---------------------------------------------------------------------- the definition


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([3.0, 2.0, 1.55, 1.5], {"rise": 2.0, "remains": 0.5, "depth": 1.5, "peak_step": 1, "steps_to_recover": 3}),
        ([1.2, 1.4, 1.6, 1.8], {"rise": 0.8, "remains": 0.8, "depth": 0.0, "steps_to_recover": None}),
        ([2.0, 0.9, 0.8, 0.8], {"rise": 1.0, "remains": 0.0, "depth": 1.0, "steps_to_recover": 2}),
        ([0.9, 0.8, 0.7, 0.6], {"rise": 0.0, "remains": 0.0, "depth": 0.0, "steps_to_recover": None}),
        ([2.0, float("nan"), 2.0, 1.0], {"rise": math.inf, "remains": 0.0, "depth": math.inf, "steps_to_recover": 3}),
        ([2.0, 3.0, float("inf"), float("nan")], {"rise": math.inf, "remains": math.inf, "depth": 0.0}),
    ],
)
def test_the_stability_gap_is_what_rises_and_passes(after, expected):
    points = [[4, 5.0], [10, 1.0], *([11 + i, loss] for i, loss in enumerate(after))]
    gap = stability_gap(points, 10, 14)
    assert {key: gap[key] for key in expected} == pytest.approx(expected)
    assert gap["before"] == 1.0


def test_a_run_that_diverged_says_so():
    def told(after):
        points = [[10, 1.0], *([11 + i, loss] for i, loss in enumerate(after))]
        switch = {"task": "b", "step": 10, "gaps": {"a": stability_gap(points, 10, 14)}}
        return curve_sentences([switch])

    assert told([2.0, math.nan, 2.0, 1.0]) == [
        "a, when b began: its loss was not finite (at step 2), finite again at step 3"
    ]
    assert told([2.0, 3.0, math.inf, math.nan]) == [
        "a, when b began: its loss was not finite (at step 3), it stayed so"
    ]


def test_jitter_is_no_gap_and_a_gap_in_jitter_is_one():
    draw, told, noise = random.Random(0), 0, 0.0
    for _ in range(200):
        losses = [1.0 + draw.gauss(0.0, 0.01) for _ in range(20)]
        switch = {"task": "b", "step": 0}
        gap = stability_gap([[0, 1.0], *([1 + i, loss] for i, loss in enumerate(losses))], 0, 20)
        told += bool(curve_sentences([switch | {"gaps": {"a": gap}}]))
        noise += gap["noise"] / 200
        raised = [1.0, *(loss + 0.3 * 0.5**i for i, loss in enumerate(losses))]
        gap = stability_gap(list(enumerate(raised)), 0, 20)
        assert curve_sentences([switch | {"gaps": {"a": gap}}])
    assert noise == pytest.approx(0.01, rel=0.1)
    assert told < 60  # a gap in 88 % of them without a look at the noise


def test_nothing_before_or_after_is_no_gap():
    assert stability_gap([[11, 1.0]], 10, 14) is None
    assert stability_gap([[10, 1.0], [15, 1.0]], 10, 14) is None
    assert geometric_looks(1, 3) == []
    assert geometric_looks(1000, 4) == [1, 6, 32, 178]


def test_the_picture_names_every_task_and_no_name_covers_another():
    points = {f"task {i} <b>": [[0, 1.0], [50, 1.0 + i / 1000], [100, 2.0 + i / 1000]] for i in range(4)}
    switches = describe_switches(points, [{"task": name, "step": 25 * i} for i, name in enumerate(points)], 100)
    figure = curves_figure({"tasks": points, "switches": switches})
    figure.canvas.draw()
    (axes,) = figure.axes
    names = [text for text in axes.texts if text.get_position()[0] == 1.01]
    assert [text.get_text() for text in names] == list(points)
    boxes = [text.get_window_extent() for text in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "task 0 <b>, when" in " ".join(curve_sentences([{"task": "x", "gaps": {"task 0 <b>": _gap()}}]))


def _gap():
    return stability_gap([[0, 1.0], [1, 2.0], [2, 1.1]], 0, 2)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": "often"}, {"every": True}, {"samples": 0}, {"seed": 1.5}])
def test_a_wrong_argument_is_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        LossCurves(**wrong)
