"""DER and DER++ against plain torch: every step of a run, what is stored, and what must not matter."""

from __future__ import annotations

import copy
import csv
import re

import datasets
import lightning as L
import pytest
import torch
from distilling import LM_TASKS, Recorder, loaded
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import (
    Ends,
    Growing,
    Sequences,
    SomebodysLM,
    adamw,
    assert_same,
    fit,
    logits_of,
    plain_fit,
    seeded,
    weights,
)
from torch.nn import functional as F
from toys import TINY_LLAMA, Classifier, classification, trainer
from transformers import PreTrainedTokenizerFast

from lightning_cl import DER, EWC, CausalLM, DERpp, Replay, TaskDataModule, TrainedBPE, fit_tasks
from lightning_cl.callbacks.replay.dark_logits import _joined
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.functional import dark_loss, top_logits

TASKS = {name: classification(seed, 40) for seed, name in enumerate("abc", 1)}
pytestmark = pytest.mark.filterwarnings("ignore")


def name_of(value):
    """A parameter's name without addresses: processes that share the tests must call them alike."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


# ---------------------------------------------------------------------- the reference: plain torch, one row at a time


def kept(z, k):
    """What is stored of a position's logits: the k largest, and all others as one, centred, in half precision."""
    order = sorted(range(len(z)), key=lambda i: -float(z[i]))[:k]
    top = with_others(z, order)
    return order, (top - top.mean()).half().float()


def with_others(z, order):
    rest = sorted(set(range(len(z))) - set(order))
    return torch.cat([z[order], z[rest].exp().sum().log()[None]]) if rest else z[order]


def distance(z, teacher, k):
    """Of one position."""
    order, v = kept(teacher, k)
    d = with_others(z, order) - v
    return ((d - d.mean()) ** 2).mean()


class Reference:
    """A loop over the batches that a run has seen, with its own weights, its own teachers and its own loss.

    Args:
        module: at its start.
        tasks: name to samples.
        key_of: gives what tells a row of a batch, or a sample, from any other.
        positions_of: logits and labels ``[positions, …]`` of a row, where there is loss.
    """

    def __init__(self, module, tasks, key_of, positions_of, alpha, k=64, labels=True):
        self.module, self.key_of, self.positions_of = module, key_of, positions_of
        self.alpha, self.k, self.labels = alpha, k, labels
        self.task_of = {key_of(sample): task for task, name in enumerate(tasks) for sample in tasks[name]}
        self.teachers, self.replayed = [], 0

    def loss(self, batch, rows, task):
        terms, count = 0.0, 0
        for row in rows(batch):
            origin = self.task_of[self.key_of(row)]
            z, labels = self.positions_of(self.module, row)
            count += len(labels)
            if origin == task or self.labels:
                terms = terms + F.cross_entropy(z, labels, reduction="sum")
            if origin != task and len(labels):
                with torch.no_grad():
                    stored, _ = self.positions_of(self.teachers[origin], row)
                terms = terms + self.alpha * sum(distance(a, b, self.k) for a, b in zip(z, stored, strict=True))
                self.replayed += 1
        return terms / count

    def run(self, steps, rows, optimizer_of):
        for task, batches in enumerate(steps):
            optimizer = optimizer_of(self.module.parameters(), lr=self.module.lr)
            for batch, _, _ in batches:
                optimizer.zero_grad()
                self.loss(batch, rows, task).backward()
                optimizer.step()
            self.teachers.append(copy.deepcopy(self.module).eval())
        return self.module


def classifier_reference(module, **settings):
    return Reference(
        module,
        TASKS,
        lambda row: tuple(row[0].tolist()),
        lambda m, row: (m(row[0][None]), row[1][None]),
        **settings,
    )


def classifier_rows(batch):
    return list(zip(*batch, strict=True))


def lm_reference(module, tasks, **settings):
    def positions(m, row):
        ids, labels = row["input_ids"][None], row["labels"][1:]
        z = m.model(input_ids=ids).logits[0, :-1]
        return z[labels != -100], labels[labels != -100]

    return Reference(module, tasks, lambda row: tuple(row["input_ids"].tolist()), positions, **settings)


