"""One adapter for each task: old tasks stay to the last bit, whatever is stopped, resumed, added or loaded."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import Sentences, SomebodysAdapter, base_model, logits
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import AutoPeftModelForCausalLM
from toys import Classifier, trainer

from lightning_cl import (
    EWC,
    CausalLM,
    GeneralReplay,
    KLToBase,
    LwF,
    Replay,
    SelfReplay,
    Task,
    TaskAdapters,
    TaskDataModule,
    TaskMatrix,
    fit_tasks,
)
from lightning_cl.core.checkpoint_io import read_checkpoint
from lightning_cl.core.method import ContinualCallback
from lightning_cl.models.adapters import adapter_parameters, list_adapters, use_adapter, using_adapter
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["first", "second task", "third"]


def tasks(names=NAMES):
    return [Task(name, Sentences(i), val=Sentences(i, 4)) for i, name in enumerate(names)]


def data(names=NAMES, **settings):
    return TaskDataModule(tasks(names), batch_size=4, seed=0, **settings)


def run(root, module=None, names=NAMES, more=(), ckpt_path=None, method=None, **settings):
    L.seed_everything(5, verbose=False)
    module = SomebodysAdapter() if module is None else module
    callbacks = [method or TaskAdapters(), TaskMatrix(), *more]
    fit_tasks(trainer(root, callbacks, **{"max_epochs": 1} | settings), module, data(names), ckpt_path)
    return module, callbacks


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one, other, why=None):
    assert one.keys() == other.keys(), why
    assert [name for name in one if not torch.equal(one[name], other[name])] == [], why


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(path)
    return path


# ---------------------------------------------------------------------- what it promises


@pytest.mark.parametrize(("init", "unseen"), [("fresh", "latest"), ("previous", "base")])
def test_what_a_task_computes_stays_to_the_last_bit(tmp_path, init, unseen):
    module, (method, matrix) = run(tmp_path, method=TaskAdapters(init=init, unseen=unseen), max_epochs=3)
    found = matrix.matrix
    for column, name in enumerate(NAMES):
        assert (found[column + 1 :, column] == found[-1, column]).all()
        assert found[-1, column] < found[0, column] - 0.05  # it has learnt
        # Before that it gets the base, or the latest adapter.
        for row in range(column + 1):
            used = NAMES[row - 1] if row and unseen == "latest" else None
            with using_adapter(module, used), torch.no_grad():
                loss = module.eval().inner["model"](**Sentences(column, 4).batch()).loss
            assert float(found[row, column]) == pytest.approx(float(loss), rel=1e-6)
        assert method.parameters[name] == sum(p.numel() for p in adapter_parameters(module, name).values())
    assert matrix.summary()["forgetting"] == 0
    base = {n: p for n, p in SomebodysAdapter().named_parameters() if "lora_" not in n}
    assert_equal(base, {n: p for n, p in module.named_parameters() if "lora_" not in n})
    # As it is left: the adapters of all tasks, the last one in use, nothing else trainable.
    assert list_adapters(module) == NAMES
    assert module.inner["model"].active_adapters == ["task-third"]
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(adapter_parameters(module, "third"))


def test_only_the_second_factor_trains_and_the_seed_draws_the_first(tmp_path):
    found = []
    for seed, own in ((5, None), (6, None), (6, 1), (7, 1)):
        module = SomebodysAdapter()
        L.seed_everything(seed, verbose=False)
        method = TaskAdapters(train="B", rank=2, seed=own)
        fit_tasks(trainer(tmp_path, [method], max_steps=1), module, data(NAMES[:1]))
        found.append(adapter_parameters(module, "first"))
        assert {n for n, p in module.named_parameters() if p.requires_grad} == {n for n in found[0] if "lora_B" in n}
        assert all(p.shape[0] == 2 and bool(p.any()) for n, p in found[-1].items() if "lora_A" in n)
        assert all(p.shape[1] == 2 and bool(p.any()) for n, p in found[-1].items() if "lora_B" in n)
    first = [n for n in found[0] if "lora_A" in n]
    assert not any(torch.equal(found[0][n], found[1][n]) for n in first)
    assert all(torch.equal(found[2][n], found[3][n]) for n in first)


# ---------------------------------------------------------------------- stopped, resumed, added, loaded


class Stops(ContinualCallback):
    """Breaks when the second task begins, or when it ends."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def on_task_start(self, trainer, pl_module):
        if self.where == "start" and self.task.index == 1:
            raise RuntimeError("stopped")

    def on_task_end(self, trainer, pl_module):
        if self.where == "end" and self.task.index == 1:
            raise RuntimeError("stopped")


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def go(root, ckpt_path=None, module=None):
        saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        method = TaskAdapters(init="mean", router="embedding")
        return run(root, module, NAMES[:2], [saver, KLToBase(samples=2)], ckpt_path, method)

    whole, (method, matrix, *_) = go(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 4
    for number, path in enumerate(checkpoints):
        # Also in a module that has been trained further already.
        module = whole if number % 3 == 2 else None
        expected = state(whole)
        again, (other, row, *_) = go(tmp_path / f"again-{number}", path, module)
        assert_equal(expected, state(again), path)
        assert torch.equal(matrix.matrix, row.matrix), path
        assert method.report() == other.report(), path


@pytest.mark.parametrize("where", ["start", "end"])
def test_stopped_where_a_task_begins_or_ends(tmp_path, where):
    whole, _ = run(tmp_path / "whole", names=NAMES[:2])
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, names=NAMES[:2], more=[Stops(where), OnExceptionCheckpoint(tmp_path, "stopped")])
    path = tmp_path / "stopped.ckpt"
    resumed, (_, matrix, *_) = run(tmp_path / "again", names=NAMES[:2], more=[Stops(None)], ckpt_path=path)
    assert_equal(state(whole), state(resumed))
    assert matrix.summary()["forgetting"] == 0


