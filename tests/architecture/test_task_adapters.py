"""One adapter for each task: old tasks stay to the last bit, whatever is stopped, resumed, added or loaded."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import VOCABULARY, base_model, logits, peft_model
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


class SomebodysAdapter(L.LightningModule):
    """A third-party module with a PeftModel in it; it knows nothing of this library."""

    def __init__(self, dropout=0.1, lr=1e-2, **lora):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"model": peft_model(lora_dropout=dropout, **lora)})
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.inner["model"](**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner["model"](**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Sentences(torch.utils.data.Dataset):
    """Rows whose next token follows a rule of the task."""

    def __init__(self, seed, count=12, length=8):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCABULARY, (count, 1), generator=generator)
        self.rows = (start + torch.arange(length) * (2 * seed + 1)) % VOCABULARY

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


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


@pytest.mark.parametrize("init", ["fresh", "previous", "mean"])
def test_what_a_task_computes_stays_to_the_last_bit(tmp_path, init):
    module, (method, matrix) = run(tmp_path, method=TaskAdapters(init=init), max_epochs=3)
    for column in range(3):
        later = matrix.matrix[column + 1 :, column]
        assert (later == later[0]).all()
        assert later[0] < matrix.matrix[0, column] - 0.05  # it has learnt
    assert matrix.summary()["forgetting"] == 0
    base = {n: p for n, p in SomebodysAdapter().named_parameters() if "lora_" not in n}
    assert_equal(base, {n: p for n, p in module.named_parameters() if "lora_" not in n})
    assert list_adapters(module) == NAMES
    assert method.parameters == {
        name: sum(p.numel() for p in adapter_parameters(module, name).values()) for name in NAMES
    }
    # As it is left: the last task's adapter in use, nothing else trainable.
    assert module.inner["model"].active_adapters == ["task-third"]
    used = {n for n, p in module.named_parameters() if p.requires_grad}
    assert used == set(adapter_parameters(module, "third"))


def test_a_task_alone_gets_what_it_gets_after_others(tmp_path):
    """Fresh adapters: the second task learns from the base, as if there had been no first."""
    module, (_, matrix) = run(tmp_path, SomebodysAdapter(dropout=0.0), ["first", "third"])
    L.seed_everything(5, verbose=False)
    alone, row = SomebodysAdapter(dropout=0.0), TaskMatrix()
    fit_tasks(
        trainer(tmp_path / "alone", [TaskAdapters(), row], max_epochs=1),
        alone,
        TaskDataModule([Task("third", Sentences(1), val=Sentences(1, 4))], batch_size=4, seed=0),
    )
    ours, theirs = (list(adapter_parameters(m, "third").values()) for m in (module, alone))
    # The order of the samples differs with the place of the task; where it starts does not.
    assert matrix.matrix[0, 1] == row.matrix[0, 0]
    assert [p.shape for p in ours] == [p.shape for p in theirs]


@pytest.mark.parametrize("unseen", ["latest", "base"])
def test_tasks_that_are_not_trained_yet(tmp_path, unseen):
    module, (_, matrix) = run(tmp_path, method=TaskAdapters(unseen=unseen))
    found = matrix.matrix
    for row in range(4):
        for column in range(row, 3):
            used = NAMES[row - 1] if row and unseen == "latest" else None
            with using_adapter(module, used), torch.no_grad():
                (loss,) = (module.eval().inner["model"](**batch).loss for batch in data_of(column))
            assert float(found[row, column]) == pytest.approx(float(loss), rel=1e-6)


def data_of(column):
    rows = Sentences(column, 4)
    yield {key: torch.stack([rows[i][key] for i in range(4)]) for key in rows[0]}


def test_only_the_second_factor_trains(tmp_path):
    module, _ = run(tmp_path, method=TaskAdapters(train="B", rank=2, seed=3), names=NAMES[:2])
    fresh, _ = run(tmp_path / "other", method=TaskAdapters(train="B", rank=2, seed=3), names=NAMES[:2], max_steps=1)
    for name in NAMES[:2]:
        ours, theirs = adapter_parameters(module, name), adapter_parameters(fresh, name)
        assert all(torch.equal(ours[n], theirs[n]) == ("lora_A" in n) for n in ours)
        assert all(p.shape[0 if "lora_A" in n else 1] == 2 for n, p in ours.items())


def test_the_seed_of_the_run_draws_other_adapters(tmp_path):
    found = []
    for seed, method in (
        (5, TaskAdapters()),
        (6, TaskAdapters()),
        (6, TaskAdapters(seed=1)),
        (7, TaskAdapters(seed=1)),
    ):
        L.seed_everything(seed, verbose=False)
        module = SomebodysAdapter(lr=0.0)
        fit_tasks(trainer(tmp_path, [method], max_steps=1), module, data(NAMES[:1]))
        found.append(next(p for n, p in adapter_parameters(module, "first").items() if "lora_A" in n))
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


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


@pytest.mark.parametrize("init", ["fresh", "mean"])
def test_resumed_anywhere_equals_never_stopped(tmp_path, init):
    def go(root, ckpt_path=None, module=None):
        saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        return run(root, module, more=[saver, KLToBase(samples=2)], ckpt_path=ckpt_path, method=TaskAdapters(init=init))

    whole, (method, matrix, *_) = go(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 6
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
    whole, _ = run(tmp_path / "whole", more=[Stops(None)])
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path, more=[Stops(where), OnExceptionCheckpoint(tmp_path, "stopped")], enable_checkpointing=True)
    resumed, (_, matrix, *_) = run(tmp_path / "again", more=[Stops(None)], ckpt_path=tmp_path / "stopped.ckpt")
    assert_equal(state(whole), state(resumed))
    assert matrix.summary()["forgetting"] == 0


def test_a_task_is_added_to_a_run_that_is_done(tmp_path):
    whole, (_, matrix) = run(tmp_path / "whole", enable_checkpointing=True)
    run(tmp_path / "two", names=NAMES[:2], enable_checkpointing=True)
    module, (_, more) = run(tmp_path / "more", ckpt_path=next((tmp_path / "two").rglob("tasks/1-*.ckpt")))
    assert_equal(state(whole), state(module))
    assert torch.equal(matrix.matrix[1:, :2], more.matrix[1:, :2])
    # Nothing is left to train: the module is as the run left it.
    module, _ = run(tmp_path / "none", ckpt_path=next((tmp_path / "whole").rglob("tasks/2-*.ckpt")))
    assert_equal(state(whole), state(module))
    assert module.inner["model"].active_adapters == ["task-third"]


def test_every_boundary_checkpoint_gives_its_row_in_a_fresh_process(tmp_path, folder):
    def fresh():
        return CausalLM(folder, torch.optim.AdamW, schedule=None, lora={"r": 4})

    whole, (_, matrix) = run(tmp_path, fresh(), enable_checkpointing=True)
    again = fresh()  # and once more in a module that has other adapters than the checkpoint
    for row in (3, 1, 2):
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
        fit_tasks(trainer(tmp_path / name, callbacks, max_epochs=1), module, data())
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
    module.head = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"'head.weight' \(and 1 more\) is outside of the adapters"):
        run(tmp_path, module, NAMES[:1])
    assert not module.head.weight.requires_grad


def test_it_advises_and_reports(tmp_path):
    module, (method, _) = run(tmp_path, names=NAMES[:1], method=TaskAdapters(rank=2))
    count = method.parameters["first"]
    assert method.report()["sentences"] == [f"TaskAdapters, first: an adapter of {count:,} parameters, 0.00486 MB"]
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
