"""Files of models: those of others are named when they cannot be read, our own are compared with their checksums."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_in import save_stand_in

from lightning_cl.data.text import pretrained
from lightning_cl.data.text.model_files import damaged_in, write_checksums
from lightning_cl.data.text.tokenizer import load_tokenizer
from lightning_cl.models.loading import load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"))


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "junk": lambda content: b"\xff" * 500,
    "another": lambda content: b"[]",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_a_model_that_cannot_be_read_is_named(whole, tmp_path, name, damage):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    load, what = (load_tokenizer, "tokenizer") if name == "tokenizer.json" else (load_pretrained, "model")
    with pytest.raises(ValueError, match=f"{what}='.*{re.escape(str(folder / name))} is damaged or cut off"):
        load(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 500, b"GGUF\x03\0\0\0" + b"\x05" * 40], ids=["empty", "junk", "cut"]
)
@pytest.mark.parametrize(("load", "what"), [(load_pretrained, "model"), (load_tokenizer, "tokenizer")])
def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path, content, load, what):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{what}='.*{re.escape(str(path))} cannot be read"):
        load(str(path))


def test_a_folder_of_ours_is_compared_with_its_checksums(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    (tmp_path / "b.json").write_text("{}")
    write_checksums(tmp_path)
    assert damaged_in(tmp_path) is None
    for name in ("a.bin", "b.json", "checksums.json"):
        content = (tmp_path / name).read_bytes()
        for place in range(0, len(content), 1 + len(content) // 9):
            (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
            assert str(tmp_path) in damaged_in(tmp_path), (name, place)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.bin").unlink()
    assert damaged_in(tmp_path) == f"{tmp_path / 'a.bin'} is missing"


def test_a_damaged_sample_in_the_cache_is_made_again(tmp_path, monkeypatch, whole):
    package = tmp_path / "package"
    package.mkdir()
    (_, file) = pretrained._PACKAGES["SmolLM2-135M-Instruct"]
    (package / file).write_bytes(b"x" * 10)
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    made = []

    def convert(gguf, folder):
        made.append(folder)
        shutil.copytree(whole, folder, dirs_exist_ok=True)

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    folder = pretrained.sample_model("sample:SmolLM2-135M-Instruct")
    assert pretrained.sample_model("sample:SmolLM2-135M-Instruct") == folder
    assert len(made) == 1
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    pretrained._damaged.cache_clear()  # as in another process
    with pytest.warns(UserWarning, match=rf"{re.escape(str(path))} is damaged.*made again"):
        pretrained.sample_model("sample:SmolLM2-135M-Instruct")
    assert path.read_bytes() == content
    pretrained.sample_model("sample:SmolLM2-135M-Instruct", "tokenizer")
    assert len(made) == 2
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]
    assert {entry.name for entry in folder.iterdir()} == {entry.name for entry in Path(whole).iterdir()} | {
        "checksums.json"
    }
