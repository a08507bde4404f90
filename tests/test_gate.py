"""``lightning-cl gate``: verdicts, exit codes, JSON and Markdown."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_cl.cli.command import main


def write(folder, now=0.0, noise=0.01, watched=0.0, drop=(), trained=2, not_finite=()):
    """A run of the tasks `a|b` and `last` with a watched one; training gave `a|b` one nat."""
    generator = torch.Generator().manual_seed(0)
    learnt = 1 + torch.rand(64, generator=generator, dtype=torch.float64)
    paired = noise * torch.randn(64, generator=generator, dtype=torch.float64)
    losses = {
        "a|b": {"watched": False, "before": learnt + 1, "learnt": learnt, "now": learnt + now + paired},
        "last": {"watched": False, "before": learnt + 1, "learnt": learnt, "now": learnt},
        "<w>": {"watched": True, "before": None, "learnt": learnt, "now": learnt + watched + paired},
    }
    plain = {
        name: {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in one.items()}
        for name, one in losses.items()
        if name not in drop
    }
    report = {
        "tasks": ["a|b", "last", "<w>"],
        "watched": ["<w>"],
        "monitor": "val_loss",
        "matrix": [[2.0, 2.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]],
        "not_finite": [{"task": name, "row": 2} for name in not_finite],
    }
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    if drop != "all":
        (folder / "losses.json").write_text(json.dumps({"format": 1, "trained": trained, "tasks": plain}))
    return folder


def gate(capsys, *arguments):
    try:
        main(["gate", *map(str, arguments)])
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("run", "options", "code"),
    [
        ({"now": 0.05}, [], 0),
        ({"now": 0.2}, [], 2),
        ({"now": 0.2}, ["--budget", "0.7"], 0),
        ({"now": 0.2}, ["--budget", "0.3", "--unit", "nats"], 0),
        ({"now": 0.1, "noise": 0.1}, [], 3),
        ({"watched": 0.5}, [], 2),
        ({"drop": "all"}, [], 3),
        ({"drop": ["<w>"]}, [], 3),
        ({"drop": ["<w>"], "now": 0.2}, [], 2),
        ({"drop": "all", "not_finite": ["a|b"]}, [], 2),
    ],
)
def test_exit_codes(tmp_path, capsys, run, options, code):
    assert gate(capsys, "--run", write(tmp_path / "run", **run), *options)[0] == code


def test_json_has_each_task_and_its_numbers(tmp_path, capsys):
    code, output = gate(capsys, "--run", write(tmp_path / "run", now=0.2), "--json")
    found = json.loads(output.out)
    assert code == found["code"] == 2
    first, watched = found["tasks"]
    assert (first["task"], first["decision"], first["n"]) == ("a|b", "breach", 64)
    assert first["D"] == pytest.approx(0.2, abs=0.01)
    assert first["kept"] == pytest.approx(0.8, abs=0.01)
    assert first["allowed"] == pytest.approx(0.1)
    assert (watched["task"], watched["decision"], watched["kept"]) == ("<w>", "safe", None)


def test_markdown_and_text_show_names_as_text(tmp_path, capsys):
    run = write(tmp_path / "run", now=0.2)
    _, output = gate(capsys, "--run", run, "--markdown")
    lines = output.out.splitlines()
    assert lines[0] == "### ❌ Forgetting: the budget is exceeded (budget: 90% kept, confidence 95%)"
    assert lines[4].startswith("| a\\|b | +0.2")
    assert "&lt;w&gt; (watched)" in lines[5]
    assert len({line.replace("\\|", "").count("|") for line in lines[2:-2]}) == 1
    assert "may be unlike each of them" in lines[-1]
    _, output = gate(capsys, "--run", run)
    assert "a|b" in output.out
    assert "over" in output.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "90"], "--budget=90.0: expected a share"),
        (["--budget", "x"], "invalid float value"),
        (["--unit", "nats"], "unit='nats': give --budget, the rise of the loss to allow, as in --budget=0.05"),
        (["--confidence", "1"], "--confidence=1.0"),
        (["--json", "--markdown"], "not allowed with"),
    ],
)
def test_a_wrong_call_is_an_error_of_its_own(tmp_path, capsys, arguments, words):
    code, output = gate(capsys, "--run", write(tmp_path / "run"), *arguments)
    assert code == 1
    assert words in output.err


def test_files_of_two_moments_and_no_run_are_errors(tmp_path, capsys):
    code, output = gate(capsys, "--run", write(tmp_path / "run", trained=1))
    assert code == 1
    assert "after 1 tasks and report.json after 2" in output.err
    code, output = gate(capsys, "--run", tmp_path / "none")
    assert code == 1
    assert "there is no report.json" in output.err


@pytest.mark.parametrize(("drop", "words"), [("all", "train with ForgettingBudget"), (["<w>"], "did not guard it")])
def test_what_is_lacking_is_named(tmp_path, capsys, drop, words):
    assert words in gate(capsys, "--run", write(tmp_path / "run", drop=drop))[1].out
