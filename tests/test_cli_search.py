"""``--strengths``: the choice never sees a later task, the run at the end is a plain one, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import yaml
from test_cli import Output
from test_cli_seeds import configuration

from lightning_cl.cli import processes
from lightning_cl.cli import strengths as cli_search
from lightning_cl.cli.strengths import keep_first, parse_first, parse_strengths, set_strength

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore")


def with_ewc(root, **ewc):
    """Three tasks, an EWC that leaves its mark, and a callback without a strength."""
    config = configuration(root)
    shutil.copy(root / "zoo.jsonl", root / "later.jsonl")
    config["data"]["tasks"]["later"] = str(root / "later.jsonl")
    callbacks = [{"class_path": "lightning_cl.EWC", "init_args": {"strength": 7.0, "samples": 4} | ewc}]
    config["trainer"]["callbacks"] += callbacks
    config["trainer"]["log_every_n_steps"] = 1
    (root / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    with_ewc(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(processes, "subprocess", forked.SUBPROCESS)
        output = Output("fit", "--strengths", "0,1e9", "--first", "2", "--config", root / "tiny.yaml")
    assert output.code == 0, output.err
    return root, json.loads((root / "tiny" / "search-0" / "search.json").read_text()), output


def report(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def test_strengths_are_tried_on_the_first_tasks_alone(search):
    _, found, _ = search
    assert [trial["strength"] for trial in found["trials"]] == [0.0, 1e9]
    for trial in found["trials"]:
        seen = report(trial["folder"])
        assert seen["tasks"] == ["zoo", "ant"]  # the third task has no column, watched or not
        assert len(seen["matrix"]) == 3
        assert seen["methods"]["EWC"]["strength"] == trial["strength"]
        assert trial["average"] == seen["average"]


def test_the_best_average_trains_all_tasks(search):
    root, found, output = search
    averages = {trial["strength"]: trial["average"] for trial in found["trials"]}
    assert averages[0.0] != averages[1e9]
    assert found["best"] == min(averages, key=averages.get)
    seen = report(found["run"])
    assert seen["tasks"] == ["zoo", "ant", "later"]
    assert seen["methods"]["EWC"]["strength"] == found["best"]
    saved = yaml.safe_load((Path(found["run"]) / "config.yaml").read_text())
    ewc = next(c for c in saved["trainer"]["callbacks"] if c["class_path"].endswith("EWC"))
    assert ewc["init_args"]["strength"] == found["best"]  # the saved configuration is that of the run
    assert "best" in output.out
    assert str(root / "tiny" / "search-0" / "search.json") in output.out


def test_the_run_at_the_end_is_a_plain_run_with_that_strength(search, tmp_path):
    root, found, _ = search
    config = yaml.safe_load((root / "tiny.yaml").read_text())
    config["trainer"]["callbacks"][-1]["init_args"]["strength"] = found["best"]
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert Output("fit", "--config", tmp_path / "plain.yaml").code == 0
    assert report(tmp_path / "tiny" / "version_0")["matrix"] == report(found["run"])["matrix"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.1,1", (None, [0.1, 1.0])), ("EWC=1e-3,0", ("EWC", [1e-3, 0.0])), ("KFACEWC=1,2,3", ("KFACEWC", [1, 2, 3]))],
)
def test_strengths_with_and_without_a_callback(text, expected):
    assert parse_strengths(text) == expected


@pytest.mark.parametrize("text", ["1", "1,1", "a,b", "-1,2", "inf,1", "nan,1", "", "EWC=1"])
def test_other_strengths_are_refused(text):
    with pytest.raises(ValueError, match="at least two different numbers"):
        parse_strengths(text)


@pytest.mark.parametrize("text", ["1", "0", "-2", "two", "2.5"])
def test_one_task_has_nothing_to_protect(text):
    with pytest.raises(ValueError, match=r"--first=.*at least 2 tasks"):
        parse_first(text)


def callback(name, **arguments):
    return SimpleNamespace(class_path=f"lightning_cl.{name}", init_args=arguments)


def test_a_callback_is_named_where_several_have_a_strength():
    callbacks = [callback("EWC", strength=1.0), callback("TaskMatrix"), callback("SI", strength=2.0)]
    set_strength(callbacks, {"method": "SI", "strength": 0.5})
    assert [c.init_args.get("strength") for c in callbacks] == [1.0, None, 0.5]
    with pytest.raises(ValueError, match=r"2 callbacks have a strength \(there are \['EWC', 'SI'\]\); name the one"):
        set_strength(callbacks, {"method": None, "strength": 0.5})
    with pytest.raises(ValueError, match=r"0 callbacks called MAS have a strength"):
        set_strength(callbacks, {"method": "MAS", "strength": 0.5})
    with pytest.raises(ValueError, match=r"0 callbacks have a strength.*add one"):
        set_strength([callback("TaskMatrix")], {"method": None, "strength": 0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--first", "2"], "give --strengths too"),
        (["fit", "--strengths", "1,2", "--run", "x"], "--strengths and --run"),
        (["fit", "--strengths", "1,2", "--seeds", "2"], "--strengths and --seeds"),
        (["validate", "--strengths", "1,2"], "only with `fit`"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        cli_search.run_search(arguments)


def test_a_run_that_fails_ends_the_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_search, "run_process", lambda *_: (3, None))
    assert cli_search.run_search(["fit", "--strengths", "1,2"]) == 3
    assert "strength 1 ended with code 3" in capsys.readouterr().err


def test_the_first_tasks_and_what_is_watched_are_left():
    tasks = [SimpleNamespace(name=name, watched=name == "watched") for name in ("a", "watched", "b", "c")]
    data = SimpleNamespace(tasks=tasks, trained_tasks=[task for task in tasks if not task.watched])
    with pytest.raises(ValueError, match=r"--first=4: there are only 3 tasks"):
        keep_first(data, 4)
    keep_first(data, 2)
    assert [task.name for task in data.tasks] == ["a", "watched", "b"]
