"""LwF on models in which the teacher is not simply the same call with other weights."""

from __future__ import annotations

import copy

import pytest
import torch
from distilling import (
    Recorder,
    Reference,
    assert_gradients,
    classifier_reference,
    classifier_run,
    divergence,
    lm_run,
)
from regularized import AtStep, Growing, SomebodysLM, fit, logits_of, plain_fit, seeded
from torch.nn import functional as F

from lightning_cl import LwF

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_a_bf16_teacher_of_a_classifier_gets_its_inputs_in_its_type(tmp_path, teacher):
    method = LwF(2.0, outputs=logits_of, teacher=teacher, teacher_dtype="bfloat16")
    module, recorder = classifier_run(tmp_path, method)
    expected = recorder.ends[0] if teacher == "previous" else recorder.starts[0]
    assert_gradients(recorder.steps[1], classifier_reference(module, strength=2.0), expected, error=0.05)


def test_a_bf16_teacher_keeps_rotary_frequencies_in_full(tmp_path):
    # `inv_freq` is a buffer in fp32 in every bf16 model of transformers; rounded, positions beyond some hundred tokens
    # are wrong by radians. The student is its teacher in the first step: all that is left is rounding.
    module = seeded(SomebodysLM, max_position_embeddings=2048, hidden_size=64, initializer_range=0.3)
    ids = torch.randint(11, (2, 2048), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}

    class Long(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {k: v[index] for k, v in batch.items()}

    method, seen = LwF(2.0, teacher_dtype="bfloat16"), {}

    def look(m):
        seen.update({n: c.dtype for n, c in method.teacher.copies.items()})
        good = copy.deepcopy(m.model).eval()
        frequencies = {n: b.clone() for n, b in good.model.rotary_emb.named_buffers()}
        good.bfloat16()
        for name, buffer in frequencies.items():
            setattr(good.model.rotary_emb, name, buffer)
        with method.teacher.in_place_of(m):
            theirs = m.model(input_ids=ids).logits.float()
        ours, exact = good(input_ids=ids).logits.float(), m.model(input_ids=ids).logits
        seen["kl"] = [divergence(exact, other, 1.0).item() for other in (ours, theirs)]

    fit(tmp_path, [method, AtStep(look)], module, {"a": Long(), "b": Long()}, batch_size=2, max_epochs=1)
    assert seen["kl"][1] < 2 * seen["kl"][0]
    assert seen["model.model.rotary_emb.inv_freq"] == torch.float32


def test_statistics_of_batch_norm_move_once_per_step(tmp_path):
    # Although with `outputs` there is a second forward pass of the student in each step.
    counts = []
    for methods in ([], [LwF(outputs=logits_of)]):
        module = fit(tmp_path, methods, seeded(batch_norm=True))
        counts.append(int(module.net[1].num_batches_tracked))
    assert counts[1] == counts[0] == 24


class InFront(SomebodysLM):
    """Something that is trained makes the inputs of the language model: a projector, a soft prompt."""

    def __init__(self, train_model):
        super().__init__(lr=0.05)
        self.project = torch.nn.Embedding(11, 16)
        self.model.requires_grad_(train_model)

    def logits(self, batch):
        return self.model(inputs_embeds=self.project(batch["input_ids"])).logits[:, :-1]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch).flatten(0, 1), batch["labels"][:, 1:].flatten())


def in_front_reference(module):
    def kept(m, batch):
        return m.logits(batch)[batch["labels"][:, 1:] != -100]

    return Reference(module, lambda m, b: m.training_step(b, 0), kept, strength=2.0)


@pytest.mark.parametrize("train_model", [True, False], ids=["the model is trained too", "the model is frozen"])
def test_what_is_trained_in_front_of_the_decoder_is_the_teachers_too(tmp_path, train_model):
    # Run on what the student's projector makes, a frozen decoder would be its own teacher, and the term zero.
    module, recorder = lm_run(tmp_path, [LwF(2.0)], seeded(InFront, train_model=train_model))
    assert_gradients(recorder.steps[1], in_front_reference(module), recorder.ends[0], error=1e-3)


def test_prompt_tuning_is_distilled(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    class Prompted(SomebodysLM):
        def __init__(self):
            super().__init__(lr=0.1)
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="RANDOM")
            self.model = get_peft_model(self.model, config)

    def kept(m, batch):
        logits = m.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 3:-1]
        return logits[batch["labels"][:, 1:] != -100]

    module, recorder = lm_run(tmp_path, [LwF(2.0)], seeded(Prompted))
    reference = Reference(module, lambda m, b: m.training_step(b, 0), kept, strength=2.0)
    assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=1e-3)


class Unshifted(SomebodysLM):
    """Position t predicts label t: masked language models, encoder-decoders."""

    def __init__(self, kind):
        from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

        super().__init__(optimizer=torch.optim.SGD, lr=0.1)
        if kind == "t5":
            config = T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
            config.decoder_start_token_id = 0
            self.model = T5ForConditionalGeneration(config)
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.model = BertForMaskedLM(BertConfig(vocab_size=11, max_position_embeddings=32, **sizes, **off))


@pytest.mark.parametrize("outputs", [None, lambda m, b: m.model(**b).logits], ids=["found", "outputs"])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_whose_labels_are_not_shifted(tmp_path, kind, outputs):
    module, recorder = lm_run(tmp_path, [LwF(2.0, outputs=outputs)], seeded(lambda: Unshifted(kind)))

    def kept(m, batch):
        return m.model(**batch).logits[batch["labels"] != -100]

    reference = Reference(module, lambda m, b: m.training_step(b, 0), kept, strength=2.0)
    assert_gradients(recorder.steps[1], reference, recorder.ends[0], error=1e-3)


def test_a_head_that_has_grown_is_compared_in_the_classes_that_the_teacher_knows(tmp_path):
    method, recorder, module = LwF(2.0, outputs=logits_of), Recorder(), seeded(Growing)
    plain_fit(tmp_path, [recorder, method], module, 1)
    teacher = copy.deepcopy(module).eval()
    module.widen_head()
    plain_fit(tmp_path, [recorder, method], module, 2)
    for batch, state, actual in recorder.steps[1]:
        student = copy.deepcopy(module)
        student.load_state_dict(state)
        logits, known = student(batch[0]), teacher(batch[0]).detach()
        loss = F.cross_entropy(logits, batch[1]) + 2.0 * divergence(known, logits[:, :3])
        theta = dict(student.named_parameters())
        for n, expected in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            torch.testing.assert_close(actual[n], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
