"""What ``--run`` of somebody else's folder may import, and configurations that no parser should meet."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_cli import QUICKSTART, ROOT, Output, config_of

from lightning_cl.cli.earlier_run import expand_run
from lightning_cl.cli.trust import ask_for_trust, foreign_code
from lightning_cl.cli.yaml_files import read_yaml

pytestmark = pytest.mark.filterwarnings("ignore")
SUBCOMMANDS = ("fit", "validate", "test", "predict")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A module of somebody else's in the working directory, which says when it is imported."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('imported').touch()\nclass Thing: pass\n")
    (tmp_path / "code.txt").write_text("a data file that is called as a module of Python's is")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def folder_with(root: Path, **changes) -> Path:
    config = {"model": {"class_path": "lightning_cl.CausalLM"}, "data": {"tasks": {"a": "code.txt"}}, **changes}
    (root / "run").mkdir(exist_ok=True)
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return root / "run"


FOREIGN = {
    "class_path": ({"model": {"class_path": "evil.Thing"}}, "evil.Thing"),
    "a class by its bare name": ({"trainer": {"callbacks": ["evil.Thing"]}}, "evil.Thing"),
    "a function": ({"model": {"init_args": {"optimizer": "os.system"}}}, "os.system"),
    "a class inside a class": ({"trainer": {"logger": [{"init_args": {"x": {"class_path": "evil.A"}}}]}}, "evil.A"),
    "a package that is not installed": ({"model": {"class_path": "nowhere.to.be.Found"}}, "nowhere.to.be.Found"),
    "a text that is a configuration": ({"model": '{"class_path": "evil.Thing"}'}, "evil.Thing"),
    "a text that is a list": ({"trainer": {"callbacks": "[evil.Thing]"}}, "evil.Thing"),
    "put together": ({"a": "ev", "model": {"class_path": "${a}il.Thing"}}, "${a}il.Thing"),
    "a further file": ({"model": "more.yaml"}, "evil.Other"),
    "code of a model": ({"model": {"init_args": {"model_kwargs": {"trust_remote_code": True}}}}, "trust_remote_code"),
    "code of a model, as a text": ({"model": {"init_args": {"x": '{"trust_remote_code": 1}'}}}, "trust_remote_code"),
}


@pytest.mark.parametrize(("changes", "named"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("subcommand", ["predict", "fit"])
def test_foreign_code_is_listed_and_not_run(theirs, changes, named, subcommand):
    (theirs / "more.yaml").write_text("class_path: evil.Other\n")
    folder = folder_with(theirs, **changes)
    with pytest.raises(ValueError, match=r"--run=.*--trust") as error:
        expand_run([subcommand, "--run", str(folder)], SUBCOMMANDS)
    assert named in str(error.value)
    assert not (theirs / "imported").exists()
    with pytest.raises(FileNotFoundError, match="checkpoint"):  # the next thing that is looked at
        expand_run([subcommand, "--run", str(folder), "--trust"], SUBCOMMANDS)


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_command_that_takes_a_run_asks(theirs, subcommand):
    folder = folder_with(theirs, trainer={"callbacks": [{"class_path": "evil.Thing"}]})
    output = Output(subcommand, "--run", folder)
    assert output.code == 1
    line = output.err.splitlines()[-1]
    assert line.startswith("lightning-cl: error: --run=")
    assert "evil.Thing" in line
    assert not (theirs / "imported").exists()


@pytest.mark.parametrize("value", [False, None, "false", 0])
def test_code_of_a_model_that_is_not_trusted_is_no_matter(theirs, value):
    assert list(foreign_code({"model_kwargs": {"trust_remote_code": value}})) == []


def test_what_this_package_writes_is_never_asked_about(theirs):
    for path in [*(ROOT / "configs").rglob("*.yaml")]:
        assert list(foreign_code(yaml.safe_load(path.read_text()))) == [], path
    assert (
        list(foreign_code({"tasks": {"code": "code.txt", "mails": "data/mails.jsonl", "x": "1.5", "y": "e.g."}})) == []
    )
    assert list(foreign_code(config_of("--config", QUICKSTART))) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("answer", "agreed"), [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_a_terminal_is_asked(theirs, monkeypatch, answer, agreed):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = {"model": {"class_path": "evil.Thing"}}
    if agreed:
        ask_for_trust(theirs, config, trusted=False)
    else:
        with pytest.raises(ValueError, match=r"evil\.Thing.*--trust"):
            ask_for_trust(theirs, config, trusted=False)
    assert "evil.Thing" in sys.stderr.getvalue()
    assert "[y/N]" in sys.stderr.getvalue()


def test_trust_without_a_run_means_nothing():
    output = Output("fit", "--config", QUICKSTART, "--trust")
    assert output.code == 1
    assert "--trust" in output.err
    assert "--trust" in Output("predict", "--help").out


# ---------------------------------------------------------------------- files that no parser should meet

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "aliases": (BOMB, "aliases"),
    "an alias inside itself": ("a: &a [*a]\n", "contains itself"),
    "nested": ("a: " + "[" * 20_000, "nested too deeply"),
    "a long number": ("seed_everything: " + "9" * 5000, "4300"),
    "no YAML": ("a: [1, 2", "cannot be read"),
    "code": ("a: !!python/object/apply:os.system [ls]", "cannot be read"),
}


@pytest.mark.parametrize(("text", "reason"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("how", ["config", "second config", "run"])
def test_a_hostile_configuration_is_an_error_at_once(tmp_path, text, reason, how):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    arguments = {
        "config": [f"--config={path}"],
        "second config": ["--config", QUICKSTART, "--config", path],
        "run": ["--run", tmp_path],
    }[how]
    start = time.monotonic()
    output = Output("fit", *arguments)
    assert time.monotonic() - start < 10
    assert output.code == 1
    line = output.err.splitlines()[-1]
    assert str(path) in line
    assert reason in line


def test_aliases_that_people_write_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "x: &x {lr: 0.1, betas: [0.9, 0.95]}\n" + "".join(f"t{i}: *x\n" for i in range(50))
    )
    assert len(read_yaml(tmp_path / "a.yaml", "--config")) == 51
