"""What a run's numbers are about: rows of one kind of data, runs that diverged, and penalties that did nothing."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Subset, TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import EWC, L2SP, SI, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.cli import strengths as cli_search
from lightning_cl.data.measured_on import content_hash, difference, measured_on

pytestmark = pytest.mark.filterwarnings("ignore:.*(ModelCheckpoint|dirpath|exists and is not empty)")


def tasks(names="ab", batch_size=8, val=100):
    made = {name: {"train": classification(i), "val": classification(i + val)} for i, name in enumerate(names)}
    return TaskDataModule(made, batch_size=batch_size)


def fit(root, data, ckpt_path=None, callbacks=(), module=None, **settings):
    L.seed_everything(0, verbose=False)
    matrix = TaskMatrix()
    own = [] if any(isinstance(callback, ModelCheckpoint) for callback in callbacks) else [ModelCheckpoint(root)]
    made = trainer(root, [matrix, *callbacks, *own], **{"max_epochs": 1} | settings)
    fit_tasks(made, module or Classifier(), data, ckpt_path)
    return matrix


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two tasks, whose matrix was measured on three batches of each."""
    root = tmp_path_factory.mktemp("first")
    return root, fit(root, tasks(), limit_val_batches=3)


# ---------------------------------------------------------------------- rows of one kind of data


def goes_on(first, tmp_path, **settings):
    shutil.copytree(first[0] / "tasks", tmp_path / "from")
    data = settings.pop("data", None) or tasks("abc")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matrix = fit(tmp_path / "new", data, tmp_path / "from" / "1-b.ckpt", **settings)
    return matrix, [str(w.message) for w in caught if "TaskMatrix" in str(w.message)]


def test_the_same_data_goes_on_without_a_word(first, tmp_path):
    matrix, said = goes_on(first, tmp_path, limit_val_batches=3)
    assert said == []
    assert matrix.changes == []
    assert torch.equal(matrix.matrix[:3, :2], first[1].matrix)


def test_a_limit_beyond_the_data_is_no_other_data(tmp_path):
    before = fit(tmp_path / "1", tasks(), limit_val_batches=1.0)
    matrix, said = goes_on((tmp_path / "1", before), tmp_path, limit_val_batches=50)
    assert (said, matrix.changes) == ([], [])


def losses(path, batch=8):
    """What the weights of a checkpoint give on the first batch of each task."""
    module = Classifier()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        pairs = [classification(100 + column).tensors for column in range(2)]
        return [float(torch.nn.functional.cross_entropy(module(x[:batch]), y[:batch])) for x, y in pairs]


def test_another_limit_measures_again_what_it_can(first, tmp_path):
    """All but the row before training: the weights of both boundaries are there."""
    matrix, said = goes_on(first, tmp_path, limit_val_batches=1)
    assert len(said) == 1
    assert "a (limit_val_batches 3 → 1), b (limit_val_batches 3 → 1)" in said[0]
    old = first[1].matrix
    assert [(c["task"], c["row"], c["before"]) for c in matrix.changes] == [
        ("a", 1, old[1:3, 0].tolist()),
        ("b", 1, old[1:3, 1].tolist()),
    ]
    assert torch.equal(matrix.matrix[0, :2], old[0])
    for row, name in ((1, "0-a"), (2, "1-b")):
        assert matrix.matrix[row, :2].tolist() == pytest.approx(losses(tmp_path / "from" / f"{name}.ckpt"), rel=1e-5)
    sentences = {s.split(":")[0]: s for s in built(matrix)["sentences"]}
    assert f"{float(matrix.matrix[1, 0]):.3f} when learnt" in sentences["a"]
    assert math.isnan(matrix.summary()["forward_transfer"])  # b's row before training is on other data, and c has none


