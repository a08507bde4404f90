"""LwF against plain torch with a copied teacher: every step's gradient, on classifiers and language models."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from distilling import (
    LM_TASKS,
    Recorder,
    assert_gradients,
    classifier_reference,
    classifier_run,
    divergence,
    lm_reference,
    lm_run,
    loaded,
    own_loss,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import (
    LENGTH,
    TASKS,
    VOCABULARY,
    AtStep,
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

from lightning_cl import EWC, CausalLM, LwF, Replay, TaskDataModule, TrainedBPE, fit_tasks

THREE = TASKS | {"c": classification(3)}
pytestmark = pytest.mark.filterwarnings("ignore")


# ---------------------------------------------------------------------- classifiers


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 1.0},
        {"strength": 0.3},
        {"temperature": 1.0},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 2, "temperature": 3.0},
    ],
    ids=str,
)
def test_classifier_every_gradient_is_that_of_the_loss_with_a_copied_teacher(tmp_path, settings):
    module, recorder = classifier_run(tmp_path, LwF(outputs=logits_of, **settings))
    reference = classifier_reference(module, **settings)
    assert_gradients(recorder.steps[0], reference, None)  # the first task has no teacher
    assert_gradients(recorder.steps[1], reference, recorder.ends[0])
    # The term is no trifle, and another teacher would be noticed.
    wrong = [None, recorder.starts[0]]
    for teacher in wrong:
        with pytest.raises(AssertionError, match="off by"):
            assert_gradients(recorder.steps[1][3:], reference, teacher, error=1e-2)


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_the_teacher_is_the_task_before_or_the_base(tmp_path, teacher):
    module, recorder = classifier_run(tmp_path, LwF(outputs=logits_of, teacher=teacher), tasks=THREE, max_epochs=1)
    reference = classifier_reference(module)
    base = recorder.starts[0]
    teachers = [base] * 3 if teacher == "base" else [None, recorder.ends[0], recorder.ends[1]]
    for steps, one in zip(recorder.steps, teachers, strict=True):
        assert_gradients(steps, reference, one)


def test_the_first_step_of_a_task_has_no_distillation_gradient(tmp_path):
    # The student is its teacher there.
    module, recorder = classifier_run(tmp_path, LwF(100.0, outputs=logits_of))
    assert_gradients(recorder.steps[1][:1], classifier_reference(module), None, error=1e-5)


def test_lockstep_with_a_plain_loop_over_three_tasks(tmp_path):
    module, recorder = classifier_run(tmp_path, LwF(2.0, outputs=logits_of), seeded(optimizer=adamw), THREE)
    student, teacher = seeded(optimizer=adamw), None
    for steps in recorder.steps:
        optimizer = adamw(student.parameters(), student.lr)
        for batch, _, _ in steps:
            loss = own_loss(student, batch)
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(batch[0])
                loss = loss + 2.0 * divergence(soft, student(batch[0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        teacher = copy.deepcopy(student).eval()
    assert_same(weights(module), weights(student), rtol=1e-4, atol=1e-5)
    free = fit(tmp_path / "free", [], seeded(optimizer=adamw), THREE)
    assert (free.net[4].weight - module.net[4].weight).abs().max() > 0.01


class Shared(Classifier):
    """A weight in two layers, and one that is made of two others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.b.weight = self.a.weight
        torch.nn.utils.parametrizations.weight_norm(self.net[4])

    def forward(self, x):
        return self.net(self.b(torch.tanh(self.a(x))))


def test_a_teacher_of_shared_and_parametrised_weights(tmp_path):
    module, recorder = classifier_run(tmp_path, LwF(2.0, outputs=logits_of), seeded(Shared))
    assert_gradients(recorder.steps[1], classifier_reference(module, strength=2.0), recorder.ends[0])


