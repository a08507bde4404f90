"""TaskMatrix and PromptSamples: what loggers get, wrong arguments, answers, and that training does not notice them."""

from __future__ import annotations

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import TINY_LLAMA, Classifier, classification, trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_cl import CausalLM, PromptSamples, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks

TEXTS = {
    "animals": [f"the {animal} sleeps in the barn" for animal in ("cat", "dog", "owl", "hen", "fox")] * 2,
    "code": [f"def {name}(x): return x + 1" for name in ("cat", "dog", "owl", "hen", "fox")] * 2,
}
PROMPTS = ["the dog", "def owl("]


class SomebodysLM(L.LightningModule):
    """Knows nothing of this library: a Llama with dropout."""

    def __init__(self, vocabulary=270):
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, vocab_size=vocabulary, attention_dropout=0.3))

    def training_step(self, batch, batch_idx):
        return self.model(**batch, use_cache=False).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch, use_cache=False).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Steps(Callback):
    """Counts optimizer steps."""

    def __init__(self):
        self.count = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.count += 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("vocabulary"))


def texts(cache):
    return TaskDataModule(TEXTS, tokenizer=TrainedBPE(270, cache), max_length=24, batch_size=4)


def fit_lm(root, cache, callbacks=(), make=SomebodysLM, **settings):
    L.seed_everything(0, verbose=False)
    module = make()
    fit_tasks(trainer(root, callbacks, **{"max_steps": 3} | settings), module, texts(cache))
    return module


def fit_classifier(root, matrix, **settings):
    L.seed_everything(0, verbose=False)
    data = TaskDataModule({"a": classification(0), "b": classification(1)}, batch_size=16)
    logger = CSVLogger(root, name="", version="")
    fit_tasks(trainer(root, [matrix], logger=logger, **{"max_epochs": 1} | settings), Classifier(), data)
    logger.save()
    with (root / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return [float(row[name]) for row in rows if row.get(name)]


# ---------------------------------------------------------------------- what loggers get


def test_loggers_get_every_entry_of_the_matrix_under_its_task(tmp_path):
    matrix = TaskMatrix()
    rows = fit_classifier(tmp_path, matrix)
    for index, name in enumerate("ab"):
        assert column(rows, f"continual/val_loss/{name}") == pytest.approx(matrix.matrix[:, index].tolist())


def test_loggers_get_the_scores_after_each_task(tmp_path):
    matrix = TaskMatrix("val_acc", "max")
    rows = fit_classifier(tmp_path, matrix)
    assert column(rows, "continual/average")[-1] == pytest.approx(matrix.summary()["average"])
    assert len(column(rows, "continual/average")) == 2
    # After one task there is nothing to forget: no NaN in the curves.
    assert column(rows, "continual/forgetting") == pytest.approx([matrix.summary()["forgetting"]])


def test_the_step_of_an_entry_is_that_of_its_boundary(tmp_path):
    rows = fit_classifier(tmp_path, TaskMatrix())
    assert [int(row["step"]) for row in rows if row["continual/val_loss/a"]] == [0, 3, 6]


def test_evaluations_of_the_matrix_are_not_in_the_users_validation_curve(tmp_path):
    """One point for each epoch that the user validates; six evaluations at the boundaries are not among them."""
    rows = fit_classifier(tmp_path, TaskMatrix(), max_epochs=2, num_sanity_val_steps=0)
    assert len(column(rows, "val_loss")) == 4
    assert len(column(rows, "continual/val_loss/a")) == 3


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("argument", "choices"), [("mode", "['min', 'max']"), ("preset", "'gem', 'trace' or 'sapt'")])
def test_unknown_choice_is_named_with_the_right_ones(argument, choices):
    with pytest.raises(ValueError, match=f"{argument}='best'") as error:
        TaskMatrix(**{argument: "best"})
    assert choices in str(error.value)


@pytest.mark.parametrize("prompts", [[], [""], [3], ""])
def test_prompts_that_are_no_texts_are_named(prompts):
    with pytest.raises(ValueError, match=r"prompts=.*expected a list of texts"):
        PromptSamples(prompts)


def test_one_prompt_instead_of_a_list_is_refused():
    """Else each letter is a prompt."""
    with pytest.raises(ValueError, match=r"prompts='Once upon a time'.*list"):
        PromptSamples("Once upon a time")


@pytest.mark.parametrize("tokens", [0, -1])
def test_no_tokens_to_generate_is_named(tokens):
    with pytest.raises(ValueError, match=f"max_new_tokens={tokens}.*positive"):
        PromptSamples(PROMPTS, tokens)


# ---------------------------------------------------------------------- scores in the summary


@pytest.mark.parametrize("mode", ["min", "max"])
def test_summary_of_a_hand_made_matrix(mode):
    sign = 1 if mode == "max" else -1
    matrix = TaskMatrix("val_acc", mode)
    matrix.tasks = ["a", "w", "b"]
    matrix.watched = ["w"]
    matrix.matrix = sign * torch.tensor([[0.1, 0.0, 0.2], [0.8, 0.0, 0.25], [0.6, 9.0, 0.7]], dtype=torch.float64)
    summary = matrix.summary()
    assert summary["average"] == pytest.approx(sign * 0.65)
    assert summary["backward_transfer"] == pytest.approx(-0.2)
    assert summary["forgetting"] == pytest.approx(0.2)
    assert summary["forward_transfer"] == pytest.approx(0.05)


