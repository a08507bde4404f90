"""What is handed on: no file of an export has a path of the machine, and a push refuses what must stay at home."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import byte_bpe, tiny
from toys import trainer

from lightning_cl import CausalLM, GeneralReplay, Task, TaskAdapters, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.export import push
from lightning_cl.export.handover import export_model
from lightning_cl.export.jsonl import write_jsonl
from lightning_cl.export.memory import save_buffer
from lightning_cl.export.push import push_folder

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SECRET = "secret-user-name"


class FakeHub:
    """Keeps what it is asked for."""

    public: tuple[str, ...] = ()

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **settings):
        calls.append(("create", repo_id, settings, self.token))
        self.private = settings["private"] and repo_id not in self.public
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id, repo_type):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **settings):
        calls.append(("upload", settings))


calls: list[tuple] = []


@pytest.fixture
def hub(monkeypatch):
    calls.clear()
    monkeypatch.setattr(push, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "public", ("me/known",))
    return calls


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in a user's folder, from a base that lies there too, with a replay buffer on the disk."""
    home = tmp_path_factory.mktemp("home") / SECRET
    tiny().save_pretrained(home / "base")
    tokenizer = byte_bpe()
    tokenizer.save_pretrained(home / "base")
    tasks = []
    for name in ("zoo", "ant"):
        (home / f"{name}.txt").write_text(f"The quick brown {name} sleeps in the barn. " * 40)
        tasks.append(Task(name, str(home / f"{name}.txt")))
    module = CausalLM(str(home / "base"), schedule=None, dtype="float32", lora={"r": 2})
    data = TaskDataModule(tasks, tokenizer=str(home / "base"), max_length=24, batch_size=2, seed=1)
    run = trainer(
        home / "run",
        [TaskAdapters(), TaskMatrix(), GeneralReplay(str(home / "zoo.txt"), 0.5)],
        max_steps=2,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )
    fit_tasks(run, module, data)
    torch.manual_seed(1)
    for name, parameter in module.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return home, module


@pytest.mark.parametrize("task", ["all", "zoo"])
def test_no_byte_of_an_export_names_the_user(run, task):
    home, module = run
    report = json.loads((home / "run" / "report.json").read_text())
    report["provenance"]["command"] = f"lightning-cl fit --model {home}/base"  # for the one who trained
    report["methods"]["Replay"] = {"stored": {"zoo": 3}, "storage": "disk", "folders": [str(home / "run" / "buffer")]}
    folder = home / f"out-{task}"
    done = export_model(module, folder, ["gguf", "ollama", "hf"], "f32", task, report=report)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    push.check_folder(folder)
    assert all((folder / name).exists() for each in done.formats for name in each.files)


def test_a_saved_memory_has_the_samples_and_no_path(run, hub):
    home, module = run
    folder = save_buffer(module.trainer.callbacks[2].buffer, home / "memory")
    write_jsonl(folder, byte_bpe(), folder)
    for path in filter(Path.is_file, folder.rglob("*")):
        assert SECRET.encode() not in path.read_bytes(), path
    with pytest.raises(ValueError, match="training samples"):
        push_folder(folder, "me/new")


def test_the_card_of_gguf_files(run):
    home, module = run
    report = json.loads((home / "run" / "report.json").read_text())
    export_model(module, home / "card", ["gguf", "ollama"], ["f32", "q8_0"], "all", report=report)
    card = (home / "card" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "| gguf q8\\_0 | " in card
    assert "| GeneralReplay | training samples, verbatim | general: " in card
    assert "--lora adapters/zoo.gguf --lora adapters/ant.gguf" in card
    assert "ollama create card-f32-zoo -f Modelfile.zoo" in card


# ---------------------------------------------------------------------- a push


@pytest.fixture
def exported(tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "a" / "model.safetensors").write_bytes(b"\0" * 100)
    return tmp_path / "out"


def test_a_repository_is_private_unless_somebody_says_otherwise(hub, exported):
    assert push_folder(exported, "me/new", token="t") == "https://huggingface.co/me/new"
    push_folder(exported, "me/known", private=False, message="Words")
    created, sent, public, words = hub
    assert created == ("create", "me/new", {"private": True, "repo_type": "model", "exist_ok": True}, "t")
    assert sent[1]["repo_id"] == "me/new"
    assert sent[1]["folder_path"] == exported
    assert public[2]["private"] is False
    assert words[1]["commit_message"] == "Words"


def test_nothing_is_sent_to_a_public_repository_that_was_there(hub, exported):
    with pytest.raises(ValueError, match=r"repo_id='me/known': the repository is there and public"):
        push_folder(exported, "me/known")
    assert [call[0] for call in hub] == ["create"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        (None, "no text"),
        ("name", "has no owner"),
        ("/home/me/model", "is a path"),
        ("./me/model", "is a path"),
        ("~/model", "is a path"),
        (r"C:\model", "is a path"),
        ("a/b/c", "is a path"),
        ("https://huggingface.co/me/model", "is an address"),
        ("me/my model", "alphanumeric"),
        ("me/model.git", "cannot end by"),
    ],
)
def test_what_is_no_repositorys_name_is_told(hub, exported, name, reason):
    with pytest.raises(ValueError, match=rf"repo_id=.*{reason}.*expected 'owner/name'"):
        push_folder(exported, name)
    assert hub == []


@pytest.mark.parametrize("place", ["home", "cwd", "folder", "json", "address", "edge"])
def test_a_path_of_the_machine_is_found_and_its_file_named(hub, exported, tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path / "Jörg Müller"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    home = str(tmp_path / "Jörg Müller")
    text = {
        "home": f"x {home}/models/base",
        "cwd": f"run in {work}.",
        "folder": str(exported),
        "json": json.dumps({"_name_or_path": home}),
        "address": "file://" + home.replace("ö", "%C3%B6").replace("ü", "%C3%BC").replace(" ", "%20"),
        "edge": "\0" * (push._CHUNK - 10) + home,
    }[place]
    (exported / "a" / "model.safetensors").write_bytes(text.encode())
    with pytest.raises(ValueError, match=r"^a/model\.safetensors: has a path of this machine"):
        push_folder(exported, "me/new")
    assert hub == []
    # A folder whose name only begins so is another one; and of a short one the name is in vocabularies.
    (exported / "a" / "model.safetensors").write_text(f'{work}shop {{"/root": 1}}')
    monkeypatch.setenv("HOME", "/root")
    push_folder(exported, "me/new")
    (exported / "a" / "model.safetensors").write_text('"/root/base"')
    with pytest.raises(ValueError, match="/root/b"):
        push_folder(exported, "me/new")


@pytest.mark.parametrize("name", ["last.ckpt", "names.jsonl", "memory.json"])
def test_training_samples_stay_at_home(hub, exported, name):
    (exported / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name}: .*training samples"):
        push_folder(exported, "me/new")
    with pytest.raises(ValueError, match="has no files"):
        push_folder(exported / "nowhere", "me/new")
    with pytest.raises(ValueError, match="private='yes'"):
        push_folder(exported, "me/new", private="yes")
