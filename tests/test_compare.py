"""``lightning-cl compare`` and ``--permute-tasks``: tables by hand, what is refused, what a second call repeats."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import yaml
from test_cli import Output
from test_cli_seeds import configuration

from lightning_cl.cli import processes
from lightning_cl.cli.methods import read_overlays, read_strengths, with_overlay
from lightning_cl.cli.task_order import order_for, set_order, trained_names
from lightning_cl.evaluation.comparison import compare_methods, compared_run, comparison_markdown, format_comparison
from lightning_cl.evaluation.comparison import pareto as pareto_front
from lightning_cl.evaluation.scatter import comparison_figure

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore")


def made_report(x, y, tasks=("zoo", "ant"), diverged=(), **other):
    """Of two tasks: both were learnt to x, and the first one changed by y (a loss: positive is good)."""
    matrix = [[4.0, 4.0], [x, 4.0], [None if diverged else x - y, x]]
    scores = {"average": None if diverged else x - y / 2, "mean_when_learnt": x, "forgetting": None if diverged else -y}
    scores |= {"backward_transfer": None if diverged else y, "share_kept": 0.5}
    costs = {"total_seconds": 10.0 * x, "state_bytes": {"EWC": 1e6, "TaskMatrix": 0}}
    costs["tasks"] = [{"task": task, "new_tokens": 100.0, "replayed_tokens": 5.0} for task in tasks]
    about = {"tasks": list(tasks), "watched": [], "monitor": "val_loss", "mode": "min", "preset": "gem"}
    about |= {"definitions": {"average": "mean_j R[T, j]"}, "measured_on": {}}
    about["not_finite"] = [{"task": task, "row": 2} for task in diverged]
    return {"matrix": matrix, "costs": costs} | scores | about | other


def table_of(values, **other):
    """From ``{method: [(x, y) of each seed]}``."""
    methods = [{"name": name, "family": name.split()[0]} for name in values]
    runs = [
        {"method": name, "seed": seed, **compared_run(made_report(*point))}
        for name, points in values.items()
        for seed, point in enumerate(points)
    ]
    state = {"seeds": list(range(len(next(iter(values.values()))))), "orders": None, "failed": [], "command": "x"}
    return {**state, **compare_methods(methods, runs), **other}


def row_of(rows, measure, task=None):
    (row,) = (row for row in rows if (row["measure"], row["task"]) == (measure, task))
    return row


# ---------------------------------------------------------------------- numbers


def test_means_intervals_and_paired_differences_by_hand():
    """x of plain 1, 2, 3 and of ours 1.5, 2.5, 3.5: the spread is in both, and not in the difference."""
    table = table_of({"plain": [(1, 0), (2, 0), (3, 0)], "ours": [(1.5, 0), (2.5, 0), (3.5, 0)]})
    plain, ours = table["methods"]
    average = row_of(plain["rows"], "average")
    assert (plain["n"], average["mean"], average["sd"]) == (3, 2.0, 1.0)
    assert average["high"] - average["mean"] == pytest.approx(2.484138, abs=1e-6)
    difference = row_of(ours["differences"], "average")
    assert (difference["mean"], difference["sd"], difference["low"], difference["high"]) == (0.5, 0.0, 0.5, 0.5)
    assert row_of(ours["rows"], "final", "ant")["values"] == [1.5, 2.5, 3.5]
    assert ours["costs"] == {"seconds": pytest.approx(25.0), "state_bytes": 1e6, "tokens": 210.0}
    assert plain["differences"] is None
    text = format_comparison(table)
    assert "2.000 ± 2.484" in text
    assert "+0.500 ± 0.000" in text


def test_differences_are_over_the_seeds_that_both_have():
    table = table_of({"plain": [(1, 0), (2, 0)], "ours": [(3, 0), (5, 0), (9, 0)]})
    ours = table["methods"][1]
    assert ours["n"] == 3
    assert row_of(ours["differences"], "average")["values"] == [2.0, 3.0]


def test_the_pareto_front_by_hand():
    values = {"plain": (1.0, -2.0), "a": (1.2, -1.0), "b": (1.3, -1.1), "c": (2.0, -0.1), "twin": (2.0, -0.1)}
    table = table_of({name: [point] for name, point in values.items()})
    assert table["pareto"] == ["plain", "a", "c", "twin"]  # b is behind a in both
    higher = pareto_front(table["methods"], "max")  # were it an accuracy: c beats all
    assert higher == ["c", "twin"]
    assert "n is below 3" in format_comparison(table)


def test_a_diverged_method_is_named_and_never_on_the_front():
    methods = [{"name": "plain", "family": "plain"}, {"name": "lost", "family": "lost"}]
    runs = [{"method": "plain", "seed": seed, **compared_run(made_report(1.0, -1.0))} for seed in (0, 1, 2)]
    # It learns best, and one seed of three is lost.
    ours = [made_report(0.1, -0.1), made_report(0.1, 0.0, diverged=["zoo"]), made_report(0.1, -0.1)]
    runs += [{"method": "lost", "seed": seed, **compared_run(report)} for seed, report in enumerate(ours)]
    table = {"seeds": [0, 1, 2], "orders": None, "failed": [], "command": "x", **compare_methods(methods, runs)}
    assert table["pareto"] == ["plain"]
    assert table["methods"][1]["diverged"] == [{"seed": 1, "tasks": ["zoo"]}]
    assert row_of(table["methods"][1]["differences"], "average")["mean"] is None
    assert "lost: val_loss of zoo at seed 1 is not finite" in format_comparison(table)
    assert "not finite or not run: lost" in comparison_figure(table).axes[0].get_title()


def test_other_data_makes_no_pair():
    def on(data):
        column = {"data": data, "samples": [9], "batches": [3], "batch_size": [3], "processes": 1, "packing": None}
        return {"zoo": column | {"limit": "1.0", "max_length": None, "template": None}}

    methods = [{"name": name, "family": name} for name in ("plain", "a", "b")]
    runs = [
        {"method": name, "seed": 0, **compared_run(made_report(1.0, 0.0, measured_on=on(data)))}
        for name, data in (("plain", "x"), ("a", "x"), ("b", "y"))
    ]
    _, same, other = compare_methods(methods, runs)["methods"]
    assert row_of(same["differences"], "average")["mean"] == 0.0
    assert other["differences"] is None
    assert "zoo (the validation samples)" in other["other_data"][0]


def test_markdown_has_all_numbers_and_markup_is_text():
    table = table_of({"plain": [(1, 0)], "<b>|x": [(2.5, -0.25)]})
    text = comparison_markdown(table)
    assert "&lt;b>\\|x" in text
    assert all(number in text for number in ("2.500", "−0.250", "2.750", "+1.625", "mean_j R[T, j]"))
    assert all(line.count(" | ") == 10 for line in text.splitlines() if line.startswith("| plain") and "MB" in line)


def test_names_in_the_picture_are_apart_and_on_it():
    points = {
        "plain": (2.0, -1.2),
        "replay": (2.05, -0.3),
        "ewc 0.1": (2.06, -0.31),
        "long_name_of_a_method": (2.0, -1.19),
    }
    figure = comparison_figure(table_of({name: [point] for name, point in points.items()}))
    renderer = figure.canvas.get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in figure.axes[0].texts}
    assert set(boxes) == set(points)
    names = list(boxes)
    assert not any(boxes[a].overlaps(boxes[b]) for i, a in enumerate(names) for b in names[i + 1 :])
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1 for box in boxes.values())
    assert figure.axes[0].xaxis_inverted()  # a loss: right is better


# ---------------------------------------------------------------------- orders of the tasks


def test_orders_are_of_the_seed_alone_and_differ_while_there_are_others():
    orders = [tuple(order_for(["a", "b", "c"], seed)) for seed in range(6)]
    assert len(set(orders)) == 6
    assert order_for(["a", "b", "c"], 6) == list(orders[0])
    many = [f"{number}" for number in range(9)]
    assert sorted(order_for(many, 1)) == many
    assert order_for(many, 1) == order_for(many, 1) != order_for(many, 2)


@pytest.mark.parametrize("form", [dict, list])
def test_watched_tasks_keep_their_positions(form):
    tasks = {"a": "a.txt", "seen": {"val": "s.txt"}, "b": {"train": "b.txt"}, "c": "c.txt"}
    if form is list:
        tasks = [{"name": n, "train": None if n == "seen" else n, "val": "v"} for n in tasks]
        tasks[2] = {"class_path": "lightning_cl.Task", "init_args": tasks[2]}
    assert trained_names(tasks) == ["a", "b", "c"]
    data = {"tasks": tasks}
    set_order(data, ["c", "a", "b"])
    names = list(data["tasks"]) if form is dict else [(t.get("init_args") or t)["name"] for t in data["tasks"]]
    assert names == ["c", "seen", "a", "b"]
    with pytest.raises(ValueError, match="is not of the tasks"):
        set_order(data, ["c", "a"])


# ---------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["{root}/nothing.yaml"], "there is no file"),
        (["{root}/ew.yaml"], "did you mean {root}/ewc.yaml"),
        (["{root}/ewc.yaml,{root}/ewc.yaml"], "the name 'ewc' is that of"),
        (["{root}/ewc.yaml", "ewc={root}/replay.yaml"], "the name 'ewc' is that of"),
        (["plain={root}/ewc.yaml"], "the name 'plain' is that of the configuration without an overlay"),
        (["a:b={root}/ewc.yaml"], "a method needs a name without"),
    ],
)
def test_overlays_that_cannot_be(tmp_path, given, words):
    for name in ("ewc", "replay"):
        (tmp_path / f"{name}.yaml").write_text("trainer: {}\n")
    with pytest.raises(ValueError, match="--methods") as error:
        read_overlays([value.format(root=tmp_path) for value in given])
    assert words.format(root=tmp_path) in str(error.value)
    assert read_overlays([f"mine={tmp_path}/ewc.yaml,{tmp_path}/ewc.yaml"]).keys() == {"mine", "ewc"}


def test_strengths_of_all_of_one_and_of_a_callback():
    assert read_strengths(["0.1,1"], ["a", "b"]) == {"a": (None, [0.1, 1.0]), "b": (None, [0.1, 1.0])}
    assert read_strengths(["a=1", "b:EWC=0,2"], ["a", "b"]) == {"a": (None, [1.0]), "b": ("EWC", [0.0, 2.0])}
    for text, words in (("c=1", "no method 'c'"), ("a=1,1", "different numbers"), ("x", "different numbers")):
        with pytest.raises(ValueError, match=words):
            read_strengths([text], ["a", "b"])
    with pytest.raises(ValueError, match="has strengths already"):
        read_strengths(["a=1", "2"], ["a", "b"])


def test_single_options_win_over_an_overlay():
    given = ["fit", "--config", "base.yaml", "--trainer.max_steps", "5"]
    assert with_overlay(given, "o.yaml") == ["fit", "--config", "base.yaml", "--config", "o.yaml", *given[3:]]


@pytest.fixture
def base(tmp_path):
    """A configuration and two overlays in a folder of their own."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(configuration(tmp_path), sort_keys=False))
    ewc = {"class_path": "lightning_cl.EWC", "init_args": {"strength": 1.0, "samples": 4}}
    replay = {"class_path": "lightning_cl.Replay", "init_args": {"buffer_size": 8}}
    for name, callback in (("ewc", ewc), ("replay", replay)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    return tmp_path


@pytest.fixture
def runs(base, monkeypatch):
    """`fit` in place of a process: leaves the report of a made-up run; `plan` says how its next starts end."""
    started, plan = [], []

    def start(arguments, environment):
        trial = json.loads(environment.get("LIGHTNING_CL_TRIAL", "{}"))
        started.append((list(arguments), trial, "LIGHTNING_CL_RESUMES" in environment))
        folder = base / "made" / f"version_{len(started)}"
        folder.mkdir(parents=True)
        with Path(environment["LIGHTNING_CL_RUN_FOLDER_FILE"]).open("a") as file:
            file.write(f"{folder}\n")
        code = plan.pop(0) if plan else 0
        if code == 0:
            tasks = trial.get("order", ["zoo", "ant"])
            x = 2.0 + trial.get("strength", 0.0) + 0.1 * len(started)
            (folder / "report.json").write_text(json.dumps(made_report(x, -0.5, tasks)))
        return code

    monkeypatch.setattr(processes, "start", start)
    return started, plan


def read_settings(arguments):
    """What the parser makes of these files, without its time: a later file replaces, ``callbacks+`` adds."""
    files = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "--config"]
    settings = {"rest": [argument for argument in arguments if argument.startswith("--trainer")]}
    for content in (yaml.safe_load(Path(file).read_text()) for file in files):
        for group, values in content.items():
            inside = settings.setdefault(group, {})
            for key, value in values.items() if isinstance(values, dict) else ():
                name = key.rstrip("+")
                inside[name] = [*inside.get(name, []), *value] if key.endswith("+") else value
    return settings


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("lightning_cl.cli.command.settings_of", read_settings)