def lm_rows(batch):
    return [{key: value[row] for key, value in batch.items()} for row in range(len(batch["input_ids"]))]


def run(root, method, module, tasks=TASKS, **settings):
    recorder = Recorder()
    fit(root, [method, recorder], module, tasks, **settings)
    module.trainer = None
    return module, recorder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DERpp, {"alpha": 2.0}),
        (DERpp, {"alpha": 0.7, "top_k": 2}),
        (DERpp, {"alpha": 2.0, "mode": "add", "policy": "task_balanced"}),
        (DER, {"alpha": 5.0}),
        (DER, {"alpha": 0.0}),
    ],
    ids=name_of,
)
def test_classifier_in_lockstep_with_a_plain_loop_over_three_tasks(tmp_path, kind, settings):
    method = kind(30, 0.4, outputs=logits_of, **settings)
    module, recorder = run(tmp_path, method, seeded(optimizer=adamw))
    options = {"alpha": settings["alpha"], "k": settings.get("top_k", 64), "labels": kind is DERpp}
    reference = classifier_reference(seeded(optimizer=adamw), **options)
    reference.run(recorder.steps, classifier_rows, adamw)
    assert reference.replayed > 60
    assert_same(weights(module), weights(reference.module), rtol=1e-3, atol=1e-4)
    # Nothing of it is a trifle.
    others = {"alpha": 1.0 if settings["alpha"] == 0 else 0.0}, {"labels": kind is DER}
    for other in others:
        wrong = classifier_reference(seeded(optimizer=adamw), **options | other)
        wrong.run(recorder.steps, classifier_rows, adamw)
        assert (wrong.module.net[4].weight - module.net[4].weight).abs().max() > 3e-3


def somebodys(**config):
    return seeded(lambda: SomebodysLM(lr=0.1, optimizer=torch.optim.SGD, **config))


