"""Prompts for generation: cut where the answer begins, answered as ``generate`` would, written by the command."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
import yaml
from stand_in import chats, save_stand_in, sentence, write_jsonl
from test_cli import Output
from toys import classification, trainer

from lightning_cl import CausalLM, Task, TaskDataModule, fit_tasks
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.prompts import PromptDataset, join_prompts
from lightning_cl.data.text.tokenizer import load_tokenizer
from lightning_cl.sequence.predict import predict_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))


def samples(*masks):
    """Samples whose token ids are their places."""
    return TokenDataset.from_samples(
        (torch.arange(len(mask), dtype=torch.int32), torch.tensor([c == "x" for c in mask])) for mask in masks
    )


@pytest.mark.parametrize(
    ("mask", "prompt", "reference"),
    [
        ("...xx", 3, (3, 5)),
        (".xx..xxx", 5, (5, 8)),  # the last answer
        (".xx..xx..", 5, (5, 7)),  # what follows the answer belongs to neither
        (".x", 1, (1, 2)),
        ("xxxxxxx", 3, (3, 7)),  # a text: half of it …
        ("x" * 100, 32, (32, 100)),  # … and at most 32 tokens
        ("xx", 1, (1, 2)),
        ("xxx..", 1, (1, 3)),
    ],
)
def test_cut_by_hand(mask, prompt, reference):
    (found,) = PromptDataset(samples(mask))
    assert found == {"prompt": list(range(prompt)), "reference": list(range(*reference))}


def test_a_prompt_is_never_empty_and_nothing_of_the_answer_is_in_it():
    generator = torch.Generator().manual_seed(0)
    masks = [
        "".join(".x"[int(bit)] for bit in torch.randint(0, 2, (n % 9 + 2,), generator=generator)) for n in range(200)
    ]
    masks = [mask for mask in masks if "x" in mask[1:]]
    for mask, found in zip(masks, PromptDataset(samples(*masks)), strict=True):
        start, end = len(found["prompt"]), len(found["prompt"]) + len(found["reference"])
        assert start >= 1
        assert end > start
        assert found["reference"] == list(range(start, end))
        assert set(mask[start:end]) == {"x"}
        assert "x" not in mask[end:]


def test_join_keeps_lists():
    assert join_prompts([{"prompt": [1], "reference": []}, {"prompt": [2, 3], "reference": [4]}]) == {
        "prompt": [[1], [2, 3]],
        "reference": [[], [4]],
    }


def ready(tasks, tokenizer, **settings):
    data = TaskDataModule(tasks, tokenizer=tokenizer, **{"max_length": 256, "batch_size": 3} | settings)
    data.setup()
    return data


def prompts(data):
    return [
        pair for batch in data.predict_dataloader() for pair in zip(batch["prompt"], batch["reference"], strict=True)
    ]


def test_conversations_end_at_the_header_of_the_last_answer(tokenizer):
    """Oracle: the tokenizer's own template with ``add_generation_prompt``."""
    data = ready({"a": {"train": chats(1), "test": chats(5, 20)}}, tokenizer)
    found = prompts(data)
    assert len(found) == 5
    for (prompt, reference), chat in zip(found, chats(5, 20), strict=True):
        *before, answer = chat["messages"]
        expected = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert prompt == list(expected)
        assert tokenizer.decode(reference) == answer["content"] + "<|im_end|>"


def test_completions_are_prompt_and_completion(tokenizer):
    records = [{"prompt": sentence(i, 4), "completion": " " + sentence(i + 1, 5)} for i in range(4)]
    data = ready({"a": {"train": chats(1), "test": records}}, tokenizer)
    for (prompt, reference), record in zip(prompts(data), records, strict=True):
        assert tokenizer.decode(prompt) == record["prompt"]
        assert tokenizer.decode(reference) == record["completion"] + "<|im_end|>"


def test_test_data_comes_first_then_validation_then_training(tokenizer):
    roles = {"test": 3, "val": 2, "train": 1}
    for role in ("test", "val"):
        data = ready([Task("a", **{name: chats(count, 10 * count) for name, count in roles.items()})], tokenizer)
        assert len(prompts(data)) == roles[role]
        del roles[role]
    assert len(prompts(ready({"a": chats(1)}, tokenizer))) == 1  # one conversation cannot be split


def test_batch_size_of_the_task(tokenizer):
    data = ready({"a": {"train": chats(1), "test": chats(5), "batch_size": 2}}, tokenizer)
    assert [len(batch["prompt"]) for batch in data.predict_dataloader()] == [2, 2, 1]


