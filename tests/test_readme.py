"""What the README says is true: its example runs, its files exist, its commands are the ones that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_layers import LAYERS

import lightning_cl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "configs/README.md", "notebooks/README.md", "tests/benchmarks/README.md"]


def test_the_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    average, forgetting = (float(number) for number in capsys.readouterr().out.split()[-2:])
    assert namespace["summary"]["average"] == average
    assert namespace["summary"]["forgetting"] == forgetting


@pytest.mark.parametrize("file", PAGES)
def test_linked_files_exist(file):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text())
    assert links
    assert [link for link in links if not ((ROOT / file).parent / link).exists()] == []


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_readme_shows_the_layers_that_the_code_is_held_against():
    table = README.split("holds the code against it:")[1].split("**Add a method")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.count("|") == 3][2:]
    shown = re.findall("[a-z_]+", " ".join(rows))
    rooms = [room.split("/")[0] for layer in LAYERS for room in layer if not room.startswith("__")]
    assert shown == list(dict.fromkeys(rooms))


@pytest.mark.parametrize("file", ["README.md", "tests/benchmarks/README.md"])
def test_every_config_that_is_named_exists(file):
    configs = re.findall(r"configs/[\w/{},]+\.yaml", (ROOT / file).read_text())
    assert configs
    assert [config for config in configs if not (ROOT / config).exists()] == []


def test_the_table_of_methods_names_real_callbacks():
    names = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert {"EWC", "SI", "Replay"} <= set(names)
    assert [name for name in names if not hasattr(lightning_cl, name)] == []


def test_no_place_holder_is_left():
    assert "@@" not in README