def test_a_task_is_added_to_a_run_that_is_done(tmp_path):
    names = NAMES[:2]
    whole, (_, matrix) = run(tmp_path / "whole", names=names, enable_checkpointing=True)
    run(tmp_path / "one", names=NAMES[:1], enable_checkpointing=True)
    path = next((tmp_path / "one").rglob("tasks/0-*.ckpt"))
    module, (_, more) = run(tmp_path / "more", names=names, ckpt_path=path)
    assert_equal(state(whole), state(module))
    assert torch.equal(matrix.matrix[1:], more.matrix[1:])
    # Nothing is left to train: the module is as the run left it.
    path = next((tmp_path / "whole").rglob("tasks/1-*.ckpt"))
    module, _ = run(tmp_path / "none", names=names, ckpt_path=path)
    assert_equal(state(whole), state(module))
    assert module.inner["model"].active_adapters == ["task-second-20-task"]


def test_every_boundary_checkpoint_gives_its_row_in_a_fresh_process(tmp_path, folder):
    def fresh():
        return CausalLM(folder, torch.optim.AdamW, schedule=None, lora={"r": 4})

    whole, (_, matrix) = run(tmp_path, fresh(), enable_checkpointing=True)
    again = fresh()  # and once more in a module that has other adapters than the checkpoint
    for row in (3, 1):
        path = next(tmp_path.rglob(f"tasks/{row - 1}-*.ckpt"))
        saved = read_checkpoint(path)["state_dict"]
        assert saved
        assert all("lora_" in name for name in saved)  # the base is not in it, the old adapters are
        assert {name for name in saved if "default" in name.split(".")} == set()
        for module in (fresh(), again):
            found = evaluate_tasks(trainer(tmp_path / "other", [TaskAdapters()]), module, data(), ckpt_path=path)
            assert [found[name]["val_loss"] for name in NAMES] == pytest.approx(matrix.matrix[row].tolist(), abs=0)
            assert list_adapters(module) == NAMES[:row]
    assert list_adapters(whole) == NAMES


def test_saved_folders_load_with_peft_alone(tmp_path, folder):
    module, _ = run(tmp_path, CausalLM(folder, torch.optim.AdamW, schedule=None, lora={"r": 4}))
    module.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"first", "second_task", "third"}
    found = []
    for place, name in zip(("first", "second_task", "third"), NAMES, strict=True):
        module.use_task(name)
        found.append(logits(module.lm))
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model" / place)), found[-1])
    assert not torch.equal(found[0], found[1])


