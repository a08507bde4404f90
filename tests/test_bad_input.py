"""Bad input is found before training starts; the message names the argument, the value, and what would be right.

Covered elsewhere:

* no tasks, two tasks of one name, arguments of TaskDataModule, a missing file: data/test_task_data_module.py
* files that are missing, empty or malformed, read by themselves: data/test_texts.py
* streams and samples that replay cannot take, two Replays: callbacks/test_replay.py
* a metric that is never logged, no validation_step, an endless task, manual optimisation: test_sequence.py
* a checkpoint with other tasks or callbacks, a damaged one: test_resume.py
* a tokenizer and model that do not fit, by themselves: models/test_causal_lm.py; on the command line: test_cli.py
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset
from toys import TINY_LLAMA, Classifier, classification, trainer

from lightning_cl import EWC, SI, CausalLM, Replay, Task, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks

TEXTS = [f"the {animal} sleeps in the barn" for animal in ("cat", "dog", "owl", "hen", "fox")]


class Steps(Callback):
    """Counts optimizer steps."""

    def __init__(self):
        self.count = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.count += 1


def refused(root, module, tasks, error, match, callbacks=(), ckpt_path=None, **data):
    """`fit_tasks` raises `error` and has not taken a step."""
    steps = Steps()
    run = trainer(root, [steps, *callbacks], max_epochs=1)

    def fit():
        fit_tasks(run, module, TaskDataModule(tasks, batch_size=4, **data), ckpt_path)

    with pytest.raises(error, match=match):
        fit()
    assert steps.count == 0


def bpe(tmp_path):
    return TrainedBPE(270, str(tmp_path / "vocabulary"))


# ---------------------------------------------------------------------- data


def test_a_sequence_without_tasks_is_refused_by_fit_tasks_too(tmp_path):
    with pytest.raises(ValueError, match=r"tasks: there are none.*'chat'"):
        fit_tasks(trainer(tmp_path), Classifier(), {})


@pytest.mark.parametrize("data", [5, None, "data/chat.jsonl"])
def test_data_that_is_no_sequence_is_named(tmp_path, data):
    with pytest.raises(TypeError, match=rf"tasks: expected .*got a {type(data).__name__}"):
        fit_tasks(trainer(tmp_path), Classifier(), data)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("chat.jsonl", '{"text": "good"}\n{"text": "goo\n', r"chat\.jsonl', line 2: not valid JSON"),
        ("chat.jsonl", '{"text": "good"}\n\n{"txt": "good"}\n', r"chat\.jsonl', line 3: expected .*text.*'txt'"),
        ("chat.json", '{"text": "good"}', r"chat\.json': expected a list .*got a dict"),
        ("chat.txt", "", r"chat\.txt': the file is empty"),
        ("chat.txt", "  \n ", r"chat\.txt': there is no text in it"),
        ("chat.pdf", "text", r"chat\.pdf': expected a file ending in \.txt, \.jsonl"),
    ],
)
def test_a_bad_file_of_the_last_task_is_found_before_the_first_is_trained(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    tasks = {"a": TEXTS, "b": tmp_path / name}
    refused(tmp_path, CausalLM(TINY_LLAMA), tasks, ValueError, rf"task 'b', train=.*{match}", tokenizer=bpe(tmp_path))


def test_a_missing_file_of_the_last_task_is_found_before_the_first_is_trained(tmp_path):
    tasks = {"a": TEXTS, "b": tmp_path / "nowhere.jsonl"}
    match = r"task 'b', train=.*nowhere\.jsonl': no such file \(looked in .*"
    refused(tmp_path, CausalLM(TINY_LLAMA), tasks, FileNotFoundError, match, tokenizer=bpe(tmp_path))


@pytest.mark.parametrize(
    ("argument", "value", "right"),
    [
        *(
            (argument, value, "positive integer")
            for argument in ("max_epochs", "max_steps", "batch_size")
            for value in (0, -1, 1.5, True, "3")
        ),
        *(("lr", value, "positive, finite number") for value in (0, -0.1, float("nan"), float("inf"), "1e-3")),
    ],
)
def test_an_argument_of_a_task_is_named_with_the_task_and_the_value(argument, value, right):
    with pytest.raises(ValueError, match=rf"Task\('chat', {argument}={value!r}\): expected a {right}"):
        Task("chat", TEXTS, **{argument: value})


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_task_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"Task\(name={name!r}\).*non-empty string"):
        Task(name, TEXTS)


def test_a_task_with_nothing_to_train_on_and_nothing_to_watch_is_refused():
    with pytest.raises(ValueError, match=r"Task\('chat'\).*`train`.*`val`"):
        Task("chat")


# ---------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", [EWC, SI])
@pytest.mark.parametrize("strength", [-1, -1e-9, float("nan"), float("inf"), "0.1", None, True])
def test_a_strength_that_is_negative_or_no_number_is_named(method, strength):
    with pytest.raises(ValueError, match=rf"strength={strength!r}: expected a .*number of at least 0"):
        method(strength=strength)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, 5, float("nan"), "5%", None, True])
def test_a_ratio_outside_zero_and_one_is_named_with_what_is_right(ratio):
    with pytest.raises(ValueError, match=rf"ratio={ratio!r}: expected a share in \[0, 1\)"):
        Replay(ratio=ratio)


@pytest.mark.parametrize(
    ("method", "argument", "value", "right"),
    [
        (EWC, "estimator", "hessian", "'empirical'"),
        (EWC, "mode", "offline", "'separate'"),
        (EWC, "apply", "loss", "'proximal'"),
        (EWC, "samples", 0, "positive integer"),
        (EWC, "samples", 1.5, "positive integer"),
        (EWC, "decay", 0, "above 0 and at most 1"),
        (EWC, "decay", 1.1, "above 0 and at most 1"),
        (EWC, "decay", float("nan"), "above 0 and at most 1"),
        (SI, "apply", "loss", "'proximal'"),
        (SI, "damping", 0, "positive, finite"),
        (SI, "damping", float("nan"), "positive, finite"),
        (SI, "damping", "0.1", "positive, finite"),
        (Replay, "mode", "insert", "'add'"),
        (Replay, "policy", "lifo", "task_balanced"),
        (Replay, "buffer_size", 0, ""),
    ],
)
def test_a_wrong_argument_of_a_method_is_named_with_what_is_right(method, argument, value, right):
    with pytest.raises(ValueError, match=rf"{argument}={value!r}.*{right}"):
        method(**{argument: value})


def test_a_data_module_that_replay_cannot_mix_into_is_found_before_the_first_task(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from classification(0)

    class Theirs(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Stream(), 8)

        def val_dataloader(self):
            return DataLoader(classification(0), 8)

    match = r"(?s)Replay cannot mix into the training loader of task 'b': .*stream.*map-style"
    tasks = {"a": classification(0), "b": Theirs()}
    refused(tmp_path, Classifier(), tasks, MisconfigurationException, match, [Replay()])
    refused(tmp_path, Classifier(), tasks, MisconfigurationException, match, [Replay(), TaskMatrix()])


# ---------------------------------------------------------------------- tokenizer and model


@pytest.mark.parametrize("callbacks", [[], [TaskMatrix]], ids=["alone", "with a matrix"])
def test_a_tokenizer_that_does_not_fit_the_model_is_found_before_training(tmp_path, callbacks):
    module, data = CausalLM(TINY_LLAMA | {"vocab_size": 100}), {"tokenizer": bpe(tmp_path)}
    made = [callback() for callback in callbacks]
    match = r"tokenizer: it has 270 tokens, the model only 100 embeddings; give the tokenizer that belongs"
    refused(tmp_path, module, {"a": TEXTS}, MisconfigurationException, match, made, **data)


def test_a_batch_size_in_the_place_of_the_tokenizer_is_named():
    with pytest.raises(ValueError, match=r"tokenizer=128: .*as batch_size=128"):
        TaskDataModule({"a": [(torch.zeros(2), 0)]}, 128)


def test_an_unknown_tokenizer_is_found_before_training(tmp_path):
    where = str(tmp_path / "nowhere")
    match = rf"tokenizer='{where}': no tokenizer folder of that name"
    refused(tmp_path, CausalLM(TINY_LLAMA), {"a": TEXTS}, ValueError, match, tokenizer=where)


def test_text_for_a_module_without_a_tokenizer_is_found_before_training(tmp_path):
    match = r"task 'a', train: text needs a tokenizer: give TaskDataModule\(tokenizer="
    refused(tmp_path, CausalLM(TINY_LLAMA), {"a": TEXTS}, ValueError, match)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_vocabulary_is_refused_before_training(tmp_path):
    """The task has the same name and another text: the same numbers would mean other words."""
    data = TaskDataModule({"a": TEXTS}, tokenizer=bpe(tmp_path), batch_size=4)
    run = trainer(tmp_path, [ModelCheckpoint(tmp_path)], max_epochs=1)
    fit_tasks(run, CausalLM(TINY_LLAMA), data)
    tasks = {"a": ["completely different words about stones"] * 5, "b": TEXTS}
    checkpoint = tmp_path / "tasks" / "0-a.ckpt"
    match = "tokenizer: it is not the one that the checkpoint was trained with.*Give the same tokenizer"
    refused(tmp_path, CausalLM(TINY_LLAMA), tasks, ValueError, match, [], checkpoint, tokenizer=bpe(tmp_path))


def test_a_file_that_is_no_checkpoint_is_named_before_training(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_text("not a checkpoint")
    match = rf"ckpt_path='{path}': the file is damaged.*earlier checkpoint"
    refused(tmp_path, Classifier(), {"a": classification(0)}, ValueError, match, [], path)


def test_a_missing_checkpoint_is_named_before_training(tmp_path):
    path = tmp_path / "nowhere.ckpt"
    match = rf"ckpt_path='{path}': no such file"
    refused(tmp_path, Classifier(), {"a": classification(0)}, FileNotFoundError, match, [], path)


def test_a_checkpoint_of_another_format_says_which_one_is_read(tmp_path):
    fit_tasks(trainer(tmp_path, [ModelCheckpoint(tmp_path)], max_epochs=1), Classifier(), {"a": classification(0)})
    path = tmp_path / "tasks" / "0-a.ckpt"
    state = torch.load(path, weights_only=True)
    state["lightning_cl"]["format"] = 99
    torch.save(state, path)
    match = r"ckpt_path: .*0-a\.ckpt was written in format 99 .*reads format 3"
    tasks = {"a": classification(0), "b": classification(1)}
    refused(tmp_path, Classifier(), tasks, MisconfigurationException, match, [], path)
