"""What a newcomer does in the first hour: overlays, own classes, typos, wrong tuples, threads."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import lightning as L
import pytest
import torch
import yaml
from test_cli import QUICKSTART, Output, config_of
from torch.utils.data import DataLoader
from toys import Classifier, classification, trainer

import lightning_cl
from lightning_cl import TaskDataModule
from lightning_cl.cli.overlays import merged_overlays
from lightning_cl.cli.threads import SensibleThreads

pytestmark = pytest.mark.filterwarnings("ignore")


def overlay(folder, content, name="overlay.yaml"):
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name


def test_an_overlay_changes_one_key_of_a_dictionary(tmp_path):
    path = overlay(tmp_path, {"model": {"init_args": {"model": {"hidden_size": 80}}}})
    model = config_of("--config", QUICKSTART, "--config", path)["model"]["init_args"]["model"]
    assert (model["hidden_size"], model["num_hidden_layers"], model["model_type"]) == (80, 4, "llama")


def test_another_architecture_and_other_tasks_replace_what_was_there(tmp_path):
    content = {
        "model": {"init_args": {"model": {"model_type": "gpt2", "n_embd": 32}}},
        "data": {"tasks": {"mine": "sample:prose"}},
    }
    config = config_of("--config", QUICKSTART, f"--config={overlay(tmp_path, content)}")
    assert config["model"]["init_args"]["model"] == {"model_type": "gpt2", "n_embd": 32}
    assert list(config["data"]["tasks"]) == ["mine"]


def test_three_files_and_an_argument_of_lora(tmp_path):
    first = overlay(tmp_path, {"model": {"init_args": {"lora": {"r": 8, "lora_dropout": 0.1}}}}, "a.yaml")
    second = overlay(tmp_path, {"model": {"init_args": {"lora": {"r": 4}}}}, "b.yaml")
    third = overlay(tmp_path, {"model": {"init_args": {"lora": None}}}, "c.yaml")
    lora = config_of("--config", QUICKSTART, "--config", first, "--config", second)["model"]["init_args"]["lora"]
    assert lora == {"r": 4, "lora_dropout": 0.1}
    given = ["--config", str(first), "--config", str(second), "--config", str(third)]
    assert merged_overlays(given, tmp_path)[-1] == str(third)


def test_own_classes_are_found_in_the_working_directory(tmp_path):
    (tmp_path / "my_methods.py").write_text("import lightning as L\n\n\nclass Mine(L.Callback):\n    pass\n")
    path = overlay(tmp_path, {"trainer": {"callbacks+": [{"class_path": "my_methods.Mine"}]}})
    code = "import sys; sys.path = [p for p in sys.path if p]; from lightning_cl.cli.command import main; main()"
    command = ["-c", code, "fit", "--config", QUICKSTART, "--config", path, "--print_config"]
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_cl.__file__).parents[1]), "PYTHONSAFEPATH": "1"}
    done = forked.run(*command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "class_path: my_methods.Mine" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "name", "option", "right"),
    [
        (["--model.lr", "0.1"], None, "", "did you mean --model.optimizer.lr?"),
        ([], "Replay", "buffersize", "Replay takes buffer_size"),
        ([], "Replay", "buffersize", "did you mean 'buffer_size', an argument of Replay?"),
        ([], "EWC", "sample", "did you mean 'samples', an argument of EWC?"),
    ],
)
def test_a_suggestion_looks_inside_the_object_that_is_meant(tmp_path, arguments, name, option, right):
    if name is not None:
        content = {"class_path": f"lightning_cl.{name}", "init_args": {option: 10}}
        arguments = ["--config", overlay(tmp_path, {"trainer": {"callbacks+": [content]}})]
    output = Output("fit", "--config", QUICKSTART, *arguments)
    assert output.code == 2
    assert right in output.err


@pytest.mark.parametrize("kind", ["sets", "loaders", "files"])
def test_a_tuple_of_training_and_validation_data_says_how_it_is_given(tmp_path, kind):
    train, val = classification(0), classification(1)
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("text")
    source = {
        "sets": (train, val),
        "loaders": (DataLoader(train), DataLoader(val)),
        "files": (str(tmp_path / "train.txt"), str(tmp_path / "val.txt")),
    }[kind]
    with pytest.raises(TypeError, match=r'task \'a\': a tuple of 2 sources; give \{"train": …, "val": …\}'):
        TaskDataModule({"a": source})


def test_the_command_line_is_public():
    from lightning.pytorch.cli import LightningCLI

    assert issubclass(lightning_cl.ContinualCLI, LightningCLI)


@pytest.mark.parametrize(("given", "size", "threads"), [(None, "few", 1), ("3", "few", 3), (None, "many", 3)])
def test_a_small_model_has_one_thread_unless_somebody_decides(tmp_path, monkeypatch, caplog, given, size, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    if size == "many":
        monkeypatch.setattr("lightning_cl.cli.threads.SMALL", 10)
    torch.set_num_threads(3)
    try:
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            run = trainer(tmp_path, [SensibleThreads()], max_steps=1)
            run.fit(Classifier(), DataLoader(classification(0), 8))
        assert torch.get_num_threads() == threads
        assert any("One thread instead of 3" in message for message in caplog.messages) == (threads == 1)
    finally:
        torch.set_num_threads(before)
        L.seed_everything(0, verbose=False)
