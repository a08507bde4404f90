"""``lightning-cl export``: the final model, that of an earlier task, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import Output
from test_cli_runs import configuration

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of two tasks."""
    root = tmp_path_factory.mktemp("run")
    for name, text in {"zoo": "The quick brown fox sleeps in the barn. ", "ant": "def add(a, b):\n    pass\n"}.items():
        (root / f"{name}.txt").write_text(text * 60)
    settings = configuration(root, root)
    replay = {"class_path": "lightning_cl.Replay", "init_args": {"buffer_size": 8, "ratio": 0.25}}
    settings["trainer"]["callbacks"] = [{"class_path": "lightning_cl.TaskMatrix"}, replay]
    (root / "start.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert Output("fit", "--config", root / "start.yaml").code == 0
    return root / "runs" / "version_0"


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("lm."): value for name, value in state.items()}


@pytest.mark.parametrize(("task", "file", "place"), [(None, "1-ant", "final"), ("zoo", "0-zoo", "zoo")])
def test_the_weights_are_those_after_the_last_task_or_after_the_one_that_is_named(run, task, file, place):
    given = [] if task is None else ["--task", task]
    output = Output("export", run, "--to", "gguf,ollama,hf", "--type", "f32", "--tokens", 8, *given)
    assert output.code == 0, output.err
    folder = run / "export" / place
    saved, expected = load_file(folder / "hf" / "model.safetensors"), weights(run / "tasks" / f"{file}.ckpt")
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    assert {path.name for path in folder.iterdir()} >= {"runs-f32.gguf", "Modelfile", "export.json"}
    table = [line.split() for line in output.out.splitlines() if line.startswith("  gguf")]
    assert [float(cell) for cell in table[0][4:6]] == pytest.approx([0.0, 0.0], abs=2e-3)
    index = json.loads((folder / "export.json").read_text())
    assert index["tokens"] == {"zoo": 8, "ant": 8}
    assert str(run.parent) not in (folder / "export.json").read_text()


@pytest.mark.parametrize("public", [False, True])
def test_a_push_is_private_unless_it_is_said_to_be_public(run, tmp_path, monkeypatch, public):
    asked = []
    monkeypatch.setattr(
        "lightning_cl.cli.export.push_folder", lambda *a, **k: asked.append((a, k)) or "https://hub/a/b"
    )
    given = ["--public"] if public else []
    output = Output("export", run, "--to", "hf", "--out", tmp_path / "out", "--push", "a/b", *given)
    assert output.code == 0, output.err
    assert asked == [((tmp_path / "out", "a/b"), {"private": not public})]
    assert f"https://hub/a/b: {'public' if public else 'private'}" in output.out


def test_the_memory_goes_into_a_folder_of_its_own(run, tmp_path):
    output = Output("export", run, "--to", "hf", "--out", tmp_path / "out", "--memory", tmp_path / "memory")
    assert output.code == 0, output.err
    assert "8 samples of the buffer of Replay, which are training data, word for word" in output.out
    lines = [
        json.loads(line)["text"]
        for name in ("train.jsonl", "valid.jsonl")
        for line in (tmp_path / "memory" / name).read_text().splitlines()
    ]
    assert len(lines) == 8
    assert any("quick" in line for line in lines)
    assert not any(b"quick brown" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], r"to=\['onnx'\]: expected some of"),
        (["--type", "q9"], "type='q9': expected one of"),
        (["--task", "cow"], "--task=cow: expected one of zoo, ant"),
        (["more"], "'more': expected one run's folder"),
        (["--type", "q4_k_m"], "type='q4_k_m': is a mix of types.*expected 'q4_k'.*llama-quantize"),
        (["--memory", "RUN/export/final/memory"], "is in the model's folder"),
        (["--push", "mine"], "repo_id='mine': has no owner"),
        (["--public"], "--public: of the repository that --push names"),
    ],
)
def test_a_wrong_argument_is_answered_on_one_line(run, arguments, message):
    import re

    output = Output("export", run, *(argument.replace("RUN", str(run)) for argument in arguments))
    assert output.code == 1
    assert re.search(message, output.err)
    assert "Traceback" not in output.err


def test_an_export_with_fewer_formats_does_not_replace_one(run, tmp_path):
    assert Output("export", run, "--to", "hf, gguf", "--type", "Q8_0", "--out", tmp_path, "--tokens", 8).code == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    output = Output("export", run, "--to", "hf", "--out", tmp_path)
    assert output.code == 1
    assert "has gguf q8_0 of an earlier export, which would be replaced" in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Output("export", run, "--to", "hf,ollama", "--type", "q8_0", "--out", tmp_path, "--tokens", 8).code == 0


def test_a_folder_that_is_no_run_is_named(tmp_path):
    output = Output("export", tmp_path)
    assert output.code == 1
    assert f"--run={tmp_path}" in output.err