class Noting(LwF):
    """Keeps what it added to the loss in each step."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.added = []

    def extra_loss(self, trainer, pl_module, batch):
        extra = super().extra_loss(trainer, pl_module, batch)
        self.added.append(None if extra is None else float(extra.detach()))
        return extra


def test_a_head_that_has_grown_is_asked_about_the_classes_that_the_teacher_knows(tmp_path):
    method, module = Noting(outputs=logits_of), seeded(Growing)
    plain_fit(tmp_path, [method], module, 1)
    module.widen_head()
    method.added.clear()
    plain_fit(tmp_path, [method], module, 2)
    # In the first step the student is its teacher in the old classes, whatever the new rows say.
    assert method.added[0] == pytest.approx(0.0, abs=1e-6)
    assert method.added[-1] > 1e-6
    assert [len(copy) for name, copy in method.teacher.copies.items() if name == "net.4.weight"] == [
        len(module.net[4].weight)
    ]


def test_a_part_that_is_unfrozen_inside_the_sequence_has_a_teacher_too(tmp_path):
    method, module = Noting(outputs=logits_of), seeded(lr=0.3)
    module.net[0].requires_grad_(False)
    plain_fit(tmp_path, [method], module, 1)
    module.net[0].requires_grad_(True)
    frozen = module.net[0].weight.detach().clone()
    method.added.clear()
    plain_fit(tmp_path, [method], module, 2)
    assert method.added[0] == pytest.approx(0.0, abs=1e-6)
    assert not torch.equal(module.net[0].weight, frozen)
    # The next teacher knows the layer; this one knew it as it was while it was frozen.
    assert "net.0.weight" in method.teacher.copies


def test_no_hook_is_left_behind_an_exception(tmp_path):
    class Falls(SomebodysLM):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise RuntimeError("somebody's own")
            return super().training_step(batch, batch_idx)

    module = seeded(Falls)
    with pytest.raises(RuntimeError, match="own"):
        lm_run(tmp_path, [LwF(teacher="base")], module)
    assert not [part for part in module.modules() if part._forward_hooks]


def test_a_device_that_is_not_there_is_found_before_anything_is_trained(tmp_path):
    module = seeded()
    with pytest.raises(MisconfigurationException, match=r"teacher_device='cuda:7'"):
        plain_fit(tmp_path, [LwF(outputs=logits_of, teacher_device="cuda:7")], module, 1)
    assert module.trainer.global_step == 0


class Watching:
    """A user's function that notes in which state each call finds the module."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, batch):
        out = module(batch[0])
        self.calls.append(
            {
                "training": [m.training for m in module.net],
                "graph": out.requires_grad,
                "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
                "out": out.detach().clone(),
                "batch": batch[0].clone(),
            }
        )
        return out


def test_the_teacher_is_in_evaluation_mode_although_the_student_has_dropout(tmp_path):
    watching, module = Watching(), seeded(dropout=0.5, batch_norm=True)
    module, recorder = classifier_run(tmp_path, LwF(outputs=watching), module)
    teachers = [call for call in watching.calls if not call["graph"]]
    students = [call for call in watching.calls if call["graph"]]
    assert len(teachers) >= 12
    assert len(students) >= 12
    assert not any(any(call["training"]) for call in teachers)
    assert all(all(call["training"]) for call in students)
    # Its answer is that of the whole state at the end of the task before, statistics of norms included.
    teacher = loaded(module, recorder.ends[0]).eval()
    for call in teachers[-3:]:
        assert_same(call["weights"], {n: p.detach() for n, p in teacher.named_parameters()}, rtol=0, atol=0)
        torch.testing.assert_close(call["out"], teacher(call["batch"]).detach(), rtol=1e-5, atol=1e-6)


def test_the_teacher_leaves_no_trace_in_the_module(tmp_path):
    module = seeded(dropout=0.5, batch_norm=True)
    names, ids = list(module.state_dict()), {n: id(p) for n, p in module.named_parameters()}

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert {n: id(p) for n, p in pl_module.named_parameters()} == ids
            assert all(p.requires_grad for p in pl_module.parameters())
            assert all(m.training for m in pl_module.modules())
            assert list(pl_module.state_dict()) == names
            assert sum(len(g["params"]) for g in optimizer.param_groups) == len(ids)

    fit(tmp_path, [LwF(outputs=logits_of), Look()], module)
    assert sum(1 for _ in module.parameters()) == len(ids)


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_strength_zero_is_plain_training_bit_for_bit(tmp_path, teacher):
    settings = {"dropout": 0.3, "batch_norm": True, "optimizer": adamw}
    method = LwF(0.0, outputs=logits_of, teacher=teacher)
    watched = fit(tmp_path / "1", [method], seeded(**settings)).state_dict()
    plain = fit(tmp_path / "2", [], seeded(**settings)).state_dict()
    assert all(torch.equal(watched[n], plain[n]) for n in plain)
    assert method.state_bytes() > 0  # and yet a teacher is kept