def test_preset_changes_the_denominator():
    def transfer(preset):
        matrix = TaskMatrix("val_acc", "max", preset)
        matrix.tasks, matrix.matrix = ["a", "b"], torch.tensor([[0.1, 0.2], [0.8, 0.2], [0.6, 0.7]])
        return matrix.summary()["backward_transfer"]

    assert transfer("gem") == pytest.approx(-0.2)
    assert transfer("trace") == pytest.approx(-0.1)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("callbacks", [[], [TaskMatrix]], ids=["alone", "with a matrix"])
@pytest.mark.parametrize("make", [SomebodysLM, lambda: CausalLM(TINY_LLAMA)], ids=["somebody's", "CausalLM"])
def test_there_is_an_answer_for_every_boundary(tmp_path, cache, make, callbacks):
    prompts = PromptSamples(PROMPTS, max_new_tokens=4)
    fit_lm(tmp_path, cache, [prompts, *(make_callback() for make_callback in callbacks)], make)
    assert sorted(prompts.answers) == [0, 1, 2]
    assert all(len(answers) == len(PROMPTS) for answers in prompts.answers.values())


def test_answers_are_the_greedy_continuations_of_that_moment(tmp_path, cache):
    prompts = PromptSamples(PROMPTS, max_new_tokens=5)
    module = fit_lm(tmp_path, cache, [TaskMatrix(), prompts])
    data = texts(cache)
    data.setup()
    model = module.model.eval()
    for prompt, answer in zip(PROMPTS, prompts.answers[2], strict=True):
        ids = data.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = len(ids)
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == data.tokenizer.eos_token_id:
                break
        assert answer == data.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_answers_are_deterministic_with_dropout_and_learn(tmp_path, cache):
    one, other = (PromptSamples(PROMPTS, max_new_tokens=6) for _ in range(2))
    fit_lm(tmp_path / "1", cache, [TaskMatrix(), one], max_steps=40)
    fit_lm(tmp_path / "2", cache, [TaskMatrix(), other], max_steps=40)
    assert one.answers == other.answers
    assert one.answers[0] != one.answers[2]


def test_a_module_that_cannot_generate_is_refused_before_training(tmp_path):
    steps = Steps()
    data = TaskDataModule({"a": classification(0), "b": classification(1)}, batch_size=16)
    with pytest.raises(MisconfigurationException, match=r"Classifier can generate.*transformers"):
        fit_tasks(trainer(tmp_path, [PromptSamples(PROMPTS), steps], max_epochs=1), Classifier(), data)
    assert steps.count == 0


def test_prompts_without_a_tokenizer_are_refused_before_training(tmp_path):
    class Ids(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"input_ids": torch.arange(6), "labels": torch.arange(6)}

    steps = Steps()
    with pytest.raises(MisconfigurationException, match=r"tokenizer: give TaskDataModule\(tokenizer="):
        fit_tasks(trainer(tmp_path, [PromptSamples(PROMPTS), steps], max_epochs=1), SomebodysLM(), {"a": Ids()})
    assert steps.count == 0


def test_answers_are_in_checkpoints(tmp_path, cache):
    from lightning.pytorch.callbacks import ModelCheckpoint

    prompts = PromptSamples(PROMPTS, max_new_tokens=4)
    fit_lm(tmp_path, cache, [TaskMatrix(), prompts, ModelCheckpoint(tmp_path)])
    saved = torch.load(tmp_path / "tasks" / "1-code.ckpt", weights_only=True)["lightning_cl"]["methods"]
    restored = PromptSamples(PROMPTS)
    restored.load_continual_state(saved["PromptSamples"]["state"])
    assert restored.answers == prompts.answers


# ---------------------------------------------------------------------- training does not notice


def dropping_lm():
    return CausalLM(TINY_LLAMA | {"attention_dropout": 0.3}, lambda p: torch.optim.AdamW(p, lr=0.01))


@pytest.mark.parametrize("make", [SomebodysLM, dropping_lm], ids=["somebody's", "CausalLM"])
@pytest.mark.parametrize("settings", [{"max_steps": 3}, {"max_epochs": 2, "accumulate_grad_batches": 2}], ids=str)
def test_training_is_the_same_bit_for_bit_without_matrix_and_prompts(tmp_path, cache, make, settings):
    settings = {"max_steps": -1} | settings
    plain = fit_lm(tmp_path / "1", cache, [], make, **settings)
    watched = fit_lm(tmp_path / "2", cache, [TaskMatrix(), PromptSamples(PROMPTS, 4)], make, **settings)
    for (name, one), other in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_comparison_above_would_see_other_dropout(tmp_path, cache):
    class Draw(Callback):
        def on_train_start(self, trainer, pl_module):
            torch.rand(1)

    plain, disturbed = fit_lm(tmp_path / "1", cache), fit_lm(tmp_path / "2", cache, [Draw()])
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), disturbed.parameters(), strict=True))


@pytest.mark.parametrize("callback", [TaskMatrix, lambda: PromptSamples(PROMPTS, 2)], ids=["matrix", "prompts"])
def test_a_part_that_its_owner_put_into_evaluation_mode_stays_so(tmp_path, cache, callback):
    modes = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layers = pl_module.model.model.layers
            modes.append((layers[0].training, layers[1].training))

    def make():
        module = SomebodysLM()
        module.model.model.layers[0].eval()
        return module

    fit_lm(tmp_path, cache, [TaskMatrix(), callback(), Look()], make)
    assert set(modes) == {(False, True)}