def command(base, *more):
    overlays = f"{base}/replay.yaml,{base}/ewc.yaml"
    return Output("compare", "--config", base / "tiny.yaml", "--methods", overlays, *more)


def test_every_method_strength_and_seed_has_a_run(base, runs):
    output = command(base, "--strengths", "ewc=0.5,2", "--seeds", "2", "--permute-tasks", "--trainer.max_steps=4")
    assert output.code == 0, output.err
    folder = base / "tiny" / "compare-0"
    table = json.loads((folder / "compare.json").read_text())
    assert table["complete"]
    assert [method["name"] for method in table["methods"]] == ["plain", "replay", "ewc 0.5", "ewc 2"]
    assert [(run["method"], run["seed"]) for run in table["runs"][:5]] == [
        *((name, 0) for name in ("plain", "replay", "ewc 0.5", "ewc 2")),
        ("plain", 1),
    ]
    started, _ = runs
    assert [trial.get("strength") for _, trial, _ in started] == [None, None, 0.5, 2.0] * 2
    # Both orders of two tasks, and all methods of a seed have the same.
    orders = [tuple(trial["order"]) for _, trial, _ in started]
    assert len(set(orders[:4])) == len(set(orders[4:])) == 1
    assert set(orders) == {("zoo", "ant"), ("ant", "zoo")}
    assert table["orders"] == {"0": list(orders[0]), "1": list(orders[4])}
    assert f"seed 1: {', '.join(orders[4])}" in output.out
    assert all("--data.seed=0" in arguments and "--trainer.max_steps=4" in arguments for arguments, _, _ in started[:4])
    # By name, whatever the position: zoo lost half a nat only where it was first.
    finals = row_of(table["methods"][0]["rows"], "final", "zoo")["values"]
    assert [run["final"]["zoo"] for run in table["runs"] if run["method"] == "plain"] == finals
    assert (folder / "compare.md").read_text().startswith("# val_loss of 4 methods over the seeds 0, 1")
    picture = matplotlib.image.imread(folder / "compare.png")
    assert picture[0, 0, :3].tolist() == [1.0, 1.0, 1.0]  # white
    assert float(picture[..., :3].min()) < 0.3


