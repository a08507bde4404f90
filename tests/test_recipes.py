"""The recipes for large models, run on a small stand-in: the same keys, other sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from stand_in import chats, save_stand_in, sentence, write_jsonl

from lightning_cl.cli.command import main
from lightning_cl.core.checkpoint_io import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """What the recipes expect below data/, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    write_jsonl(folder / "chat.jsonl", chats(12))
    pairs = [{"prompt": sentence(i), "completion": " " + sentence(i + 50, 25)} for i in range(40)]
    write_jsonl(folder / "questions.jsonl", pairs)
    write_jsonl(folder / "mails.jsonl", pairs)
    for number, name in enumerate(("north", "south", "west")):
        write_jsonl(folder / f"customer-{name}.jsonl", pairs[number::3])
    dolly = [
        {"instruction": sentence(i), "context": "", "response": sentence(i + 9), "category": "x"} for i in range(30)
    ]
    write_jsonl(folder / "databricks-dolly-15k.jsonl", dolly)
    write_jsonl(folder / "held-out.jsonl", dolly[:6])
    write_jsonl(folder / "known.jsonl", [{"text": sentence(i, 40)} for i in range(12)])
    (folder / "general.txt").write_text(sentence(99, 60))
    for name in ("src", "language"):
        (folder / name).mkdir()
        for i in range(8):
            (folder / name / f"file{i}.{'py' if name == 'src' else 'txt'}").write_text(sentence(i + 20, 50))
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_a_stand_in(recipe, model, data, tmp_path):
    if yaml.safe_load(recipe.read_text())["model"]["init_args"].get("quantization"):
        pytest.importorskip("bitsandbytes")
    smaller = tmp_path / recipe.name
    text = re.sub(r"max_steps: \d+", "max_steps: 2", recipe.read_text())
    smaller.write_text(re.sub(r"max_new_tokens: \d+", "max_new_tokens: 2", text))
    names = ["--model.model", model, "--data.tokenizer", model, "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(smaller), *names, "--data.max_length", "128", "--trainer.limit_train_batches", "16"])

    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/version_0/report.json"))
    settings = yaml.safe_load(recipe.read_text())
    tasks = list(settings["data"]["tasks"])
    assert report["tasks"] == tasks
    assert all(value is not None for row in report["matrix"] for value in row)
    assert set(report["methods"]["KLToBase"]["kl"]) == {task for task in tasks if task != "general"}
    replays = any("Replay" in c["class_path"] for c in settings["trainer"]["callbacks"])
    replayed = [cost["replayed_tokens"] for cost in report["costs"]["tasks"]]
    shares = [c["init_args"]["ratio"] for c in settings["trainer"]["callbacks"] if "GeneralReplay" in c["class_path"]]
    new = report["costs"]["tasks"][0]["new_tokens"]
    assert replayed[0] / (new + replayed[0]) == pytest.approx(sum(shares), abs=0.1)
    assert (replayed[-1] > 0) == replays
    for path in tmp_path.glob("runs/*/version_0/tasks/*.ckpt"):
        state = read_checkpoint(path)["state_dict"]
        assert state
        assert all("lora_" in name for name in state)
        assert all(value.dtype == torch.float32 for value in state.values())


def test_rehearsal_with_kl_to_the_base_next_to_a_recipe(model, data, tmp_path):
    """No old data: Replay is taken out, and the overlay put in."""
    recipe = yaml.safe_load((CONFIGS / "recipes" / "new-language.yaml").read_text())
    recipe["model"]["init_args"].pop("quantization")
    recipe["data"]["tasks"]["known"]["max_steps"] = 2
    recipe["trainer"]["callbacks"] = [c for c in recipe["trainer"]["callbacks"] if "Replay" not in c["class_path"]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    overlay = (CONFIGS / "methods" / "self_replay_to_base.yaml").read_text()
    (tmp_path / "overlay.yaml").write_text(re.sub(r"samples: \d+, ", "samples: 12, ", overlay).replace("127", "8"))
    configs = ["--config", str(tmp_path / "recipe.yaml"), "--config", str(tmp_path / "overlay.yaml")]
    names = ["--model.model", model, "--data.tokenizer", model, "--trainer.accelerator", "cpu"]
    smaller = ["--data.max_length", "64", "--trainer.limit_train_batches", "8", "--trainer.precision", "32"]
    main(["fit", *configs, *names, *smaller, "--trainer.log_every_n_steps", "1"])
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/version_0/report.json"))
    assert set(report["methods"]["SelfReplay"]["tasks"]) >= {"known", "language"}
    assert report["methods"]["LwF"]["where"] == "replayed"
    assert report["methods"]["LwF"]["teacher"] == "base"


def test_recipes_say_what_memory_they_take():
    assert len(RECIPES) >= 3
    for recipe in RECIPES:
        assert "24 GB card" in recipe.read_text()
        assert re.search(r"Memory, about \d+ GB", recipe.read_text())