def test_training_goes_on_from_the_right_weights_after_rows_were_measured_again(first, tmp_path):
    """The weights of an earlier row were in the module: what is trained next must not notice."""
    goes_on(first, tmp_path / "1", limit_val_batches=1)
    goes_on(first, tmp_path / "2", limit_val_batches=3)
    one, other = (
        torch.load(tmp_path / n / "new" / "tasks" / "2-c.ckpt", weights_only=True)["state_dict"] for n in "12"
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("why", ["gone", "of another run", "damaged"])
def test_without_the_weights_of_a_row_a_line_separates_it(first, tmp_path, why):
    shutil.copytree(first[0], tmp_path / "run")
    path = tmp_path / "run" / "tasks" / "0-a.ckpt"
    if why == "gone":
        path.unlink()
    elif why == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        content = torch.load(path, weights_only=True)
        content["lightning_cl"]["methods"]["TaskMatrix"]["state"]["matrix"] += 0.1
        torch.save(content, path)
    matrix, _ = goes_on((tmp_path / "run", None), tmp_path, limit_val_batches=1)
    old = first[1].matrix
    assert [(c["task"], c["row"], c["before"]) for c in matrix.changes] == [
        ("a", 2, [float(old[2, 0])]),
        ("b", 2, [float(old[2, 1])]),
    ]
    assert torch.equal(matrix.matrix[:2, :2], old[:2])
    assert matrix.matrix[2, :2].tolist() == pytest.approx(losses(tmp_path / "from" / "1-b.ckpt"), rel=1e-5)
    summary = matrix.summary()
    assert summary["forgetting"] == pytest.approx(float((matrix.matrix[3, :2] - matrix.matrix[2, :2]).mean()))
    sentences = {s.split(":")[0]: s for s in built(matrix)["sentences"]}
    assert f"{float(old[1, 0]):.3f} when learnt" not in sentences["a"]
    assert "measured on other data (limit_val_batches 3 → 1)" in sentences["a"]


def built(matrix):
    from lightning_cl.evaluation import build_report

    cost = {"steps": 1, "train_seconds": 1.0, "end_seconds": 0.0}
    return build_report(matrix, [cost] * 3, [(matrix, "TaskMatrix")])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda: tasks("abc", batch_size=4), "the batch size 8 → 4"),
        (lambda: tasks("abc", val=200), "the validation samples"),
    ],
    ids=["batch size", "samples"],
)
def test_other_batches_and_other_samples_are_other_data(first, tmp_path, change, what):
    matrix, said = goes_on(first, tmp_path, data=change(), limit_val_batches=3)
    assert {c["what"] for c in matrix.changes} == {what}
    assert what in said[0]


def test_a_finished_run_is_measured_again_too(first, tmp_path):
    matrix, _ = goes_on(first, tmp_path, data=tasks(), limit_val_batches=1)
    assert len(matrix.matrix) == 3
    assert len(matrix.changes) == 2
    new = [losses(tmp_path / "from" / f"{name}.ckpt") for name in ("0-a", "1-b")]
    assert matrix.summary()["forgetting"] == pytest.approx(new[1][0] - new[0][0], abs=1e-5)


def test_changes_survive_in_checkpoints_and_a_second_one_counts(first, tmp_path):
    matrix, _ = goes_on(first, tmp_path, limit_val_batches=1)
    again = fit(tmp_path / "again", tasks("abcd"), tmp_path / "new" / "tasks" / "2-c.ckpt", limit_val_batches=2)
    assert again.changes[:2] == matrix.changes
    assert [(c["task"], c["row"]) for c in again.changes[2:]] == [("a", 3), ("b", 3), ("c", 3)]
    kept = again.trained_matrix()
    assert kept[:3].isnan().all()  # the weights of those rows lie in another run's folder
    assert not kept[3:].isnan().any(0)[:3].any()


def test_a_checkpoint_without_fingerprints_still_loads_with_a_word(first, tmp_path):
    path = tmp_path / "old.ckpt"
    content = torch.load(first[0] / "tasks" / "1-b.ckpt", weights_only=True)
    state = content["lightning_cl"]["methods"]["TaskMatrix"]["state"]
    for key in ("measured_on", "changes"):
        del state[key]
    torch.save(content, path)
    with pytest.warns(UserWarning, match="does not say on what data"):
        matrix = fit(tmp_path / "new", tasks("abc"), path, limit_val_batches=3)
    assert torch.equal(matrix.matrix[:3, :2], first[1].matrix)
    assert matrix.changes == []
    assert set(matrix.measured_on) == set("abc")


def test_inside_a_task_other_data_counts_from_the_next_row_on(tmp_path):
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    old = fit(tmp_path, tasks(), callbacks=[saved], limit_val_batches=3)
    (path,) = (tmp_path / "saved" / "1-b").glob("*step=8.ckpt")
    again = fit(tmp_path / "new", tasks(), path, limit_val_batches=1)
    assert [(c["task"], c["row"], c["before"]) for c in again.changes] == [("a", 2, []), ("b", 2, [])]
    assert torch.equal(again.matrix[:2], old.matrix[:2])
    assert again.matrix[2].tolist() == pytest.approx(losses(tmp_path / "new" / "tasks" / "1-b.ckpt"), rel=1e-5)
    assert math.isnan(again.summary()["forgetting"])
    assert again.summary()["average"] == pytest.approx(float(again.matrix[2].mean()))