def test_a_strong_teacher_holds_the_predictions(tmp_path):
    x = TASKS["b"].tensors[0]
    gaps = []
    for strength in (0.0, 1.0, 10.0):
        module, recorder = classifier_run(tmp_path, LwF(strength, outputs=logits_of), max_epochs=6)
        teacher = loaded(module, recorder.ends[0]).eval()
        gaps.append(F.kl_div(module(x).log_softmax(-1), teacher(x).softmax(-1), reduction="batchmean").item())
    assert gaps[0] > 1.5 * gaps[1] > 3 * gaps[2]


def test_accumulated_batches_are_one_batch(tmp_path):
    ends = []
    for size, accumulate in ((8, 1), (2, 4)):
        method, module = LwF(outputs=logits_of), seeded()
        for seed in (1, 2):
            plain_fit(tmp_path, [method], module, seed, size, accumulate_grad_batches=accumulate)
        ends.append(weights(module))
    assert_same(ends[1], ends[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_term_carries_the_loss_scale(tmp_path, fused):
    ends = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]):
        module = seeded(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr / 5, fused=fused))
        ends.append(weights(fit(tmp_path, [LwF(3.0, outputs=logits_of)], module, plugins=plugins)))
    assert_same(ends[1], ends[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("lwf_first", [True, False])
def test_the_order_of_callbacks_changes_nothing(tmp_path, lwf_first):
    ends = []
    for reverse in (lwf_first, not lwf_first):
        methods = [LwF(outputs=logits_of), EWC(1.0, outputs=logits_of)]
        ends.append(weights(fit(tmp_path, methods[::-1] if reverse else methods)))
    assert_same(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("where", ["all", "new", "replayed"])
def test_classifier_on_new_replayed_or_all_samples(tmp_path, where):
    tasks = {name: torch.utils.data.TensorDataset(*classification(i, 40).tensors) for i, name in enumerate("ab")}
    old = {tuple(row) for row in tasks["a"].tensors[0].tolist()}
    recorder = Recorder()
    module = fit(tmp_path, [LwF(outputs=logits_of, where=where), Replay(30, 0.4), recorder], tasks=tasks)
    module.trainer = None

    def mask(batch):
        replayed = torch.tensor([tuple(row) in old for row in batch[0].tolist()])
        return {"all": torch.ones_like(replayed), "new": ~replayed, "replayed": replayed}[where]

    shares = [mask(batch).float().mean().item() for batch, _, _ in recorder.steps[1]]
    assert where == "all" or 0.2 < sum(shares) / len(shares) < 0.8
    assert_gradients(recorder.steps[1], classifier_reference(module), recorder.ends[0], mask)


def test_without_replay_all_samples_are_new(tmp_path):
    module, recorder = classifier_run(tmp_path, LwF(outputs=logits_of, where="new"))
    assert_gradients(recorder.steps[1], classifier_reference(module), recorder.ends[0])


def test_replayed_samples_without_replay_are_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"where='replayed'.*Replay"):
        fit(tmp_path, [LwF(outputs=logits_of, where="replayed")])


class Stuttering(Classifier):
    """In evaluation mode, as a teacher is, some samples have no logits."""

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training else logits.masked_fill(x[:, :1] > 1, torch.nan)


def test_what_the_teacher_does_not_know_is_left_out_and_counted(tmp_path):
    """One NaN of the teacher's would make the loss NaN, and with it the model."""
    method, recorder, module = LwF(outputs=logits_of), Recorder(), seeded(Stuttering)
    with pytest.warns(UserWarning, match=r"LwF: in task 2/2 'b' the teacher's outputs are NaN.*left out"):
        fit(tmp_path, [method, recorder], module, log_every_n_steps=1)
    module.trainer = None
    mask = [batch[0][:, 0] <= 1 for batch, _, _ in recorder.steps[1]]
    count = sum(int((~kept).sum()) for kept in mask)
    assert_gradients(recorder.steps[1], classifier_reference(module), recorder.ends[0], lambda b: b[0][:, 0] <= 1)
    report = method.report()
    assert report["left_out"] == {"b": count}
    assert count > 0
    assert report["divergence"]["b"] > 0
    assert any(f"at {count} positions" in said for said in report["sentences"])


def test_frozen_parameters_cost_nothing(tmp_path):
    module, method = seeded(), LwF(outputs=logits_of)
    module.net[0].requires_grad_(False)
    module, recorder = classifier_run(tmp_path, method, module)
    assert method.state_bytes() == 4 * (48 + 3)
    assert_gradients(recorder.steps[1], classifier_reference(module), recorder.ends[0])


def test_without_logits_it_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"outputs=|\.logits"):
        fit(tmp_path, [LwF()])


@pytest.mark.parametrize(
    "setting",
    [
        {"strength": -1.0},
        {"temperature": 0.0},
        {"teacher": "next"},
        {"where": "old"},
        {"top_k": 0},
        {"teacher_dtype": "int8"},
        {"strength": float("inf")},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        LwF(**setting)


# ---------------------------------------------------------------------- language models


def causal_lm(tie=True, **settings):
    torch.manual_seed(0)
    config = TINY_LLAMA | {"vocab_size": VOCABULARY, "tie_word_embeddings": tie, "initializer_range": 0.2}
    module = CausalLM(config, lambda p: torch.optim.SGD(p, lr=0.1), schedule=None, **settings)
    module.configure_model()
    return module


MODULES = {
    "tied": lambda: seeded(SomebodysLM, tie=True),
    "untied": lambda: seeded(SomebodysLM, tie=False),
    "gpt2": lambda: seeded(lambda: SomebodysLM(kind="gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)),
    "gemma2 with soft-capped logits": lambda: seeded(
        lambda: SomebodysLM(kind="gemma2", head_dim=8, final_logit_softcapping=2.0)
    ),
    "CausalLM": causal_lm,
    "CausalLM untied": lambda: causal_lm(tie=False),
    "CausalLM with gradient checkpointing": lambda: causal_lm(gradient_checkpointing=True),
}


@pytest.mark.parametrize("kind", MODULES)
def test_lm_every_gradient_is_that_of_the_loss_with_a_copied_teacher(tmp_path, kind):
    module, recorder = lm_run(tmp_path, [LwF(2.0)], MODULES[kind]())
    reference = lm_reference(module, strength=2.0)
    assert_gradients(recorder.steps[0], reference, None, error=1e-3)
    assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=1e-3)
    with pytest.raises(AssertionError, match="off by"):
        assert_gradients(recorder.steps[1][2:], reference, None, error=1e-2)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"top_k": 3}, {"top_k": 4, "temperature": 3.0}], ids=str)
def test_lm_temperature_and_top_k(tmp_path, settings):
    module, recorder = lm_run(tmp_path, [LwF(2.0, **settings)], causal_lm())
    reference = lm_reference(module, strength=2.0, **settings)
    assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=1e-3)
    with pytest.raises(AssertionError, match="off by"):
        assert_gradients(recorder.steps[1][2:], lm_reference(module, strength=2.0), recorder.ends[0], error=1e-2)