LM_MODULES = {
    "tied": somebodys,
    "untied gpt2": lambda: somebodys(tie=False, kind="gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gemma2 with soft-capped logits": lambda: somebodys(kind="gemma2", head_dim=8, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize(
    ("module", "kind", "settings"),
    [
        ("tied", DERpp, {"alpha": 1.0}),
        ("tied", DERpp, {"alpha": 1.0, "top_k": 3}),
        ("tied", DERpp, {"alpha": 1.0, "top_k": 3, "outputs": lambda m, b: m.model(**b).logits}),
        ("untied gpt2", DERpp, {"alpha": 1.0, "top_k": 3}),
        ("gemma2 with soft-capped logits", DERpp, {"alpha": 1.0, "top_k": 3}),
        ("tied", DER, {"alpha": 1.0, "top_k": 3}),
    ],
    ids=name_of,
)
def test_lm_in_lockstep_with_a_plain_loop(tmp_path, module, kind, settings):
    method = kind(16, 0.4, **settings)
    trained, recorder = run(tmp_path, method, LM_MODULES[module](), LM_TASKS, batch_size=4, max_epochs=3)
    options = {"alpha": 1.0, "k": settings.get("top_k", 64), "labels": kind is DERpp}
    reference = lm_reference(LM_MODULES[module](), LM_TASKS, **options)
    reference.run(recorder.steps, lm_rows, torch.optim.SGD)
    assert reference.replayed >= 10
    assert_same(weights(trained), weights(reference.module), rtol=1e-2, atol=2e-3)
    for other in ({"alpha": 0.0}, {"labels": kind is DER}):
        wrong = lm_reference(LM_MODULES[module](), LM_TASKS, **options | other)
        wrong.run(recorder.steps, lm_rows, torch.optim.SGD)
        gaps = [(a - b).abs().max() for a, b in zip(wrong.module.parameters(), trained.parameters(), strict=True)]
        assert max(gaps) > 1e-2


class Noting(DERpp):
    """Keeps what it added to the loss in each step, with the batch."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.added, self.kinds = [], []

    def extra_loss(self, trainer, pl_module, batch):
        extra = super().extra_loss(trainer, pl_module, batch)
        self.added.append((batch, None if extra is None else float(extra.detach())))
        self.kinds.append(TaskCoordinator.of(trainer).kinds or [])
        return extra


# ---------------------------------------------------------------------- padded and packed


def documents(letter, count, seed):
    """No two are equal, and no one is part of another."""
    lengths = torch.randint(2, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = ["".join(chr(97 + (i * i + seed * i + length) % 26) for i in range(length)) for length in lengths]
    return [f"({number}{text}{letter})" for number, text in enumerate(texts)]


def causal_lm(**settings):
    torch.manual_seed(0)
    config = TINY_LLAMA | {"vocab_size": 257, "initializer_range": 0.2}
    module = CausalLM(config, lambda p: torch.optim.SGD(p, lr=0.3), schedule=None, **settings)
    module.configure_model()
    return module


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_packed_or_padded_the_term_is_that_of_the_samples_one_by_one(tmp_path, packing, lora):
    """Of each replayed record alone: its text is found by its tokens, its stored logits are made anew."""
    tasks = {"a": documents("A", 20, 1), "b": documents("B", 20, 2)}
    data = TaskDataModule(tasks, TrainedBPE(257, str(tmp_path)), max_length=64, batch_size=4, packing=packing)
    method, ends, module = Noting(1000, 0.5, 0.8, top_k=5), Ends(), causal_lm(lora=lora)
    befores = []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            befores.append((weights(pl_module), trainer.callbacks[0].tasks_done))

    torch.manual_seed(1)
    fit_tasks(trainer(tmp_path, [method, ends, Before()], max_epochs=1), module, data)
    stored = zip(method.buffer.items, method.buffer.tasks, strict=True)
    first = {tuple(sample["input_ids"].tolist()) for sample, task in stored if task == "a"}
    first = [torch.tensor(ids) for ids in first]
    model, met = module.lm if hasattr(module, "lm") else module.model, 0
    with torch.no_grad():
        for (batch, added), (before, task) in zip(method.added, befores, strict=True):
            if task == 0:
                assert added is None
                continue
            total, bearing = 0.0, int((batch["labels"][:, 1:] != -100).sum())
            for row in batch["input_ids"]:
                for ids in first:
                    places = [s for s in range(len(row) - len(ids) + 1) if torch.equal(row[s : s + len(ids)], ids)]
                    for _ in places:
                        sides = []
                        for state in (before, ends.weights[0]):
                            for name, parameter in module.named_parameters():
                                parameter.copy_(state[name])
                            sides.append(model(input_ids=ids[None]).logits[0, :-1])
                        total += sum(float(distance(z, t, 5)) for z, t in zip(*sides, strict=True))
                        met += 1
            if added is None:
                assert total == 0.0
            else:
                assert added == pytest.approx(0.8 * total / bearing, rel=1e-3, abs=1e-6)
    assert met >= 10
    assert max(added or 0.0 for _, added in method.added) > 1e-4


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_is_held_to_the_logits_of_the_batch_that_brought_a_sample(tmp_path, packing):
    def stream(letter, seed):
        records = [{"text": text} for text in documents(letter, 30, seed)]
        return datasets.IterableDataset.from_generator(lambda: iter(records))

    TrainedBPE(257, str(tmp_path / "bpe")).train(documents("A", 30, 1))._tokenizer.save(
        str(tmp_path / "tokenizer.json")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    data = TaskDataModule(
        {name: {"train": stream(name.upper(), seed), "val": ["x"]} for seed, name in enumerate("ab", 1)},
        tokenizer,
        max_length=64,
        batch_size=4,
        packing=packing,
    )
    method, module, befores = Noting(1000, 0.5, 0.8, top_k=5, fill="training"), causal_lm(), []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            befores.append(weights(pl_module))

    fit_tasks(trainer(tmp_path, [method, Before()], max_epochs=1, max_steps=14), module, data)

    def logits(state, ids):
        module.load_state_dict(state, strict=False)
        with torch.no_grad():
            return (module.lm if hasattr(module, "lm") else module.model)(input_ids=ids[None]).logits[0, :-1]

    met = 0
    for step, ((batch, added), kinds) in enumerate(zip(method.added, method.kinds, strict=True)):
        total, bearing = 0.0, int((batch["labels"][:, 1:] != -100).sum())
        for part in (part for row in kinds for part in row if part.replayed):
            ids = method.buffer.get(part.number)["input_ids"].long()
            first = next(
                i
                for i, (earlier, _) in enumerate(method.added)
                for row in earlier["input_ids"]
                if any(torch.equal(row[s : s + len(ids)], ids) for s in range(len(row) - len(ids) + 1))
            )
            assert first <= step
            sides = [logits(befores[at], ids) for at in (step, first)]
            total += sum(float(distance(z, t, 5)) for z, t in zip(*sides, strict=True))
            met += 1
        assert (added or 0.0) == pytest.approx(0.8 * total / bearing, rel=2e-3, abs=1e-6)
    assert met >= 10


# ---------------------------------------------------------------------- what is stored


def test_what_is_stored_are_the_logits_of_the_end_of_the_task_in_evaluation_mode(tmp_path):
    module, ends, method = seeded(dropout=0.5, batch_norm=True), Recorder(), DERpp(60, 0.3, outputs=logits_of)
    fit(tmp_path, [method, ends], module, TASKS)
    buffer = method.buffer
    assert set(buffer.tasks) == {"a", "b", "c"}
    module.trainer = None
    for number, task in zip(buffer.numbers, buffer.tasks, strict=True):
        teacher = loaded(module, ends.ends["abc".index(task)]).eval()
        (x, _), extra = buffer.get(number), buffer.extra(number)
        order, values = kept(teacher(x[None])[0].detach(), 3)
        assert extra["top_classes"].tolist() == [[0, 1, 2]]  # all of them, in their order
        torch.testing.assert_close(extra["top_logits"][0].float()[order], values, rtol=1e-3, atol=1e-5)


def test_lm_stores_the_positions_that_bear_loss_in_four_bytes_a_logit_and_two_for_all_others(tmp_path):
    method = DERpp(60, 0.3, top_k=4)
    fit(tmp_path, [method], seeded(SomebodysLM), LM_TASKS)
    for number in method.buffer.numbers:
        sample, extra = method.buffer.get(number), method.buffer.extra(number)
        positions = int((torch.as_tensor(sample["labels"])[1:] != -100).sum())
        assert {name: tuple(t.shape) for name, t in extra.items()} == {
            "top_logits": (positions, 5),
            "top_classes": (positions, 4),
        }
        assert sum(t.numel() * t.element_size() for t in extra.values()) == positions * (4 * 4 + 2)
    assert method.report()["logit_bytes_per_position"] == 4 * 4 + 2


def test_while_training_logits_are_those_of_the_step_that_saw_the_sample_first(tmp_path):
    method, recorder = DERpp(1000, 0.3, fill="training", outputs=logits_of), Recorder()
    module = fit(tmp_path, [method, recorder], seeded(dropout=0.5), TASKS, max_epochs=2)
    module.trainer = None
    first = {}
    for steps in recorder.steps:
        for batch, state, _ in steps:
            for x in batch[0]:
                first.setdefault(tuple(x.tolist()), state)
    assert len(method.buffer) == 120
    for number in list(method.buffer.numbers)[::7]:
        x, _ = method.buffer.get(number)
        order, values = kept(loaded(module, first[tuple(x.tolist())]).eval()(x[None])[0].detach(), 3)
        found = method.buffer.extra(number)["top_logits"][0].float()[order]
        torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("settings", [{}, {"mode": "add"}, {"fill": "training"}], ids=name_of)
def test_alpha_zero_is_replay_bit_for_bit(tmp_path, settings):
    kinds = {"dropout": 0.3, "batch_norm": True, "optimizer": adamw}
    dark, plain = DERpp(30, 0.4, alpha=0.0, outputs=logits_of, **settings), Replay(30, 0.4, **settings)
    ends = [
        fit(tmp_path / str(i), [method], seeded(**kinds), TASKS).state_dict() for i, method in enumerate((dark, plain))
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert [x.tolist() for x, _ in dark.buffer.items] == [x.tolist() for x, _ in plain.buffer.items]
    # And yet the logits are there.
    assert all("top_logits" in dark.buffer.extra(number) for number in dark.buffer.numbers)


def test_ratio_zero_is_plain_training_bit_for_bit(tmp_path):
    kinds = {"dropout": 0.3, "batch_norm": True, "optimizer": adamw}
    ends = [
        fit(tmp_path / str(i), methods, seeded(**kinds), TASKS).state_dict()
        for i, methods in enumerate(([DERpp(30, 0.0, outputs=logits_of)], []))
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_the_first_replayed_samples_have_hardly_any_distance(tmp_path):
    # In the first step of the second task the model is what it was when it was stored.
    method = Noting(40, 0.5, 100.0, outputs=logits_of)
    fit(tmp_path, [method], seeded(), TASKS, max_epochs=1)
    added = [extra for _, extra in method.added if extra is not None]
    assert added[0] < 100 * (2**-11 * 10) ** 2
    assert max(added) > 1e-2


@pytest.mark.parametrize("kind", [DERpp, DER])
def test_accumulated_batches_are_one_batch(tmp_path, kind):
    ends = []
    for size, accumulate in ((8, 1), (2, 4)):
        method, module = kind(40, 0.25, 2.0, outputs=logits_of), seeded()
        for seed in (1, 2):
            plain_fit(tmp_path, [method], module, seed, size, accumulate_grad_batches=accumulate)
        ends.append(weights(module))
    assert_same(ends[1], ends[0], rtol=1e-4, atol=1e-6)
    other = seeded()
    method = kind(40, 0.25, 0.0, outputs=logits_of)
    for seed in (1, 2):
        plain_fit(tmp_path, [method], other, seed)
    assert (other.net[4].weight - ends[0]["net.4.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_the_term_carries_the_loss_scale(tmp_path, fused):
    ends = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]):
        module = seeded(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, fused=fused))
        ends.append(weights(fit(tmp_path, [DERpp(30, 0.4, 20.0, outputs=logits_of)], module, TASKS, plugins=plugins)))
    assert_same(ends[1], ends[0], rtol=0, atol=3e-2)
    module = seeded(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5))
    without = weights(fit(tmp_path, [Replay(30, 0.4)], module, TASKS))
    assert max(float((without[name] - ends[0][name]).abs().max()) for name in without) > 0.1


def test_sixteen_bit_training_adds_what_thirty_two_bits_add(tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        method = Noting(16, 0.5, 1.0, top_k=3)
        fit(tmp_path, [method], somebodys(), LM_TASKS, precision=precision, max_epochs=4)
        found.append(torch.tensor([added for _, added in method.added if added is not None]))
    assert found[0].max() > 0.05
    for sixteen in found[1:]:
        torch.testing.assert_close(sixteen, found[0], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_callbacks_changes_nothing(tmp_path, first):
    ends = []
    for reverse in (first, not first):
        methods = [DERpp(30, 0.4, outputs=logits_of), EWC(1.0, outputs=logits_of)]
        ends.append(weights(fit(tmp_path, methods[::-1] if reverse else methods, tasks=TASKS)))
    assert_same(ends[0], ends[1], rtol=0, atol=0)


def test_a_strong_alpha_holds_the_predictions_of_the_stored_samples(tmp_path):
    gaps = []
    for alpha in (0.0, 1.0, 10.0):
        method = DERpp(40, 0.5, alpha, outputs=logits_of)
        module, _ = run(tmp_path, method, seeded(), dict(list(TASKS.items())[:2]), max_epochs=4)
        x = torch.stack([s[0] for s, task in zip(method.buffer.items, method.buffer.tasks, strict=True) if task == "a"])
        numbers = [n for n, task in zip(method.buffer.numbers, method.buffer.tasks, strict=True) if task == "a"]
        stored = torch.cat([method.buffer.extra(n)["top_logits"] for n in numbers]).float()
        z = module(x).detach()
        gaps.append(float((z - z.mean(-1, keepdim=True) - stored).square().mean()))
    assert gaps[0] > 1.5 * gaps[1] > 3 * gaps[2]


# ---------------------------------------------------------------------- keeping


@pytest.mark.parametrize("fill", ["task_end", "training"])
@pytest.mark.parametrize("storage", ["disk", "memory"])
def test_resumed_is_never_stopped_bit_for_bit(tmp_path, storage, fill):
    def go(root, ckpt_path=None):
        saver = ModelCheckpoint(root / "c", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        method = DERpp(20, 0.4, 2.0, outputs=logits_of, storage=storage, fill=fill)
        module = seeded(dropout=0.3, batch_norm=True, optimizer=adamw)
        fit(root, [method, saver], module, TASKS, ckpt_path=ckpt_path, max_epochs=1, accumulate_grad_batches=2)
        buffer = method.buffer
        extras = {f"{i}.{k}": v for i, n in enumerate(buffer.numbers) for k, v in buffer.extra(n).items()}
        return module.state_dict(), extras, method.report()["dark_loss"]

    state, extras, losses = go(tmp_path / "whole")
    inside, between = (sorted((tmp_path / "whole" / folder).rglob("*.ckpt")) for folder in ("c", "tasks"))
    assert len(inside) >= 4
    assert len(between) == 3
    checkpoints = between if fill == "training" else inside + between
    assert set(losses) >= {"b", "c"}
    for number, checkpoint in enumerate(checkpoints):
        torch.load(checkpoint, weights_only=True)
        again, extras_again, losses_again = go(tmp_path / str(number), checkpoint)
        assert all(torch.equal(again[name], state[name]) for name in state), checkpoint
        assert extras.keys() == extras_again.keys()
        assert all(extras[k].tolist() == extras_again[k].tolist() for k in extras), checkpoint
        assert losses_again == losses


def test_what_is_logged_and_reported(tmp_path):
    method = DERpp(30, 0.4, 2.0, outputs=logits_of)
    logger = CSVLogger(tmp_path)
    fit(tmp_path, [method], tasks=TASKS, logger=logger, log_every_n_steps=1)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        logged = [float(row["continual/DERpp/dark_loss"] or "nan") for row in csv.DictReader(file)]
    logged = [value for value in logged if value == value]
    report = method.report()
    assert set(report["dark_loss"]) == {"b", "c"}
    assert min(logged) <= report["dark_loss"]["b"] <= max(logged)
    assert report["logit_bytes_per_position"] == 3 * 4
    assert report["alpha"] == 2.0
    assert any("DERpp, b: " in sentence for sentence in report["sentences"])


def test_samples_that_are_removed_while_it_trains_are_left_out_from_then_on(tmp_path):
    method = Noting(1000, 0.5, 5.0, outputs=logits_of)

    class Removing(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                assert method.buffer.remove(lambda stored: stored.task == "a") > 0

    fit(tmp_path, [method, Removing()], tasks=TASKS, max_epochs=1)
    added = [value is not None for _, value in method.added]
    assert any(added[5:8])
    assert not any(added[8:15])
    assert set(method.buffer.tasks) == {"b", "c"}


# ---------------------------------------------------------------------- heads, and errors before training


def test_a_head_that_has_grown_is_asked_about_the_classes_that_were_there(tmp_path):
    method, module = Noting(40, 0.5, outputs=logits_of), seeded(Growing)
    plain_fit(tmp_path, [method], module, 1)
    module.widen_head()
    method.added.clear()
    plain_fit(tmp_path, [method], module, 2)
    # In the first step the model is what it was in the old classes, whatever the new rows say.
    first = next(added for _, added in method.added if added is not None)
    assert first < 1e-4
    method.added.clear()
    plain_fit(tmp_path, [method], module, 3)  # samples with three and with five logits in one batch
    assert {method.buffer.extra(n)["top_logits"].shape[-1] for n in method.buffer.numbers} == {3, 5}
    assert any(added for _, added in method.added)


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_samples_with_and_without_a_value_of_all_others_share_a_batch(tmp_path, top_k):
    """Of three classes and of five, by hand: one row at a time, each with what was stored of it."""
    method, module = Noting(40, 0.5, 1.0, top_k=top_k, outputs=logits_of), seeded(Growing)
    plain_fit(tmp_path, [method], module, 1)
    module.widen_head()
    plain_fit(tmp_path, [method], module, 2)
    befores, extras = [], []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            befores.append(pl_module(batch[0]).detach())
            extras.append({number: method.buffer.extra(number) for number in method.buffer.numbers})

    method.added.clear()
    method.kinds.clear()
    plain_fit(tmp_path, [method, Before()], module, 3)
    shapes = set()
    for logits, stored, (_, added), kinds in zip(befores, extras, method.added, method.kinds, strict=True):
        total = 0.0
        for z, (part,) in zip(logits, kinds, strict=True):
            if part.replayed:
                extra = stored[part.number]
                (v,), (order,) = extra["top_logits"].float(), extra["top_classes"].tolist()
                own = with_others(z, order) if len(v) > len(order) else z[order]
                d = own - v
                total += float(((d - d.mean()) ** 2).mean())
                shapes.add((len(v), len(order)))
        assert (added or 0.0) == pytest.approx(total / len(logits), rel=1e-4, abs=1e-7)
    of_three = (3, 2) if top_k == 2 else (3, 3)
    assert shapes == {of_three, (top_k + 1, top_k)}


def test_samples_of_another_top_k_in_a_batch_are_each_held_to_their_own():
    old, new = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    sets = [top_logits(old[:1], 2), top_logits(old[1:2], 4), top_logits(old[2:], 7)]
    values, indices = _joined(*zip(*sets, strict=True))
    alone = sum(dark_loss(new[i : i + 1], *kept, "sum") for i, kept in enumerate(sets))
    torch.testing.assert_close(dark_loss(new, values, indices, "sum"), alone)


def test_a_head_that_has_shrunk_is_an_error(tmp_path):
    method, module = DERpp(40, 0.5, outputs=logits_of), seeded(Growing)
    module.widen_head()
    plain_fit(tmp_path, [method], module, 1)
    with pytest.raises(MisconfigurationException, match=r"DERpp.*5 classes.*3 now"):
        plain_fit(tmp_path, [method], seeded(), 2)


def test_a_buffer_that_another_method_has_filled_is_an_error(tmp_path):
    folder = str(tmp_path / "buffer")
    saver = ModelCheckpoint(tmp_path / "c")
    plain_fit(tmp_path, [Replay(40, 0.5, folder=folder), saver], seeded(), 1)
    module = seeded()
    with pytest.raises(MisconfigurationException, match=r"DERpp: its buffer holds a sample without logits.*folder"):
        plain_fit(
            tmp_path, [DERpp(40, 0.5, folder=folder, outputs=logits_of), ModelCheckpoint(tmp_path / "d")], module, 2
        )
    assert module.trainer.global_step == 0


def test_another_method_can_replay_what_derpp_has_stored(tmp_path):
    folder = str(tmp_path / "buffer")
    plain_fit(
        tmp_path, [DERpp(40, 0.5, folder=folder, outputs=logits_of), ModelCheckpoint(tmp_path / "c")], seeded(), 1
    )
    again = Noting(40, 0.5, folder=folder, outputs=logits_of)
    plain_fit(tmp_path, [again, ModelCheckpoint(tmp_path / "d")], seeded(), 2)
    assert any(added for _, added in again.added)


def test_a_collate_function_that_masks_at_random_is_an_error(tmp_path):
    def masking(samples):
        batch = torch.utils.data.default_collate(samples)
        hidden = torch.rand(batch["labels"].shape) < 0.5
        return batch | {"labels": batch["labels"].masked_fill(hidden, -100)}

    def loader(seed):
        return torch.utils.data.DataLoader(Sequences(seed, [0] * 8), 4, collate_fn=masking)

    method = DERpp(8, 0.5)
    with pytest.raises(MisconfigurationException, match=r"DERpp.*positions.*collate_fn must make the same"):
        fit_tasks(trainer(tmp_path, [method], max_epochs=1), seeded(SomebodysLM), {"a": loader(1), "b": loader(2)})


def test_without_logits_it_says_what_to_do_before_anything_is_trained(tmp_path):
    module = seeded()
    with pytest.raises(MisconfigurationException, match=r"DERpp\(outputs="):
        fit(tmp_path, [DERpp()], module, TASKS)
    assert module.trainer.global_step == 0


class Doubled(SomebodysLM):
    """Looks at every sample twice, in a batch of its own."""

    def training_step(self, batch, batch_idx):
        twice = {key: torch.cat([value, value]) for key, value in batch.items()}
        return super().training_step(twice, batch_idx)


def test_logits_of_other_rows_than_the_batchs_are_an_error(tmp_path):
    module = seeded(Doubled)
    with pytest.raises(
        MisconfigurationException, match=r"a batch of 1 samples gives logits of 2; give DERpp\(outputs="
    ):
        fit(tmp_path, [DERpp()], module, LM_TASKS)
    assert module.trainer.global_step == 0


class Smoothed(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.2)


class Weighted(SomebodysLM):
    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "tasks", "settings"), [(Smoothed, TASKS, {"outputs": logits_of}), (Weighted, LM_TASKS, {})], ids=name_of
)
def test_der_refuses_a_loss_that_it_cannot_take_labels_off(tmp_path, kind, tasks, settings):
    module = seeded(kind)
    with pytest.raises(MisconfigurationException, match=r"DER: training_step returns .*DERpp"):
        fit(tmp_path, [DER(**settings)], module, tasks)
    assert module.trainer.global_step == 0
    fit(tmp_path, [DERpp(ratio=0.4, **settings)], seeded(kind), tasks, max_epochs=1)


def test_der_of_a_batch_that_is_all_replayed_is_finite(tmp_path):
    module, recorder = run(tmp_path, DER(16, 0.5), seeded(SomebodysLM), LM_TASKS, batch_size=1)
    old = {tuple(ids.tolist()) for ids in LM_TASKS["a"].ids}
    alone = [g for batch, _, g in recorder.steps[1] if tuple(batch["input_ids"][0].tolist()) in old]
    assert len(alone) >= 4
    assert all(gradient.isfinite().all() for g in alone for gradient in g.values())
    assert all(p.isfinite().all() for p in module.parameters())


def test_no_hook_is_left_behind(tmp_path):
    module = seeded(SomebodysLM)
    fit(tmp_path, [DERpp(16, 0.5)], module, LM_TASKS)
    assert not [part for part in module.modules() if part._forward_hooks]


@pytest.mark.parametrize(
    "setting",
    [
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"top_k": 0},
        {"top_k": 2.5},
        {"ratio": 1.0},
        {"buffer_size": 0},
        {"unit": "bytes"},
    ],
    ids=name_of,
)
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        DERpp(**setting)


class Stuttering(Classifier):
    """In evaluation mode some samples have no logits."""

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training else logits.masked_fill(x[:, :1] > 1, torch.nan)


def test_logits_that_are_nan_are_not_stored_and_counted(tmp_path):
    """They would make every later task NaN."""
    method, module = DERpp(40, 0.5, outputs=logits_of, storage="memory"), seeded(Stuttering)
    bad = int((TASKS["a"].tensors[0][:, 0] > 1).sum())
    with pytest.warns(UserWarning, match=rf"DERpp: the logits of {bad} positions of task 1/2 'a' are NaN"):
        fit(tmp_path, [method], module, {"a": TASKS["a"], "b": TASKS["b"]})
    assert all(p.isfinite().all() for p in module.parameters())
    report = method.report()
    assert report["positions_without_logits"]["a"] == bad > 0
    assert report["dark_loss"]["b"] > 0
    assert any(f"the logits of {bad} positions" in said for said in report["sentences"])