def text_print(tmp_path, limit=1.0, **settings):
    texts = [f"the {animal} sleeps in the barn, {n} times" for n in range(4) for animal in ("cat", "dog", "owl")]
    data = TaskDataModule({"a": texts}, tokenizer=TrainedBPE(270, str(tmp_path)), **{"max_length": 16} | settings)
    data.setup()
    return measured_on(data, data.tasks[0], limit)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, None),
        ({"limit": 5000}, None),
        ({"max_length": 9}, "max_length 16 → 9"),
        ({"packing": True}, "packing False → True"),
        ({"batch_size": 2}, "the batch size 8 → 2"),
        ({"val_fraction": 0.5}, "the validation samples"),
        ({"seed": 3}, "the validation samples"),
        ({"limit": 1}, "limit_val_batches 1.0 → 1"),
    ],
    ids=str,
)
def test_a_fingerprint_of_texts_is_of_what_is_measured(tmp_path, settings, what):
    base = text_print(tmp_path)
    now = text_print(tmp_path, **settings)
    assert difference(base, text_print(tmp_path)) is None
    if settings == {"limit": 1} and base["batches"] == [1]:
        base = base | {"batches": [2]}  # as if there were more
    assert difference(base, now) == what


def test_content_of_data_sets_of_somebody_elses_making():
    class Items(torch.utils.data.Dataset):
        def __init__(self, seed, random=False):
            self.x, self.random = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed)), random

        def __len__(self):
            return len(self.x)

        def __getitem__(self, index):
            return {"x": self.x[index] + (torch.rand(3) if self.random else 0), "name": str(index)}

    assert content_hash(Items(0)) == content_hash(Items(0)) != content_hash(Items(1))
    assert content_hash(Items(0, random=True)) is None  # another crop each time is not other data
    whole = classification(0)
    assert content_hash(Subset(whole, [0, 1])) != content_hash(Subset(whole, [0, 2]))
    assert content_hash(TensorDataset(whole.tensors[0].bfloat16())) != content_hash(TensorDataset(whole.tensors[0]))
    assert content_hash(iter([1])) is None


