"""What the README says is true: its example runs, its files exist, its commands are the ones that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_cl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    average, forgetting = (float(number) for number in capsys.readouterr().out.split()[-2:])
    assert namespace["summary"]["average"] == average
    assert namespace["summary"]["forgetting"] == forgetting


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_config_that_is_named_exists():
    configs = re.findall(r"configs/[\w/{},]+\.yaml", README)
    assert configs
    assert [config for config in configs if not (ROOT / config).exists()] == []


def test_the_table_of_methods_names_real_callbacks():
    names = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert {"EWC", "SI", "Replay"} <= set(names)
    assert [name for name in names if not hasattr(lightning_cl, name)] == []


def test_no_place_holder_is_left():
    assert "@@" not in README