def test_lm_the_base_is_the_teacher_of_all_tasks(tmp_path):
    module, recorder = lm_run(tmp_path, [LwF(2.0, teacher="base")], seeded(SomebodysLM))
    for steps in recorder.steps:
        assert_gradients(steps, lm_reference(module, strength=2.0), recorder.starts[0], error=1e-3)


def test_lm_a_users_function_gives_the_same_gradient(tmp_path):
    tasks, found = LM_TASKS, []
    for outputs in (None, lambda m, b: m.model(**b).logits):
        module, recorder = lm_run(tmp_path, [LwF(2.0, outputs=outputs)], seeded(SomebodysLM), tasks)
        assert_gradients(recorder.steps[1], lm_reference(module, strength=2.0), recorder.ends[0], error=1e-3)
        found.append(weights(module))
    assert_same(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_lm_a_third_partys_model_with_logits(tmp_path):
    class Tables(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, input_ids, **_):
            return {"logits": self.table(input_ids)} if self.as_dict else Output(self.table(input_ids))

        as_dict = False

    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Bigram(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Tables()

        def training_step(self, batch, batch_idx):
            targets = batch["labels"][:, 1:].flatten()
            return F.cross_entropy(self.model(batch["input_ids"]).logits[:, :-1].flatten(0, 1), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    module, recorder = lm_run(tmp_path, [LwF(2.0)], seeded(Bigram))
    assert_gradients(recorder.steps[1], lm_reference(module, strength=2.0), recorder.ends[0], error=1e-3)


def test_lm_a_batch_without_any_loss_adds_nothing(tmp_path):
    class Careful(SomebodysLM):
        def training_step(self, batch, batch_idx):
            logits = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            targets = batch["labels"][:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
            return loss / max(1, int((targets != -100).sum()))

    tasks = {"a": LM_TASKS["a"], "b": Sequences(2, [LENGTH] * 8)}
    _, recorder = lm_run(tmp_path, [LwF(2.0)], seeded(Careful), tasks)
    for _, _, gradient in recorder.steps[1]:
        assert all(not g.any() for g in gradient.values())


def test_lm_chunks_change_nothing(tmp_path, monkeypatch):
    # One position at a time, in the backward pass too.
    from lightning_cl.functional import lwf

    found = [weights(lm_run(tmp_path, [LwF(2.0)], causal_lm())[0])]
    for function in (lwf.head_kl_divergence, lwf.kl_divergence):
        values = [1 if value == lwf.CHUNK_BYTES else value for value in function.__defaults__]
        assert 1 in values
        monkeypatch.setattr(function, "__defaults__", tuple(values))
    found.append(weights(lm_run(tmp_path, [LwF(2.0)], causal_lm())[0]))
    assert_same(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_lm_validation_between_the_steps_changes_nothing(tmp_path):
    tasks = {name: {"train": data, "val": Sequences(9, [0, 1, 2, 3])} for name, data in LM_TASKS.items()}
    module, recorder = lm_run(tmp_path, [LwF(2.0)], causal_lm(), tasks, val_check_interval=1)
    assert_gradients(recorder.steps[1], lm_reference(module, strength=2.0), recorder.ends[0], error=1e-3)


@pytest.mark.parametrize("module", [lambda: seeded(SomebodysLM, attention_dropout=0.3), causal_lm], ids=["HF", "ours"])
def test_lm_strength_zero_is_plain_training_bit_for_bit(tmp_path, module):
    ends = []
    for methods in ([LwF(0.0)], []):
        ends.append(weights(lm_run(tmp_path, methods, module())[0]))
    assert_same(ends[0], ends[1], rtol=0, atol=0)


def test_lm_the_teacher_has_no_dropout_and_takes_no_random_number(tmp_path):
    # In the first step of a task the student is its teacher but for dropout; the draws of dropout are those of
    # plain training, as no forward pass of the student is run twice.
    ends = []
    for strength in (None, 1e-12):
        torch.manual_seed(0)
        module = SomebodysLM(attention_dropout=0.3, optimizer=torch.optim.SGD)
        ends.append(weights(lm_run(tmp_path, [LwF(strength)] if strength else [], module)[0]))
    assert_same(ends[1], ends[0], rtol=0, atol=1e-6)


def test_lm_resume_equals_never_stopped(tmp_path):
    def run(root, ckpt_path=None):
        torch.manual_seed(0)
        module = SomebodysLM(attention_dropout=0.3)
        checkpoint = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        methods = [LwF(), LwF(0.3, teacher="base", teacher_dtype="bfloat16", top_k=4), checkpoint]
        fit(root, methods, module, LM_TASKS, batch_size=4, ckpt_path=ckpt_path)
        return weights(module)

    reference = run(tmp_path / "1")
    for name in ("tasks/0-a.ckpt", "checkpoints/0-a/step=3.ckpt", "checkpoints/1-b/step=6.ckpt"):
        assert_same(run(tmp_path / name, tmp_path / "1" / name), reference, rtol=0, atol=0)


# ---------------------------------------------------------------------- replay: which samples


def letters(letter, count, seed):
    lengths = torch.randint(2, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [letter * length for length in lengths]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("where", ["all", "new", "replayed"])
def test_lm_on_new_replayed_or_all_samples(tmp_path, where, packing):
    torch.manual_seed(0)
    config = TINY_LLAMA | {"initializer_range": 0.2}
    module = CausalLM(config, lambda p: torch.optim.SGD(p, lr=0.1), schedule=None)
    tasks = {"a": letters("a", 40, seed=1), "b": letters("b", 40, seed=2)}
    data = TaskDataModule(
        tasks,
        tokenizer=TrainedBPE(257, str(tmp_path)),
        max_length=48,
        batch_size=4,
        packing=packing,
        seed=0,
    )
    recorder = Recorder()
    methods = [LwF(2.0, where=where), Replay(100, 0.4), recorder]
    fit_tasks(trainer(tmp_path, methods, max_epochs=1), module, data)
    old = data.tokenizer("a")["input_ids"][0]
    module.trainer = None

    def replayed(batch):
        """``[rows, length]``: whether a position is in a document of the first task, by its first token."""
        ids = batch["input_ids"]
        places = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
        out = torch.zeros_like(ids, dtype=torch.bool)
        for row in range(len(ids)):
            for t in range(ids.shape[1]):
                out[row, t] = ids[row, t] == old if places[row, t] == 0 else out[row, t - 1]
        return out

    def mask(batch):
        kind = replayed(batch)[:, :-1][batch["labels"][:, 1:] != -100]
        return {"all": torch.ones_like(kind), "new": ~kind, "replayed": kind}[where]

    shares = torch.cat([mask(batch).float() for batch, _, _ in recorder.steps[1]]).mean().item()
    assert where == "all" or 0.3 < shares < 0.7
    rows = [replayed(batch) for batch, _, _ in recorder.steps[1]]
    assert packing is any((r[:, 1:] != r[:, :-1]).any().item() for r in rows)  # rows of both kinds
    assert_gradients(recorder.steps[1], lm_reference(module, strength=2.0), recorder.ends[0], mask, error=1e-3)


# ---------------------------------------------------------------------- LoRA and types


class Adapted(SomebodysLM):
    """Somebody's adapter on somebody's model."""

    def __init__(self, **settings):
        from peft import LoraConfig, get_peft_model

        super().__init__(**settings)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        self.model = get_peft_model(self.model, config)


@pytest.mark.parametrize("teacher", ["previous", "base"])
@pytest.mark.parametrize("kind", ["somebody's", "ours"])
def test_lora_the_teacher_is_the_adapter_of_the_task_before(tmp_path, kind, teacher):
    if kind == "ours":
        module = causal_lm(lora={"r": 2, "target_modules": ["q_proj", "down_proj"]})
    else:
        module = seeded(Adapted, lr=0.05)
    method = LwF(2.0, teacher=teacher)
    module, recorder = lm_run(tmp_path, [method], module, max_epochs=4)
    adapter = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert adapter < 0.1 * sum(p.numel() for p in module.parameters())
    assert method.state_bytes() <= 4 * adapter
    reference = lm_reference(module, strength=2.0)
    expected = recorder.ends[0] if teacher == "previous" else recorder.starts[0]
    assert_gradients(recorder.steps[1], reference, expected, error=1e-3)
    with pytest.raises(AssertionError, match="off by"):
        assert_gradients(recorder.steps[1][3:], reference, None, error=1e-2)


def test_lm_a_bf16_teacher_answers_nearly_as_the_whole_one(tmp_path):
    method, sizes = LwF(2.0, teacher_dtype="bfloat16"), []
    look = AtStep(lambda m: sizes.append(sum(c.nbytes for c in method.teacher.copies.values())))
    module, recorder = lm_run(tmp_path, [method, look], seeded(SomebodysLM))
    reference = lm_reference(module, strength=2.0)
    assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=0.05)
    with pytest.raises(AssertionError, match="off by"):
        assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=1e-4)
    assert sizes[0] < 2.02 * sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lm_in_16_bits_the_term_is_nearly_that_of_32(tmp_path, precision):
    module, recorder = lm_run(tmp_path, [LwF(2.0)], seeded(SomebodysLM), precision=precision)
    reference = lm_reference(module.float(), strength=2.0)
    for steps in recorder.steps:
        for _, _, gradient in steps:
            gradient.update({n: g.float() for n, g in gradient.items()})
    assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=0.08)
    with pytest.raises(AssertionError, match="off by"):
        assert_gradients(recorder.steps[1][2:], reference, None, error=0.2)


def test_a_teacher_on_the_cpu_is_the_same_teacher(tmp_path):
    ends = []
    for device in (None, "cpu"):
        ends.append(weights(lm_run(tmp_path, [LwF(2.0, teacher_device=device)], seeded(SomebodysLM))[0]))
    assert_same(ends[1], ends[0], rtol=0, atol=0)


def test_two_at_once_add_up(tmp_path):
    ends = []
    for methods in ([LwF(0.5, outputs=logits_of), LwF(1.5, outputs=logits_of)], [LwF(2.0, outputs=logits_of)]):
        ends.append(weights(fit(tmp_path, methods)))
    assert_same(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_state_is_a_copy_of_what_is_trained(tmp_path):
    method = LwF(outputs=logits_of)
    module = fit(tmp_path, [method], seeded(Classifier))
    assert method.state_bytes() == 4 * sum(p.numel() for p in module.parameters())
