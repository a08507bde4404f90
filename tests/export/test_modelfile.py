"""Modelfiles say what the model was trained with."""

from __future__ import annotations

import json

import pytest
from chat_templates import chat_tokenizer, with_template
from export.ollama_templates import MADE

from lightning_cl.export.go_evaluator import ollama_prompt
from lightning_cl.export.modelfile import modelfile_text, read_modelfile, write_modelfile, write_task_modelfiles

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on the mat?"},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def saved(tmp_path, trained):
    """A folder with a tokenizer and settings, and GGUF files in a folder next to it."""
    folder = tmp_path / "model"
    with_template(trained, MADE["plain"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "eos_token_id": 0}))
    (tmp_path / "out" / "adapters").mkdir(parents=True)
    for name in ("model-q8_0", "adapters/chat", "adapters/code"):
        (tmp_path / "out" / f"{name}.gguf").write_bytes(b"GGUF")
    return folder, tmp_path / "out" / "model-q8_0.gguf"


def test_the_file_says_what_the_model_was_trained_with(saved, trained):
    folder, gguf = saved
    path = write_modelfile(folder, gguf, system='Two lines,\n"quoted".', num_ctx=1024, stop=["STOP"])
    commands = read_modelfile(path.read_text())
    values = dict(commands)
    assert path == gguf.with_name("Modelfile")
    assert values["from"] == "./model-q8_0.gguf"
    assert values["system"] == 'Two lines,\n"quoted".'
    assert values["parameter num_ctx"] == "1024"
    stops = [value for name, value in commands if name == "parameter stop"]
    assert stops == [trained.eos_token, "<|im_end|>", "<|im_start|>", "STOP"]
    tokenizer = with_template(trained, MADE["plain"])
    wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ollama_prompt(values["template"], CHAT) == wanted
    assert str(folder.parent) not in path.read_text()


def test_one_file_per_task_with_its_adapter(saved):
    folder, gguf = saved
    adapters = {"chat": gguf.parent / "adapters/chat.gguf", "my code": gguf.parent / "adapters/code.gguf"}
    files = write_task_modelfiles(folder, gguf, adapters)
    assert [path.name for path in files.values()] == ["Modelfile.chat", "Modelfile.my-code"]
    read = [read_modelfile(path.read_text()) for path in files.values()]
    assert [dict(commands)["adapter"] for commands in read] == ["./adapters/chat.gguf", "./adapters/code.gguf"]
    chat, code = ([command for command in commands if command[0] != "adapter"] for commands in read)
    assert chat == code
    assert dict(chat)["parameter num_ctx"] == "4096"
    with pytest.raises(ValueError, match="same file"):
        write_task_modelfiles(folder, gguf, {"a b": adapters["chat"], "a-b": adapters["chat"]})


def test_a_model_without_a_chat_template_continues_the_prompt(saved, trained):
    folder, gguf = saved
    plain = with_template(trained, None)
    path = write_modelfile(folder, gguf, tokenizer=plain)
    assert dict(read_modelfile(path.read_text()))["template"] == "{{ .Prompt }}"
    with pytest.raises(ValueError, match="no chat template"):
        write_modelfile(folder, gguf, system="Be kind.", tokenizer=plain)


def test_system_texts_that_the_template_does_not_take(saved, trained):
    folder, gguf = saved
    with pytest.raises(ValueError, match="leaves system texts out"):
        write_modelfile(folder, gguf, system="Be kind.", tokenizer=with_template(trained, MADE["system dropped"]))
    with pytest.warns(UserWarning, match="refuses system texts"):
        path = write_modelfile(
            folder, gguf, system="Be kind.", tokenizer=with_template(trained, MADE["system refused"])
        )
    assert "# The chat template refuses system texts" in path.read_text()
    asked = ollama_prompt(dict(read_modelfile(path.read_text()))["template"], CHAT)
    assert asked.startswith("<|im_start|>user\nBe kind.\n\nthe cat<|im_end|>")


def test_an_end_that_is_no_token_is_a_stop(saved, trained):
    folder, gguf = saved
    source = "{% for m in messages %}\n\n### {{ m.role }}:\n{{ m.content }}{% endfor %}\n\n### assistant:\n"
    path = write_modelfile(folder, gguf, tokenizer=with_template(trained, source))
    stops = [value for name, value in read_modelfile(path.read_text()) if name == "parameter stop"]
    assert stops == [trained.eos_token, "### user:"]


def test_a_template_of_ones_own_or_none(saved, trained):
    folder, gguf = saved
    strange = with_template(trained, "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="template=False"):
        write_modelfile(folder, gguf, tokenizer=strange)
    assert not gguf.with_name("Modelfile").exists()
    own = dict(read_modelfile(write_modelfile(folder, gguf, tokenizer=strange, template="{{ .Prompt }}!").read_text()))
    assert own["template"] == "{{ .Prompt }}!"
    none = dict(read_modelfile(write_modelfile(folder, gguf, tokenizer=strange, template=False).read_text()))
    assert "template" not in none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ctx": 5000}, "has 4096 positions"),
        ({"num_ctx": 0}, "num_ctx=0"),
        ({"adapter": "none.gguf"}, "no such file"),
        ({"system": 'three """\nquotes'}, "cannot hold"),
        ({"system": "no\u00a0break"}, "drops the character"),
    ],
)
def test_what_is_refused(arguments, message, saved):
    folder, gguf = saved
    with pytest.raises(ValueError, match=message):
        write_modelfile(folder, gguf, **arguments)
    assert not gguf.with_name("Modelfile").exists()


def test_a_file_that_is_no_gguf_is_refused(saved):
    folder, gguf = saved
    gguf.write_bytes(b"{}")
    with pytest.raises(ValueError, match="is no GGUF file"):
        write_modelfile(folder, gguf)


def test_the_format():
    commands = [("from", "./a b.gguf"), ("template", '"{{ x }}"\n\n '), ("parameter stop", " # "), ("system", "")]
    text = modelfile_text(commands, ["A comment\nof two lines."])
    assert read_modelfile(text) == commands
    assert read_modelfile(text.replace("SYSTEM", "system").replace("\nTEMPLATE ", "\n\n  Template  ")) == commands
    assert read_modelfile("FROM x\nSYSTEM two words") == [("from", "x"), ("system", "two words")]
    assert read_modelfile('FROM x\nSYSTEM "two\nlines"') == [("from", "x"), ("system", "two\nlines")]
    for wrong in ('FROM x\nSYSTEM """a', "SYSTEM a", "FROM x\nHELLO you"):
        with pytest.raises(ValueError, match="Modelfile: "):
            read_modelfile(wrong)