@pytest.mark.parametrize("packing", [False, True])
def test_answers_are_those_of_generate(tmp_path, folder, packing):
    """One prompt at a time, from its text; here many, padded on the left, from its tokens."""
    questions = [{"messages": c["messages"][:2]} for c in chats(7)]
    questions = [
        {"messages": [{"role": "user", "content": sentence(i, 2 + 3 * i)}, q["messages"][1]]}
        for i, q in enumerate(questions)
    ]
    texts = [{"prompt": sentence(i, 3 + i), "completion": " x"} for i in range(4)]
    data = TaskDataModule(
        [Task("chat", chats(1), test=questions), Task("ask", chats(1), test=texts)], folder, 256, 3, packing=packing
    )
    model = CausalLM(folder, max_new_tokens=7)
    path = predict_tasks(trainer(tmp_path), model, data)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [model.generate(q["messages"][0]["content"], 7, chat=True) for q in questions]
    expected += [model.generate(t["prompt"], 7) for t in texts]
    assert [line["generated"] for line in found] == expected
    assert len(set(expected)) > 3  # or any answer would be right
    assert [line["reference"] for line in found] == [q["messages"][1]["content"] for q in questions] + [" x"] * 4
    assert found[0]["prompt"] == f"<|im_start|>user\n{sentence(0, 2)}<|im_end|>\n<|im_start|>assistant\n"


def test_a_task_that_is_no_text_is_named(tokenizer):
    data = ready({"numbers": classification(0)}, tokenizer)
    with pytest.raises(ValueError, match=r"task 'numbers'.*no texts"):
        data.predict_dataloader()


def test_a_stream_among_the_tasks_does_not_take_the_others_predictions(tmp_path, folder):
    """It has validation data as a table: that is predicted from."""
    stream = datasets.Dataset.from_list(chats(4)).to_iterable_dataset()
    tasks = {"stream": {"train": stream, "val": chats(2)}, "chat": chats(8)}
    path = predict_tasks(trainer(tmp_path), CausalLM(folder, max_new_tokens=2), TaskDataModule(tasks, folder, 256))
    found = [json.loads(line)["task"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert found.count("stream") == 2
    assert "chat" in found


def test_a_truncated_conversation_still_ends_before_an_answer(tokenizer):
    """Cut off in the second question: the first answer is the last one."""
    chat = chats(1)[0]["messages"]
    length = len(tokenizer.apply_chat_template(chat[:3], return_dict=False)) - 3
    data = ready({"a": {"train": chats(2), "test": [{"messages": chat}]}}, tokenizer, max_length=length)
    ((prompt, reference),) = prompts(data)
    assert prompt == list(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False))
    assert tokenizer.decode(reference) == chat[1]["content"] + "<|im_end|>"


def test_predicting_after_training_leaves_the_next_training_as_it_was(tmp_path, folder):
    def run(predicts):
        torch.manual_seed(0)
        data, model = TaskDataModule({"a": chats(9)}, folder, 128, 3), CausalLM(folder, max_new_tokens=3)
        fit_tasks(trainer(tmp_path, max_steps=2), model, data)
        if predicts:
            predict_tasks(trainer(tmp_path), model, data)
        fit_tasks(trainer(tmp_path, max_steps=2), model, data)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    one, other = run(False), run(True)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_predicts_from_a_runs_folder(tmp_path, folder):
    """``--run`` of a finished run: its model as trained, its tasks, its test splits."""
    write_jsonl(tmp_path / "mails" / "train.jsonl", chats(6))
    write_jsonl(tmp_path / "mails" / "test.jsonl", chats(2, 30))
    config = {
        "seed_everything": 1,
        "model": {"class_path": "lightning_cl.CausalLM", "init_args": {"model": folder, "max_new_tokens": 4}},
        "data": {"tasks": {"mails": str(tmp_path / "mails")}, "tokenizer": folder, "max_length": 128, "batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "lightning_cl.TaskMatrix"}],
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "runs", "version": 0},
            },
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    output = Output("fit", "--config", tmp_path / "c.yaml")
    assert output.code == 0, output.err
    output = Output("predict", "--run", tmp_path / "runs" / "version_0")
    assert output.code == 0, output.err
    (path,) = tmp_path.rglob("predictions.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["reference"] for line in found] == [chat["messages"][-1]["content"] for chat in chats(2, 30)]
    assert all(set(line) == {"task", "prompt", "generated", "reference"} for line in found)
    # Its answers are the trained model's.
    trained = CausalLM(folder, max_new_tokens=4)
    data = TaskDataModule({"mails": str(tmp_path / "mails")}, folder, 128, 2)
    checkpoint = next(tmp_path.rglob("tasks/0-mails.ckpt"))
    again = predict_tasks(trainer(tmp_path / "again"), trained, data, checkpoint)
    assert again.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
