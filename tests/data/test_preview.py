"""The preview: texts by hand, with what bears loss marked; counts; no model."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_cl import TaskDataModule, TrainedBPE
from lightning_cl.data.preview import marked, preview, printable

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TrainedBPE(257, str(tmp_path_factory.mktemp("bpe") / "bpe")).train(["any"])


def chat(*turns):
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def lines_of(data, colour=False):
    return [line.strip() for line in data.preview(colour).splitlines()]


def test_what_bears_loss_is_marked_in_a_conversation(tokenizer):
    data = TaskDataModule(
        {"chat": {"train": [chat("Hi", "Hello,\nyou", "And?", "Bye")], "val": [chat("a", "b")]}},
        tokenizer,
        chat_template=TEMPLATE,
    )
    end = tokenizer.eos_token
    shown = [line[2:] for line in lines_of(data) if line.startswith("| ")]
    # The generation prompt, <assistant>, is the template's to write.
    assert shown == [f"<user>Hi{end}<assistant>⟦Hello,", f"you{end}⟧<user>And?{end}<assistant>⟦Bye{end}⟧"]
    coloured = data.preview(colour=True)
    assert f"<assistant>\033[32m⟦Bye{end}⟧\033[0m" in coloured
    assert "\033" not in data.preview()


def test_the_first_token_bears_no_loss_and_prompts_do_not(tokenizer):
    data = TaskDataModule(
        {"text": {"train": ["abc"], "val": ["x"]}, "pairs": {"train": [{"prompt": "1+1=", "completion": "2"}]}},
        tokenizer,
    )
    end = tokenizer.eos_token
    text = data.preview()
    assert f"| a⟦bc{end}⟧" in text
    assert f"| 1+1=⟦2{end}⟧" in text


def test_counts_of_all_roles(tokenizer):
    records = [{"prompt": "p" * 10, "completion": "c" * 40}, {"prompt": "p" * 40, "completion": "c"}, {"text": 3}]
    data = TaskDataModule({"a": {"train": records, "val": records[:1]}}, tokenizer, max_length=32, on_bad_record="skip")
    with pytest.warns(UserWarning, match="malformed"):
        shown = lines_of(data)
    assert any(line.endswith("1 dropped, 1 cut off, 1 malformed") and line.startswith("1 samples") for line in shown)
    assert "val: 1 samples, 32 tokens; 0 dropped, 1 cut off, 0 malformed" in shown
    assert "sample 1: 32 tokens, 22 of them bear loss" in shown


def test_a_stream_is_read_at_its_beginning_and_training_still_warns(tokenizer):
    records = [{"prompt": "ab", "completion": "cd"}, {"prompt": "p", "completion": "c" * 99}]
    source = datasets.Dataset.from_list(records).to_iterable_dataset()
    data = TaskDataModule({"s": {"train": source, "val": ["x"]}}, tokenizer, max_length=32)
    shown = data.preview()
    assert f"| ab⟦cd{tokenizer.eos_token}⟧" in shown
    assert "a stream; at its beginning" in shown
    with pytest.warns(UserWarning, match="is cut off"):
        assert len(list(data.training_data(data.tasks[0])(0))) == 2


def test_data_that_is_no_text_says_what_it_is():
    data = TaskDataModule({"x": TensorDataset(torch.zeros(3, 2), torch.zeros(3))})
    assert "no text: TensorDataset" in data.preview()


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("ü", "é€", "ü⟦é€⟧"),  # several bytes, each a token
        ("a\x1b[2Jb", "c\u202ed", "a\\x1b[2Jb⟦c\\u202ed⟧"),  # what would steer a terminal
        (" two", " words", " two⟦ words⟧"),
    ],
)
def test_marks_by_hand(tokenizer, prompt, answer, expected):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    learnt = [False] * len(ids[0]) + [True] * len(ids[1])
    assert marked(ids[0] + ids[1], learnt, tokenizer) == expected


def test_a_border_inside_a_character_loses_nothing(tokenizer):
    ids = tokenizer("xé€y", add_special_tokens=False)["input_ids"]
    for border in range(1, len(ids)):
        text = marked(ids, [False] * border + [True] * (len(ids) - border), tokenizer)
        assert text.replace("⟦", "").replace("⟧", "") == "xé€y"


def test_long_parts_are_cut_in_the_middle_with_a_count(tokenizer):
    text = "a" + "b" * 2000 + "c"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = marked(ids, [True] * len(ids), tokenizer)
    assert shown.startswith("⟦abbb")
    assert shown.endswith("bbc⟧")
    assert f"{2002 - 900:,} characters" in shown
    assert len(shown) < 1000


def test_the_command_builds_neither_model_nor_trainer(tmp_path, capsys):
    from lightning_cl.cli.command import main

    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": "yes"}) + "\n" for i in range(9)))
    arguments = [
        "preview",
        "--model=lightning_cl.CausalLM",
        "--model.model=/nowhere/model",
        "--trainer.accelerator=tpu",
    ]
    arguments += [f"--data.tasks.pairs={path}", "--data.tokenizer=lightning_cl.TrainedBPE"]
    main([*arguments, "--data.tokenizer.vocab_size=257", "--data.on_bad_record=skip"])
    shown = capsys.readouterr().out
    assert "?⟦yes" in shown
    assert "1. pairs" in shown
    assert not list(tmp_path.glob("*logs*"))


def test_preview_sets_the_data_up_once(tokenizer):
    data = TaskDataModule({"a": {"train": ["abc"], "val": ["x"]}}, tokenizer)
    assert preview(data) == data.preview()


def test_a_run_is_previewed_by_its_configuration(capsys):
    from lightning_cl.cli.command import main

    with pytest.raises(SystemExit):
        main(["preview", "--run", "runs/a"])
    assert "--config runs/a/config.yaml" in capsys.readouterr().err


def test_a_watched_task_shows_what_it_is_measured_on(tokenizer):
    tasks = {"a": {"train": ["abc"], "val": ["x"]}, "seen": {"val": [{"prompt": "1+1=", "completion": "2"}]}}
    text = TaskDataModule(tasks, tokenizer).preview()
    assert "2. seen (watched: never trained on)" in text
    assert f"| 1+1=⟦2{tokenizer.eos_token}⟧" in text


@pytest.mark.parametrize("stream", [False, True])
def test_completions_without_the_template_say_so(tokenizer, stream):
    source = [{"prompt": "p", "completion": "c"}]
    data = {"train": datasets.Dataset.from_list(source).to_iterable_dataset() if stream else source, "val": ["x"]}
    text = TaskDataModule({"a": data}, tokenizer, chat_template=TEMPLATE).preview()
    assert "template=True" in text
    assert "template=True" not in TaskDataModule({"a": data}, tokenizer).preview()
    assert (
        "template=True" not in TaskDataModule({"a": data}, tokenizer, chat_template=TEMPLATE, template=True).preview()
    )


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", "a⟦ü…⟧"), ("cp1252", "a[[ü...]]"), ("ascii", "a[[\\xfc...]]")]
)
def test_a_terminal_without_such_marks_gets_others(encoding, expected):
    class Stream:
        pass

    Stream.encoding = encoding
    assert printable("a⟦ü…⟧", Stream()) == expected