def test_a_second_call_repeats_nothing_and_resumes_what_was_stopped(base, runs, quick, monkeypatch):
    started, plan = runs
    plan += [0, 143]  # plain is finished; replay is asked to end
    output = command(base)
    assert output.code == 143
    assert "the same command again resumes it, with the 1 finished runs" in output.err
    checkpoint = base / "made" / "version_2"
    (checkpoint / "config.yaml").write_text("{}")
    monkeypatch.setattr("lightning_cl.cli.compare.find_last_checkpoint", lambda folder: folder / "x.ckpt")
    output = command(base)
    assert output.code == 0, output.err
    assert len(started) == 4  # plain, replay, replay again, ewc
    arguments, trial, resumes = started[2]
    assert arguments == ["fit", "--run", str(checkpoint), "--trust"]
    assert (trial, resumes) == ({}, True)
    assert started[3][0][:1] == ["fit"]
    assert not started[3][2]
    table = json.loads((base / "tiny" / "compare-0" / "compare.json").read_text())
    assert [Path(run["folder"]).name for run in table["runs"]] == ["version_1", "version_3", "version_4"]
    # Once more: nothing runs, and the table is the same.
    assert command(base).code == 0
    assert len(started) == 4
    assert json.loads((base / "tiny" / "compare-0" / "compare.json").read_text()) == table
    # Other settings are another comparison; in the folder of the first one, its finished runs are used.
    assert command(base, "--seeds", "2").code == 0
    assert (base / "tiny" / "compare-1" / "compare.json").is_file()
    more = Output(
        "compare", "--config", base / "tiny.yaml", "--methods", base / "ewc.yaml", "--into", base / "tiny/compare-0"
    )
    assert more.code == 0
    assert len(started) == 4 + 6


