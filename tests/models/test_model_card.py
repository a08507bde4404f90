"""The model card that ``save_pretrained`` writes: YAML that parses, the report's numbers, no path of the machine."""

from __future__ import annotations

import json
import re

import lightning as L
import pytest
import torch
import yaml
from toys import TINY_LLAMA, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import EWC, CausalLM, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.evaluation.model_card import describe_base, model_card
from lightning_cl.evaluation.tables import SCORES
from lightning_cl.version import __version__

HOSTILE = "<b>a|b</b> [x](http://x.y) *z* `q`"
TEXTS = {
    "animals": [f"the {animal} sleeps in the barn" for animal in ("cat", "dog", "owl", "hen", "fox")] * 2,
    HOSTILE: [f"def {name}(x): return x + 1" for name in ("cat", "dog", "owl", "hen", "fox")] * 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run from a local base, with an adapter: its root, its module and its report."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA, vocab_size=270)).save_pretrained(root / "base")
    module = CausalLM(str(root / "base"), lora={"r": 2}, schedule=None)
    data = TaskDataModule(TEXTS, tokenizer=TrainedBPE(270, str(root / "bpe")), max_length=24, batch_size=4)
    L.seed_everything(0, verbose=False)
    fit_tasks(trainer(root, [TaskMatrix(), EWC(samples=2)], max_steps=2), module, data)
    return root, module, json.loads((root / "report.json").read_text())


def parts(text):
    """The YAML and the Markdown of a card."""
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def tables(body):
    """The cells of each table; a bar with a backslash before it separates none."""
    found = []
    for block in body.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("| ")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        found += [[rows[0], *rows[2:]]] if rows else []
    return found


def number(cell):
    return float(cell.replace("−", "-"))


def test_numbers_are_those_of_the_report(run):
    root, module, report = run
    module.save_pretrained(root / "adapter")
    front, body = parts((root / "adapter" / "README.md").read_text())
    assert front["library_name"] == "peft"
    assert "license" not in front
    assert "base_model" not in front  # a folder of this machine
    assert "# license" in (root / "adapter" / "README.md").read_text().split("---")[1]
    tasks, matrix, scores = tables(body)
    assert [row[0] for row in matrix[1:3]] == ["before training", "animals"]
    for row, values in zip(matrix[1:], report["matrix"], strict=True):
        assert [number(cell) for cell in row[1:]] == pytest.approx(values, abs=6e-4)
    known = {name: report[name] for name in SCORES if name in report}
    for row in scores[1:]:
        value = known.pop(row[0].replace(" ", "_"))
        assert row[1] == "–" if value is None else number(row[1]) == pytest.approx(value, abs=6e-4)
    assert known == {}
    for row, name in zip(tasks[1:], TEXTS, strict=True):
        assert report["measured_on"][name]["data"] in row[3]
        assert row[1] == "2"
    assert "EWC" in body
    assert __version__ in body
    assert module._base_checksum in body


def test_names_are_text_and_no_markup(run):
    body = parts((run[0] / "adapter" / "README.md").read_text())[1]
    assert "<b>" not in body
    assert "http://" not in body
    # Each row of the matrix has as many cells as its head.
    matrix = tables(body)[1]
    assert {len(row) for row in matrix} == {3}
    assert matrix[0][2] == "&lt;b&gt;a\\|b&lt;/b&gt; \\[x\\](http&#58;//x.y) \\*z\\* \\`q\\`"


def test_no_path_of_the_machine(run, tmp_path):
    root, module, _ = run
    module.save_pretrained(tmp_path / "merged", merge=True, card=root / "report.json")
    for folder in (root / "adapter", tmp_path / "merged"):
        card = (folder / "README.md").read_text()
        assert str(root) not in card
        assert not re.search(r"(?<![\w:.&;/])/\w", card)
    front, body = parts((tmp_path / "merged" / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert str(root) not in (tmp_path / "merged" / "config.json").read_text()
    assert len(tables(body)) == 3


def test_weights_that_have_changed_since_have_no_matrix(run, tmp_path):
    _, module, report = run
    assert module.run_report["matrix"] == report["matrix"]
    module.load_state_dict(module.state_dict())
    module.save_pretrained(tmp_path / "again")
    assert "there is no matrix" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "`HuggingFaceTB/SmolLM2-135M`"),
        ("gpt2", "gpt2", "`gpt2`"),
        ("/data/models/llama/", None, "`llama`, a local copy"),
        ("models/deep/llama", None, "`llama`, a local copy"),
        ("model.gguf", None, "`model.gguf`, a local copy"),
        ("sample:SmolLM2-135M-Instruct", None, "`SmolLM2-135M-Instruct`, from an installed package"),
        ({"model_type": "llama"}, None, "none: trained from scratch, a `llama`"),
    ],
)
def test_the_base_is_named_only_where_others_find_it(source, name, words):
    base = describe_base(source)
    assert (base.name, base.words) == (name, words)
    front, _ = parts(model_card(base, "model"))
    assert front.get("base_model") == name


def test_gguf_files_have_a_table_of_formats_and_lines_that_no_backticks_end():
    rows = [["format", "size"], ["gguf q8_0", "1 MB"]]
    front, body = parts(model_card(describe_base("me/base"), "quantized", formats=rows, serving="echo '```'"))
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (
        "me/base",
        "finetune",
        "gguf",
    )
    assert "gguf" in front["tags"]
    assert tables(body) == [[["format", "size"], ["gguf q8\\_0", "1 MB"]]]
    assert "````bash\necho '```'\n````" in body


def test_what_was_kept_of_the_training_data(run):
    """Counts by task, verbatim or written by the model, and where; never the folder."""
    _, _, report = run
    base = describe_base("me/base")
    assert "None: no method of the run keeps samples" in model_card(base, "model", report)
    kept = {"stored": {"animals": 1200, "a|b": 3}, "folders": ["/home/me/run"]}
    methods = {
        "Replay": kept | {"storage": "disk"},
        "DERpp": kept | {"storage": "memory"},
        "SelfReplay": {"stored": {"animals": 9}, "beginnings": {"animals": 4}},
    }
    card = model_card(base, "model", report | {"methods": methods})
    assert "/home/me" not in card
    table = next(table for table in tables(parts(card)[1]) if table[0][0] == "method")
    counts = "animals: 1,200, a\\|b: 3"
    assert table[1:] == [
        ["Replay", "training samples, verbatim", counts, "in the run's folder"],
        ["DERpp", "training samples, verbatim", counts, "in the run's checkpoints"],
        ["SelfReplay", "samples that the model has written", "animals: 9", "in the run's folder"],
        ["SelfReplay", "beginnings of training samples, verbatim", "animals: 4", "in the run's folder"],
    ]
    assert "It is not in this folder" in card


@pytest.mark.parametrize("card", ["nowhere.json", {"matrix": []}, [1]])
def test_what_is_no_report_is_refused_before_anything_is_written(run, tmp_path, card):
    with pytest.raises(ValueError, match=r"card=.*report"):
        run[1].save_pretrained(tmp_path / "model", card=card)
    assert not (tmp_path / "model").exists()
