"""KLToBase against closed forms, LoRA against full tuning, and that training does not notice it."""

from __future__ import annotations

import copy
import csv
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from toys import TINY_LLAMA, Classifier, classification, trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_cl import CausalLM, KLToBase, Replay, Task, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.core.checks import named
from lightning_cl.data.stream import StreamLoader
from lightning_cl.evaluation import build_report, format_report
from lightning_cl.passes.starting_weights import StartingWeights
from lightning_cl.passes.task_samples import single_samples

VOCABULARY = 12
pytestmark = pytest.mark.filterwarnings("ignore")


class Sequences(Dataset):
    """Random tokens; the longer the prompt, the fewer of them bear loss."""

    def __init__(self, seed, count=12, length=9):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (count, length), generator=generator)
        self.labels = self.ids.clone()
        for row, labels in enumerate(self.labels):
            labels[: row % (length - 1)] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Tables(torch.nn.Module):
    """A softmax that is linear in its weights: the logits of the next token are a row of a table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table(input_ids))


class Bigram(L.LightningModule):
    def __init__(self, lr=20.0):
        super().__init__()
        self.model, self.lr = Tables(), lr

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["input_ids"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Tuned(L.LightningModule):
    """A Llama with dropout; with a rank, an adapter on it. Weights come from a seed."""

    def __init__(self, rank=None, lr=0.01, dropout=0.2):
        super().__init__()
        torch.manual_seed(5)
        model = LlamaForCausalLM(
            LlamaConfig(**TINY_LLAMA, vocab_size=VOCABULARY, initializer_range=0.2, attention_dropout=dropout)
        )
        if rank is not None:
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def tasks(names="ab", val=True):
    return TaskDataModule(
        [Task(name, Sequences(i), val=Sequences(10 + i) if val else None) for i, name in enumerate(names)],
        batch_size=4,
    )


def fit(root, module, callbacks, data=None, ckpt_path=None, **settings):
    L.seed_everything(3, verbose=False)
    runner = trainer(root, callbacks, **{"max_epochs": 1} | settings)
    fit_tasks(runner, module, data if data is not None else tasks(), ckpt_path)
    return module


def by_hand(before, now, sequences):
    """The mean over loss positions of KL(before ‖ now), from the tables, one position at a time."""
    total, count = 0.0, 0
    for ids, labels in zip(sequences.ids, sequences.labels, strict=True):
        for token, label in zip(ids[:-1], labels[1:], strict=True):
            if label != -100:
                p, q = before[token].double().softmax(0), now[token].double().softmax(0)
                total, count = total + float((p * (p / q).log()).sum()), count + 1
    return total / count


class TablesOverTime(Callback):
    """The table when each task ends."""

    def __init__(self):
        self.seen = []

    def on_train_end(self, trainer, pl_module):
        self.seen.append(pl_module.model.table.weight.detach().clone())


# ---------------------------------------------------------------------- the number


@pytest.mark.parametrize("val", [True, False], ids=["validation data", "training data"])
def test_closed_form_of_a_linear_softmax_model(tmp_path, val):
    probe, tables, module = KLToBase(), TablesOverTime(), Bigram()
    before = module.model.table.weight.detach().clone()
    fit(tmp_path, module, [probe, tables], tasks(val=val))
    data = [Sequences((10 if val else 0) + i) for i in range(2)]
    expected = [by_hand(before, now, sequences) for now, sequences in zip(tables.seen, data, strict=True)]
    assert list(probe.kl) == ["a", "b"]
    assert list(probe.kl.values()) == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.01


def test_as_many_sequences_as_asked_for_chosen_by_the_seed(tmp_path):
    probe, module = KLToBase(samples=5, seed=2), Bigram()
    before = module.model.table.weight.detach().clone()
    fit(tmp_path, module, [probe], tasks("a"))
    data = Sequences(10)
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(2))[:5]
    data.ids, data.labels = data.ids[chosen], data.labels[chosen]
    assert probe.kl["a"] == pytest.approx(by_hand(before, module.model.table.weight.detach(), data), rel=1e-5)


def test_a_classifier_is_compared_with_its_running_statistics_of_then(tmp_path):
    module = Classifier(dropout=0.3, batch_norm=True)
    before = copy.deepcopy(module).eval()
    probe = KLToBase(outputs=lambda module, batch: module(batch[0]))
    data = classification(0)
    fit(tmp_path, module, [probe], {"a": data})
    module.eval()
    x = data.tensors[0]
    p, q = before(x).double().log_softmax(1), module(x).double().log_softmax(1)
    assert probe.kl["a"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean().detach()), rel=1e-4)
    assert "nats per sample" in probe.report()["sentences"][0]


def test_full_tuning_and_lora_of_the_same_weights_are_equally_far(tmp_path):
    lora, full = KLToBase(), KLToBase()
    adapted = fit(tmp_path / "1", Tuned(rank=2, lr=0.1), [lora], tasks("a"))
    merged = copy.deepcopy(adapted.model).merge_and_unload().state_dict()

    class Load(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.model.load_state_dict(merged)

    fit(tmp_path / "2", Tuned(lr=0.0), [full, Load()], tasks("a"))
    assert lora.kl["a"] > 0.01
    assert full.kl["a"] == pytest.approx(lora.kl["a"], rel=1e-3)
    assert lora.base.copies == {}
    assert lora.base.switches_off
    assert lora.state_bytes() == 0
    assert full.state_bytes() == sum(p.numel() * 4 for p in Tuned().parameters())


def test_an_adapter_that_is_trained_already_is_part_of_the_base(tmp_path):
    module = Tuned(rank=2, lr=0.0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    probe = KLToBase()
    fit(tmp_path, module, [probe], tasks("a"))
    assert probe.kl["a"] == 0.0
    assert sorted(probe.base.copies) == sorted(n for n, p in module.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [lambda: Bigram(0.0), lambda: Tuned(lr=0.0), lambda: Tuned(2, 0.0)])
def test_what_is_not_trained_has_not_moved(tmp_path, make):
    probe = KLToBase()
    fit(tmp_path, make(), [probe])
    assert probe.kl == {"a": 0.0, "b": 0.0}


def test_bfloat16_training_measures_in_its_own_precision(tmp_path):
    one, other = KLToBase(), KLToBase()
    fit(tmp_path / "1", Tuned(dropout=0.0), [one], tasks("a"))
    fit(tmp_path / "2", Tuned(dropout=0.0), [other], tasks("a"), precision="bf16-mixed")
    assert other.kl["a"] == pytest.approx(one.kl["a"], rel=0.1)


def test_a_plain_fit_is_one_task_on_its_training_data(tmp_path):
    probe, module = KLToBase(), Bigram()
    before = module.model.table.weight.detach().clone()
    trainer(tmp_path, [probe], max_epochs=1).fit(module, DataLoader(Sequences(0), 4))
    assert probe.kl["task-0"] == pytest.approx(
        by_hand(before, module.model.table.weight.detach(), Sequences(0)), rel=1e-5
    )


def test_causal_lm_and_text(tmp_path):
    texts = {"a": [f"the cat {i} sleeps" for i in range(20)], "b": [f"def f(x): return {i}" for i in range(20)]}
    data = TaskDataModule(texts, tokenizer=TrainedBPE(270, str(tmp_path / "cache")), max_length=24, batch_size=4)
    module = CausalLM(TINY_LLAMA, lambda p: torch.optim.AdamW(p, lr=0.01))
    probe = KLToBase()
    fit(tmp_path, module, [TaskMatrix(), probe], data)
    assert 0 < probe.kl["a"] < probe.kl["b"]


def first_numbers(loader, rank=0, ranks=1):
    """The sequences that a rank measures on."""
    runner = SimpleNamespace(
        global_rank=rank,
        world_size=ranks,
        progress_bar_callback=None,
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
        lightning_module=SimpleNamespace(_on_before_batch_transfer=lambda batch, dataloader_idx: batch),
        strategy=SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: batch),
    )
    return [tuple(batch["input_ids"][0].tolist()) for _, batch in single_samples(runner, 7, 0, "", loader)]


def test_ranks_share_the_samples_that_one_process_takes():
    loader = DataLoader(Sequences(0), 4)
    whole, parts = first_numbers(loader), [first_numbers(loader, rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 3]
    assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_the_first_samples_of_a_stream_are_not_counted_as_trained_on():
    data = Sequences(0)
    loader = StreamLoader(lambda epoch: iter([data[i] for i in range(12)]), 4, torch.utils.data.default_collate)
    trained = iter(loader)
    next(trained)
    state = repr(loader.position())
    assert first_numbers(loader) == [tuple(ids.tolist()) for ids in data.ids[:7]]
    assert repr(loader.position()) == state
    assert torch.equal(next(trained)["input_ids"], data.ids[4:8])


# ---------------------------------------------------------------------- where it is told


def test_loggers_and_report_get_the_numbers(tmp_path):
    probe, matrix = KLToBase(), TaskMatrix()
    logger = CSVLogger(tmp_path, name="", version="")
    data = TaskDataModule([Task("a", Sequences(0), val=Sequences(1)), Task("b", Sequences(2))], batch_size=4)
    fit(tmp_path, Bigram(), [probe, matrix], data, logger=logger)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, step in (("a", "3"), ("b", "6")):
        logged = [
            (row["step"], float(row[f"continual/kl_to_base/{name}"]))
            for row in rows
            if row[f"continual/kl_to_base/{name}"]
        ]
        assert logged == [(step, pytest.approx(probe.kl[name]))]
    cost = {"steps": 3, "train_seconds": 1.0, "end_seconds": 1.0}
    text = format_report(build_report(matrix, [cost, cost], named([probe, matrix])), None)
    assert (
        f"  a: {probe.kl['a']:.3g} nats per token from the model before training (KL, on its validation data)\n" in text
    )
    assert (
        f"  b: {probe.kl['b']:.3g} nats per token from the model before training (KL, on its training data)\n" in text
    )


def test_methods_that_tell_nothing_leave_the_report_as_it_was(tmp_path):
    matrix = TaskMatrix()
    fit(tmp_path, Bigram(), [matrix], tasks("a"))
    cost = {"steps": 3, "train_seconds": 1.0, "end_seconds": 1.0}
    silent, without = (
        format_report(build_report(matrix, [cost], named(methods)), None) for methods in ([matrix, Replay()], [matrix])
    )
    assert silent == without


# ---------------------------------------------------------------------- training does not notice


def hard(root, *probes):
    module = Classifier(dropout=0.3, batch_norm=True, lr=0.01, optimizer=torch.optim.AdamW)
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("ab")}, batch_size=8)
    return fit(root, module, [Replay(20, 0.3), *probes], data, max_epochs=2)


@pytest.mark.parametrize("kind", ["classifier", "full", "lora"])
def test_training_is_the_same_bit_for_bit_with_and_without_it(tmp_path, kind):
    def run(root, *probes):
        L.seed_everything(0, verbose=False)
        if kind == "classifier":
            return hard(root, *probes)
        return fit(root, Tuned(2 if kind == "lora" else None), probes, accumulate_grad_batches=2, max_epochs=2)

    outputs = (lambda module, batch: module(batch[0])) if kind == "classifier" else None
    plain = run(tmp_path / "1").state_dict()
    probed = run(tmp_path / "2", KLToBase(outputs=outputs)).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in probed.items())


def test_frozen_adapters_and_parts_in_evaluation_mode_stay_so(tmp_path):
    module = Tuned(rank=2)
    frozen = "layers.0.self_attn.q_proj.lora_A"
    for name, parameter in module.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    module.model.base_model.model.model.layers[0].eval()
    looks = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes = [part.training for part in pl_module.modules()]
            looks.append((modes, [p.requires_grad for p in pl_module.parameters()]))

    fit(tmp_path, module, [KLToBase(), Look()])
    assert len(looks) == 6
    assert all(look == looks[0] for look in looks)
    assert not all(looks[0][0])


@pytest.mark.parametrize("rank", [None, 2])
def test_weights_are_back_bit_for_bit_after_an_exception_inside(rank):
    module = Tuned(rank)
    start = StartingWeights(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    frozen = next(p for p in module.parameters() if p.requires_grad).requires_grad_(False)
    now = {name: (value.clone(), value.data_ptr()) for name, value in module.state_dict().items()}
    batch = {"input_ids": Sequences(0).ids[:1]}
    module.eval()
    moved, logits = module.model(**batch).logits, Tuned(rank).eval().model(**batch).logits
    context = start.bring_to(module)

    def fail_inside():
        with context():
            torch.testing.assert_close(module.model(**batch).logits, logits)  # it is the start
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == {
        n: p for n, (_, p) in now.items()
    }
    assert all(torch.equal(value, now[name][0]) for name, value in module.state_dict().items())
    assert torch.equal(module.model(**batch).logits, moved)
    assert not frozen.requires_grad


def test_what_a_pass_writes_into_a_buffer_stays_out_of_the_copy():
    module = Classifier(batch_norm=True)
    start = StartingWeights(module)
    context = start.bring_to(module)
    with context():
        module.net[1].running_mean.add_(1)
    assert torch.equal(start.copies["net.1.running_mean"], torch.zeros(16))
    assert torch.equal(module.net[1].running_mean, torch.zeros(16))


def test_an_exception_in_a_run_leaves_the_trained_weights(tmp_path):
    calls, before, module = [], {}, Bigram()

    def outputs(module, batch):
        calls.append(batch)
        if len(calls) == 4:  # before training, base and now of the first sequence, base of the second
            raise ZeroDivisionError
        return module.model(batch["input_ids"]).logits

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            before.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, [KLToBase(outputs=outputs), Keep()], tasks("a"))
    assert len(calls) == 4
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


# ---------------------------------------------------------------------- resume


def resumable(root, names="ab", ckpt_path=None, rank=None):
    probe = KLToBase(samples=6)
    checkpoint = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
    module = fit(root, Tuned(rank), [probe, checkpoint], tasks(names), ckpt_path, max_epochs=2)
    return module, probe


@pytest.mark.parametrize("rank", [None, 2])
def test_resume_from_every_checkpoint_equals_never_stopped(tmp_path, rank):
    reference, expected = resumable(tmp_path / "0", rank=rank)
    checkpoints = sorted((tmp_path / "0").rglob("*.ckpt"))
    assert len(checkpoints) == 8
    for number, path in enumerate(checkpoints):
        torch.load(path, weights_only=True)
        module, probe = resumable(tmp_path / f"r{number}", ckpt_path=path, rank=rank)
        assert probe.kl == expected.kl, path
        assert probe.report() == expected.report()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), reference.parameters(), strict=True))


def test_a_task_that_is_added_later_is_compared_with_the_first_base(tmp_path):
    _, whole = resumable(tmp_path / "whole", "abc")
    resumable(tmp_path / "1", "ab")
    _, added = resumable(tmp_path / "2", "abc", tmp_path / "1" / "tasks" / "1-b.ckpt")
    assert added.kl == whole.kl
    assert list(added.kl) == ["a", "b", "c"]


def test_a_new_sequence_has_a_new_base(tmp_path):
    probe, module = KLToBase(), Bigram()
    fit(tmp_path / "1", module, [probe])
    before = module.model.table.weight.detach().clone()
    fit(tmp_path / "2", module, [probe], tasks("c"))
    assert list(probe.kl) == ["c"]
    assert torch.equal(probe.base.copies["model.table.weight"], before)


# ---------------------------------------------------------------------- what changes on the way


def test_what_is_frozen_until_a_later_task_counts_from_its_own_start():
    module = Tuned()
    head, *others = module.parameters()
    for parameter in others:
        parameter.requires_grad_(False)
    start = StartingWeights(module)
    assert len(start.copies) == 1
    with torch.no_grad():
        head.add_(1)
    others[0].requires_grad_(True)
    start.add_trainable(module)
    assert len(start.copies) == 2
    assert torch.equal(next(iter(start.copies.values())), next(Tuned().parameters()))


def test_a_parameter_that_has_grown_is_an_error_that_names_it():
    module = Bigram()
    start = StartingWeights(module)
    module.model.table = torch.nn.Embedding(VOCABULARY + 1, VOCABULARY)
    with pytest.raises(MisconfigurationException, match=r"'model.table.weight' had the shape \[12, 12\].*\[13, 12\]"):
        start.find_in(module)
    del module.model.table
    with pytest.raises(MisconfigurationException, match=r"'model.table.weight'.*is gone"):
        start.find_in(module)


# ---------------------------------------------------------------------- refusals


class Steps(Callback):
    def __init__(self):
        self.count = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.count += 1


def test_logits_that_cannot_be_reached_are_an_error_before_training(tmp_path):
    steps = Steps()
    with pytest.raises(MisconfigurationException, match=r"Classifier.*KLToBase\(outputs="):
        fit(tmp_path, Classifier(), [KLToBase(), steps], {"a": classification(0)})
    assert steps.count == 0


def test_sharded_parameters_are_refused():
    runner = SimpleNamespace(callbacks=[], strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"sharded by ModelParallelStrategy.*ddp"):
        KLToBase().setup(runner, Bigram(), "fit")


def test_a_dictionary_of_loaders_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"KLToBase.*'a' is a dict of loaders"):
        KLToBase().check_loader({"x": DataLoader(Sequences(0))}, "a")


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"samples": 1.5}, {"samples": True}, {"seed": "x"}])
def test_arguments_out_of_range_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        KLToBase(**arguments)


class SpoiltTables(Tables):
    """In evaluation mode sequences that begin with a small token have no logits."""

    def forward(self, input_ids):
        logits = super().forward(input_ids).logits
        bad = (input_ids[:, :1] < 3)[..., None]
        return SimpleNamespace(logits=logits if self.training else logits.masked_fill(bad, torch.nan))


def test_samples_without_a_divergence_are_left_out_and_counted(tmp_path):
    spoilt, module = KLToBase(), Bigram()
    module.model, start = SpoiltTables(), Tables()
    module.model.load_state_dict(start.state_dict())
    data = tasks("a")
    kept = [i for i in range(12) if int(Sequences(10)[i]["input_ids"][0]) >= 3]
    assert 0 < len(kept) < 12
    with pytest.warns(UserWarning, match=rf"KLToBase: .*'a'.*{12 - len(kept)} samples are left out"):
        fit(tmp_path, module, [spoilt], data)
    plain, other = KLToBase(), Bigram()
    other.model = start
    only = TaskDataModule([Task("a", Sequences(0), val=torch.utils.data.Subset(Sequences(10), kept))], batch_size=4)
    fit(tmp_path, other, [plain], only)
    assert spoilt.kl["a"] == pytest.approx(plain.kl["a"], rel=1e-4)
    assert f"{12 - len(kept)} samples are left out" in spoilt.report()["sentences"][0]