def test_a_run_that_fails_does_not_stop_the_others(base, runs, quick):
    started, plan = runs
    plan += [0, 7, 0]
    output = command(base)
    assert output.code == 7
    assert len(started) == 3
    assert "replay ended with code 7: it is missing above" in output.out
    table = json.loads((base / "tiny" / "compare-0" / "compare.json").read_text())
    assert not table["complete"]
    assert table["failed"] == [{"method": "replay", "seed": None, "exit_code": 7}]
    assert [method["n"] for method in table["methods"]] == [1, 0, 1]
    started.clear()
    shutil.rmtree(base / "made")
    plan += [-9]
    assert command(base, "--trainer.max_steps=9").code == 137  # the first of all: the others would fail, too
    assert len(started) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--strengths", "0.1,1"], ["replay: ", "0 callbacks have a strength"]),
        (["--strengths", "ewc:SI=1"], ["ewc: ", "called SI"]),
        (["--strengths", "lwf=1"], ["no method 'lwf'"]),
        (["--seeds", "2", "--data.seed", "1"], ["--seeds and --data.seed"]),
        (["--permute-tasks"], ["give seeds"]),
        (["--run", "x"], ["compare and --run", "each method is a whole run"]),
        (["--methods", "{base}/bare.yaml"], ["bare: without a TaskMatrix"]),
        (["--methods", "{base}/other.yaml"], ["other: its tasks are zoo, those of the plain"]),
        (["--methods", "{base}/max.yaml"], ["max: its TaskMatrix has mode=max"]),
    ],
    ids=lambda value: " ".join(value)[:24],
)
def test_what_is_refused_before_any_run(base, runs, quick, more, words):
    (base / "other.yaml").write_text(f"data: {{tasks: {{zoo: {base}/zoo.jsonl}}}}\n")
    matrix = {"class_path": "lightning_cl.TaskMatrix", "init_args": {"mode": "max"}}
    (base / "bare.yaml").write_text("trainer: {callbacks: []}\n")
    (base / "max.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [matrix]}}))
    output = command(base, *(word.format(base=base) for word in more))
    assert output.code == 1
    assert all(word in output.err for word in words), output.err
    assert runs[0] == []


def test_seeds_permute_the_tasks_where_asked(base, runs):
    output = Output("fit", "--config", base / "tiny.yaml", "--seeds", "2", "--permute-tasks")
    assert output.code == 0, output.err
    started, _ = runs
    orders = [trial["order"] for _, trial, _ in started]
    assert sorted(orders) == [["ant", "zoo"], ["zoo", "ant"]]
    table = json.loads((base / "made" / "seeds-0" / "seeds.json").read_text())
    assert table["orders"] == {"0": orders[0], "1": orders[1]}
    assert [run["tasks"] for run in table["runs"]] == orders
    zoo = row_of(table["rows"], "final", "zoo")["values"]
    columns = [order.index("zoo") for order in orders]
    assert zoo == [run["matrix"][-1][column] for run, column in zip(table["runs"], columns, strict=True)]
    assert not math.isclose(*zoo)
    output = Output("fit", "--config", base / "tiny.yaml", "--permute-tasks")
    assert "give seeds" in output.err


def test_a_run_takes_the_order_and_says_so_in_its_settings(base, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_TRIAL", json.dumps({"order": ["ant", "zoo"]}))
    output = Output("fit", "--config", base / "tiny.yaml")
    assert output.code == 0, output.err
    folder = base / "tiny" / "version_0"
    assert json.loads((folder / "report.json").read_text())["tasks"] == ["ant", "zoo"]
    assert list(yaml.safe_load((folder / "config.yaml").read_text())["data"]["tasks"]) == ["ant", "zoo"]


def test_a_starter_waits_for_a_run_that_outlived_it(tmp_path, capsys, monkeypatch):
    """The run holds a lock on the file with its folder; the second start waits until it is gone."""
    if processes.sys.platform == "win32":
        pytest.skip("no locks")
    told = tmp_path / "told"
    monkeypatch.setenv("LIGHTNING_CL_RUN_FOLDER_FILE", str(told))
    monkeypatch.setenv("LIGHTNING_CL_RESUMES", "1")
    processes.tell_folder(tmp_path / "run", True, "x.ckpt")
    assert processes.told_folders(told) == [tmp_path / "run"]
    calls = []
    real = processes.fcntl.flock

    def flock(file, kind):
        calls.append(kind)
        if len(calls) == 2:
            processes._held.pop().close()  # the run ends
        real(file, kind)

    monkeypatch.setattr(processes.fcntl, "flock", flock)
    processes.wait_for(told, "ewc")
    assert "ewc is still running" in capsys.readouterr().out
    assert len(calls) == 2
    processes.wait_for(told, "ewc")
    assert capsys.readouterr().out == ""