def test_around_a_base_in_four_bits(tmp_path, folder):
    pytest.importorskip("bitsandbytes")
    settings = {"lora": {"r": 4}, "quantization": "nf4", "dtype": "float32"}
    module = CausalLM(folder, lambda p: torch.optim.AdamW(p, lr=1e-2), schedule=None, **settings)
    _, (_, matrix) = run(tmp_path, module, NAMES[:2], max_epochs=2, enable_checkpointing=True)
    assert matrix.matrix[1, 0] == matrix.matrix[2, 0] < matrix.matrix[0, 0]
    fresh = CausalLM(folder, torch.optim.AdamW, schedule=None, **settings)
    path = next(tmp_path.rglob("tasks/1-*.ckpt"))
    found = evaluate_tasks(trainer(tmp_path, [TaskAdapters()]), fresh, data(NAMES[:2]), ckpt_path=path)
    assert [found[name]["val_loss"] for name in NAMES[:2]] == pytest.approx(matrix.matrix[2].tolist(), abs=0)


def test_plain_fits_are_tasks_in_sequence(tmp_path):
    method, module = TaskAdapters(), SomebodysAdapter()
    for number in range(2):
        loader = torch.utils.data.DataLoader(Sentences(number), 4)
        trainer(tmp_path, [method], max_steps=2).fit(module, loader)
    assert list_adapters(module) == ["task-0", "task-1"]


# ---------------------------------------------------------------------- with others


def test_the_order_of_the_callbacks_changes_no_bit(tmp_path):
    found = []
    for name, order in (("before", 1), ("after", -1)):
        L.seed_everything(5, verbose=False)
        module, matrix = SomebodysAdapter(), TaskMatrix()
        general = GeneralReplay(Sentences(7), ratio=0.25)
        callbacks = [TaskAdapters(), KLToBase(samples=2), general, matrix][::order]
        fit_tasks(trainer(tmp_path / name, callbacks, max_epochs=1), module, data(NAMES[:2]))
        found.append((state(module), matrix.matrix))
    assert_equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: EWC(1.0), r"EWC with TaskAdapters: each task trains an adapter of its own"),
        (lambda: LwF(1.0), r"LwF with TaskAdapters: an earlier task's outputs come from its own adapter"),
        (lambda: Replay(8, 0.3), r"Replay with TaskAdapters: samples of earlier tasks would train the new"),
        (lambda: SelfReplay(), r"SelfReplay with TaskAdapters: samples of earlier tasks"),
        (TaskAdapters, r"TaskAdapters and TaskAdapters-2 both want the trainable parameters"),
    ],
)
def test_methods_that_it_leaves_nothing_to_hold(tmp_path, other, words):
    with pytest.raises(MisconfigurationException, match=words):
        run(tmp_path, more=[other()])


@pytest.mark.parametrize("name", ["all", "mean", "base"])
def test_names_that_mean_something_else(tmp_path, name):
    module = SomebodysAdapter()
    before = state(module)
    with pytest.raises(MisconfigurationException, match=f"task '{name}'"):
        run(tmp_path, module, ["first", name])
    assert_equal(before, state(module))


def test_a_module_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"Classifier: it contains no model with peft adapters.*CausalLM\(lora="):
        fit_tasks(trainer(tmp_path, [TaskAdapters()], max_steps=1), Classifier(), data())


def test_a_module_with_the_adapters_of_another_run(tmp_path):
    module, _ = run(tmp_path, names=NAMES[:2])
    with pytest.raises(MisconfigurationException, match=r"adapters of \['second task'\] already.*new module"):
        run(tmp_path / "again", module)


def test_a_part_outside_of_the_adapters_is_frozen_with_a_warning(tmp_path):
    module = SomebodysAdapter()
    module.head, module.norm = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False)
    frozen, counting = r"'head.weight' \(and 1 more\) is outside of the adapters", "'norm' keeps running statistics"
    with pytest.warns(UserWarning, match=frozen), pytest.warns(UserWarning, match=counting):
        run(tmp_path, module, NAMES[:1])
    assert not module.head.weight.requires_grad


def test_it_advises_and_reports(tmp_path):
    module, (method, _) = run(tmp_path, names=NAMES[:1], method=TaskAdapters(rank=2))
    count = method.parameters["first"]
    assert method.report()["sentences"] == [
        f"TaskAdapters, first: an adapter of {count:,} parameters, {count * 4 / 1e6:.3g} MB"
    ]
    assert method.state_bytes() == 4 * count
    assert method.advice("learn") == "a higher rank, 2 now, in TaskAdapters(rank=…), or init='previous'"
    assert method.advice("keep") is None
    use_adapter(module, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rank": 0}, "rank=0"), ({"init": "last"}, "init='last'"), ({"unseen": 1}, "unseen=1"), ({"train": "A"}, "='A'")],
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        TaskAdapters(**settings)