def test_loaders_and_data_modules_have_a_fingerprint():
    class Somebodys(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(classification(0), 8)

        def val_dataloader(self):
            return [DataLoader(classification(1), 4), DataLoader(classification(2), 5)]

    data = TaskDataModule({"a": DataLoader(classification(0), 16), "b": Somebodys()})
    data.setup()
    a, b = (measured_on(data, task, 2) for task in data.tasks)
    assert (a["batch_size"], a["batches"], a["samples"]) == ([16], [2], [48])
    assert (b["batch_size"], b["batches"]) == ([4, 5], [2, 2])
    assert len({a["data"], b["data"], None}) == 3


# ---------------------------------------------------------------------- runs that diverged


class Diverging(Classifier):
    """Its validation loss of the second task is `broken` from the end of that task on."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def validation_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        second = torch.equal(batch[0], classification(101).tensors[0][: len(batch[0])])
        self.log("val_loss", torch.tensor(self.broken) if second and self.trainer.global_step >= 12 else loss)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_task_that_diverged_counts_as_the_worst_and_is_named(tmp_path, broken):
    with pytest.warns(UserWarning, match="val_loss of b is not finite after task 2/2"):
        matrix = fit(tmp_path, tasks(batch_size=8), module=Diverging(broken), limit_val_batches=1)
    assert matrix.matrix[2, 1] == math.inf
    assert not matrix.matrix.isnan().any()
    summary = matrix.summary()
    assert summary["average"] == math.inf
    assert summary["not_finite"] == [{"task": "b", "row": 2}]
    report = json.loads((tmp_path / "report.json").read_text())
    assert cli_search._trial(0.1, tmp_path, report)["diverged"] == ["b"]


def trial(strength, average, diverged=(), unknown=()):
    scores = {"average": average, "mean_when_learnt": 1.0, "forgetting": 0.0}
    return {"strength": strength, "final": {"a": 1.0}, "diverged": list(diverged), "unknown": list(unknown), **scores}


def test_no_search_chooses_a_strength_at_which_a_task_diverged(tmp_path):
    trials = [trial(1.0, 1.072), trial(10.0, 0.143, diverged=["b"]), trial(100.0, 0.2, unknown=["b"])]
    assert cli_search._best(trials, "min") == 1.0
    shown = cli_search._table(trials, 2, 1.0, "val_loss", "min", tmp_path)
    assert "strength 10 is not chosen: val_loss of b is not finite" in shown
    assert "mean when learnt" in shown
    with pytest.raises(ValueError, match=r"no strength has a finite average over all.*diverged: 10"):
        cli_search._best(trials[1:], "min")


# ---------------------------------------------------------------------- penalties


def penalised(tmp_path, method, **settings):
    settings = {"max_epochs": 2} | settings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, tasks(), callbacks=[method], module=Classifier(lr=0.05), **settings)
    return [str(w.message) for w in caught if type(method).__name__ in str(w.message)]


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_a_penalty_that_does_nothing_warns_in_both_modes(tmp_path, apply):
    method = EWC(1e-9, samples=8, apply=apply)
    said = penalised(tmp_path, method)
    assert len(said) == 1
    assert "does nothing" in said[0]
    assert "strength='auto'" in said[0]
    assert "it did nothing" in method.report()["sentences"][0]


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_a_penalty_that_pulls_harder_than_the_task_is_too_strong(tmp_path, apply):
    method = EWC(3000.0 if apply == "proximal" else 15.0, samples=8, apply=apply)
    said = penalised(tmp_path, method)
    assert any("too strong" in words for words in said)
    assert method._diagnosis[1]["largest_share"] > 1
    assert "too strong" in method.report()["sentences"][0]
    assert "too strong" in method.advice("learn")


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_a_penalty_with_its_share_is_neither(tmp_path, apply):
    method = EWC(samples=8, apply=apply)
    assert penalised(tmp_path, method) == []
    assert 0 < method._diagnosis[1]["largest_share"] <= 1


def test_a_task_that_has_come_to_rest_against_a_penalty_is_not_held_too_strongly(tmp_path):
    """At the optimum of their sum both gradients have one norm, and noise makes either the larger one."""
    method = L2SP(1.0)
    assert penalised(tmp_path, method, max_epochs=30, log_every_n_steps=1) == []
    assert method._diagnosis[1]["largest_share"] > 1
    assert 0 < method._diagnosis[1]["excess"] < 1


def test_the_share_in_proximal_mode_is_of_the_optimizers_step(tmp_path):
    """At the fifth step of the task: what the penalty wants there, by what the optimizer did, per learning rate."""
    method, seen = SI(1e-6, apply="proximal"), {}  # next to nothing: it moves nothing itself

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["importance"] = {name: t.clone() for name, t in method.importance.items()}
            seen["before"] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_train_start(self, trainer, pl_module):
            seen["anchor"] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["after"] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    fit(tmp_path, tasks(), callbacks=[method, Look()], max_steps=5, max_epochs=-1)

    def norm(tensors):
        return math.sqrt(sum(float(t.square().sum()) for t in tensors))

    pull = norm(f * (seen["after"][name] - seen["anchor"][name]) for name, f in seen["importance"].items())
    step = norm(seen["after"][name] - before for name, before in seen["before"].items()) / 0.05
    assert method._diagnosis[1]["largest_share"] == pytest.approx(1e-6 * pull / step, rel=1e-3)


@pytest.mark.parametrize(("ratio", "warned"), [(1e-5, True), (0.1, False), (1.0, False)])
def test_an_importance_far_below_an_earlier_one_is_said_before_it_is_normalised(ratio, warned):
    method = EWC()
    importance = {"w": torch.ones(4)}
    method.diagnose(importance, "", normalized_by=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.diagnose(importance, "", normalized_by=0.02 * ratio)
    assert [("normalize=False keeps their ratio" in str(w.message)) for w in caught] == [True] * warned
    assert ("faint" in method._diagnosis[1]) == warned
    assert any("normalize" in words for words in method.report()["sentences"]) == warned


def test_without_normalize_a_faint_importance_is_left_as_it_is():
    method = EWC(normalize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            method.diagnose({"w": torch.ones(4)}, "", normalized_by=None)
    assert [entry for entry in method._diagnosis if "faint" in entry] == []
    assert not any("normalize" in words for words in method.report()["sentences"])


# ---------------------------------------------------------------------- Lightning's closing line


def test_the_closing_line_counts_the_steps_of_the_task(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, tasks("abc"), max_steps=4, max_epochs=-1, limit_val_batches=1)
    said = [record.message for record in caplog.records if "stopped" in record.message]
    assert said == ["`Trainer.fit` stopped: `max_steps=4` reached."] * 3
