"""``--seeds``: the intervals against tables and hand computations, two real seeds, pairs, and what can go wrong."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import forked
import pytest
import yaml
from test_cli import Output

from lightning_cl.cli import processes
from lightning_cl.cli.seeds import parse_seeds
from lightning_cl.evaluation.seeds import interval, paired_rows, summarize, t_quantile

ROOT = Path(__file__).parents[1]
NAN = None

pytestmark = pytest.mark.filterwarnings("ignore")


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_those_of_the_printed_tables(freedom, table):
    assert t_quantile(freedom) == pytest.approx(table, abs=6e-5)


@pytest.mark.parametrize("freedom", [3, 4, 7, 10])
def test_the_density_holds_95_percent_between_the_quantiles(freedom):
    """By integration of the density, which the closed form does not use."""
    t, steps = t_quantile(freedom), 20_000
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    points = ((step + 0.5) * t / steps for step in range(steps))
    inside = 2 * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in points) * t / steps
    assert inside == pytest.approx(0.95, abs=1e-8)


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half width 4.302653 / √3 = 2.484138."""
    found = interval([3.0, 1.0, 2.0])
    assert (found["mean"], found["sd"]) == (2.0, 1.0)
    assert found["low"] == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found["high"] == pytest.approx(2 + 2.484138, abs=1e-6)


def test_nothing_is_said_where_a_seed_is_unknown():
    assert set(interval([1.0, NAN, 2.0]).values()) == {None}
    assert interval([1.0]) == {"mean": 1.0, "sd": None, "low": None, "high": None}


def result(seed, final, average, folder="runs/version_0"):
    scores = {"average": average, "forgetting": None, "backward_transfer": 0.5, "forward_transfer": 0.25}
    about = {"tasks": list(final), "watched": [], "monitor": "val_loss", "mode": "min"}
    definitions = dict.fromkeys(scores, "as defined")
    return (
        {"seed": seed, "folder": folder, "matrix": [[1.0]], "final": final, "definitions": definitions} | scores | about
    )


def test_differences_are_taken_seed_by_seed_whatever_their_order():
    """Ours 5, 7, 9 less theirs 4, 5, 6 (seeds 0, 1, 2): 1, 2, 3."""
    ours = [result(seed, {"a": value}, value) for seed, value in zip((0, 1, 2), (5.0, 7.0, 9.0), strict=True)]
    theirs = [result(seed, {"a": value}, 1.0) for seed, value in zip((2, 0, 1), (6.0, 4.0, 5.0), strict=True)]
    final, average, *_ = rows = paired_rows(ours, theirs)
    forgetting = next(row for row in rows if row["measure"] == "forgetting")
    assert final["values"] == [1.0, 2.0, 3.0]
    assert final["high"] - final["low"] == pytest.approx(2 * 2.484138, abs=1e-6)
    assert average["values"] == [4.0, 6.0, 8.0]
    assert forgetting["values"] == [None] * 3
    assert forgetting["mean"] is None


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("0,5,7", [0, 5, 7]), ("7,0", [7, 0])])
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["1", "0", "-2", "5,", "5,5", "a", "0,-1", "1.5", str(2**32) + ",1"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ValueError, match=f"--seeds={text}"):
        parse_seeds(text)


# ---------------------------------------------------------------------- two real seeds


def configuration(root):
    texts = {"zoo": "The quick brown fox sleeps in the barn. " * 9, "ant": "def add(a, b):\n    return a + b\n\n" * 9}
    for name, text in texts.items():
        lines = "".join(json.dumps({"text": f"{number}. {text}"}) + "\n" for number in range(20))
        (root / f"{name}.jsonl").write_text(lines)
    model = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokenizer = {"vocab_size": 280, "cache_dir": str(root / "cache")}
    return {
        "seed_everything": 99,
        "model": {"class_path": "lightning_cl.CausalLM", "init_args": {"model": model}},
        "data": {
            "tasks": {name: str(root / f"{name}.jsonl") for name in texts},
            "tokenizer": {"class_path": "lightning_cl.TrainedBPE", "init_args": tokenizer},
            "max_length": 16,
            "batch_size": 2,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(root), "name": "tiny"},
            },
            "callbacks": [{"class_path": "lightning_cl.TaskMatrix"}],
        },
    }


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The folder of a call with two seeds, its table, and what a terminal saw of it."""
    root = tmp_path_factory.mktemp("seeds")
    (root / "tiny.yaml").write_text(yaml.safe_dump(configuration(root), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(processes, "subprocess", forked.SUBPROCESS)
        output = Output("fit", "--seeds=0,3", "--config", root / "tiny.yaml")
    assert output.code == 0, output.err
    return root, json.loads((root / "tiny" / "seeds-0" / "seeds.json").read_text()), output


def test_each_seed_has_its_run(seeds):
    root, table, _ = seeds
    assert table["complete"]
    assert [run["folder"] for run in table["runs"]] == [str(root / "tiny" / f"version_{v}") for v in (0, 1)]
    assert table["seeds"] == [0, 3]
    for run in table["runs"]:
        config = yaml.safe_load((Path(run["folder"]) / "config.yaml").read_text())
        assert (config["seed_everything"], config["data"]["seed"]) == (run["seed"], run["seed"])


def test_seeds_differ_and_are_those_of_single_runs_bit_for_bit(seeds):
    root, table, _ = seeds
    assert table["runs"][0]["matrix"] != table["runs"][1]["matrix"]
    for run in table["runs"]:
        output = Output(
            *("fit", "--config", root / "tiny.yaml", f"--seed_everything={run['seed']}", f"--data.seed={run['seed']}"),
            f"--trainer.logger.init_args.name=single-{run['seed']}",
        )
        assert output.code == 0, output.err
        single = json.loads((root / f"single-{run['seed']}" / "version_0" / "report.json").read_text())
        assert single["matrix"] == run["matrix"]
        assert single["average"] == run["average"]


def test_the_table_is_that_of_the_reports(seeds):
    _, table, output = seeds
    values = [[run["final"][task] for run in table["runs"]] for task in ("zoo", "ant")]
    assert [row["values"] for row in table["rows"][:2]] == values
    assert [row["measure"] for row in table["rows"][2:]] == [
        *("average", "average_over_rows", "worst_task", "mean_when_learnt", "share_kept", "forgetting"),
        *("largest_drop", "backward_transfer", "forward_transfer"),
    ]
    assert set(table["definitions"]) == {row["measure"] for row in table["rows"][2:]}
    first, second = values[0]
    assert table["rows"][0]["mean"] == pytest.approx((first + second) / 2)
    # Two values: sd is their distance over √2, and the half width 12.7062 * sd / √2.
    assert table["rows"][0]["high"] - table["rows"][0]["mean"] == pytest.approx(6.3531 * abs(first - second), rel=1e-4)
    lines = [line.split() for line in output.out.splitlines()]
    shown = [f"{table['rows'][0][key]:.3f}".replace("-", "−") for key in ("mean", "sd")]
    assert ["zoo", *shown, "too", "few", "seeds"] in lines  # of two
    when_learnt = [(run["matrix"][1][0] + run["matrix"][2][1]) / 2 for run in table["runs"]]
    assert table["rows"][5]["values"] == pytest.approx(when_learnt)
    assert str(Path(table["runs"][0]["folder"]).parent / "seeds-0" / "seeds.json") in output.out


# ---------------------------------------------------------------------- with runs that are made up


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """`fit` in place of a process: writes the report of a made-up run; `plan` changes what a seed does."""
    started, plan = [], {}

    def start(arguments, environment):
        settings = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
        seed = int(settings["seed_everything"])
        assert settings["data.seed"] == str(seed)
        started.append(seed)
        folder = tmp_path / "made" / f"version_{len(list(tmp_path.glob('made/version_*')))}"
        folder.mkdir(parents=True)
        Path(environment["LIGHTNING_CL_RUN_FOLDER_FILE"]).write_text(str(folder))
        if plan.get(seed, 0) != 0:
            return plan[seed]
        task, base = plan.get("task", "a"), plan.get("base", 4.0)
        made = result(seed, {task: base + seed}, base)
        made |= {"matrix": [[9.0], [base + seed]], "tasks": [task]}
        if plan.get("report", True):
            (folder / "report.json").write_text(json.dumps(made))
        return 0

    monkeypatch.setattr(processes, "start", start)
    return started, plan, tmp_path / "made"


def saved(folder, number=0):
    return json.loads((folder / f"seeds-{number}" / "seeds.json").read_text())


def test_against_another_method(runs):
    _, plan, folder = runs
    assert Output("fit", "--seeds=3").code == 0
    plan["base"] = 6.0
    output = Output("fit", "--seeds", "2,1,0", "--against", folder / "seeds-0")
    assert output.code == 0, output.err
    table = saved(folder, 1)
    (final, average, *_), path = table["against"]["rows"], table["against"]["path"]
    assert path == str(folder / "seeds-0")
    assert (final["values"], final["sd"], final["low"], final["high"]) == ([2.0] * 3, 0.0, 2.0, 2.0)
    assert average["mean"] == 2.0
    assert ["a", "2.000", "0.000", "2.000", "to", "2.000"] in [line.split() for line in output.out.splitlines()]
    assert saved(folder)["against"] is None  # an earlier file is not written over


@pytest.mark.parametrize(
    ("seeds", "change", "words"),
    [
        ("2", {}, ["its seeds are 0,1,2, these are 0,1", "--seeds 0,1,2"]),
        ("3", {"complete": False}, ["only 3 of its 3 seeds"]),
        ("3", {"tasks": ["b"]}, ["its tasks is ['b']", "['a']"]),
        ("3", {"monitor": "val_acc"}, ["its monitor is val_acc", "val_loss"]),
    ],
    ids=["seeds", "unfinished", "tasks", "monitor"],
)
def test_against_what_is_no_pair(runs, seeds, change, words):
    started, _, folder = runs
    assert Output("fit", "--seeds=3").code == 0
    path = folder / "seeds-0" / "seeds.json"
    path.write_text(json.dumps(saved(folder) | change))
    started.clear()
    output = Output("fit", f"--seeds={seeds}", f"--against={path}")
    assert output.code == 1
    assert all(word in output.err for word in words), output.err
    assert len(started) <= 1  # found before the time of all seeds is spent


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_against_what_is_no_file_of_seeds(runs, tmp_path, content):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    output = Output("fit", "--seeds=2", f"--against={tmp_path / 'x.json'}")
    assert output.code == 1
    assert f"--against={tmp_path / 'x.json'}" in output.err
    assert runs[0] == []


def test_a_seed_that_fails_keeps_what_is_finished(runs):
    started, plan, folder = runs
    plan[2] = 7
    output = Output("fit", "--seeds=4")
    assert output.code == 7
    assert started == [0, 1, 2]
    table = saved(folder)
    assert not table["complete"]
    assert table["failed"] == {"seed": 2, "exit_code": 7, "folder": str(folder / "version_2")}
    assert table["rows"][0]["values"] == [4.0, 5.0]
    assert "seed 2 ended with code 7" in output.err
    assert "only 2 of 4 seeds" in output.out


def test_a_first_seed_that_fails_leaves_no_file(runs):
    runs[1][0] = -9
    output = Output("fit", "--seeds=2")
    assert output.code == 137  # a signal, as a shell says it
    assert "none is finished" in output.err
    assert not list(runs[2].rglob("seeds.json"))


def test_a_run_without_a_matrix(runs):
    runs[1]["report"] = False
    output = Output("fit", "--seeds=2")
    assert output.code == 1
    assert "left no report.json" in output.err
    assert "TaskMatrix" in output.err


def test_ctrl_c_waits_for_the_run_and_stops(monkeypatch):
    class Process:
        def __init__(self, *args, **kwargs):
            self.calls = []

        def wait(self, timeout=None):
            self.calls.append(timeout)
            if timeout is None:
                raise KeyboardInterrupt
            return 1

        def poll(self):
            return 1

    made = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: made.append(Process()) or made[-1])
    assert processes.start(["fit"], {}) == 130
    assert made[0].calls == [None, 20.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--seeds=3", "--run=x"], ["--seeds and --run", "whole run"]),
        (["fit", "--seeds=3", "--ckpt_path", "x"], ["--seeds and --ckpt_path", "whole run"]),
        (["fit", "--seeds=3", "--data.seed=1"], ["--seeds and --data.seed"]),
        (["fit", "--seeds=3", "--seed_everything", "1"], ["--seeds and --seed_everything"]),
        (["fit", "--seeds=1"], ["--seeds=1", "at least 2"]),
        (["fit", "--seeds"], ["a value is missing"]),
        (["fit", "--against=x"], ["--against=x", "--seeds"]),
        (["validate", "--seeds=3"], ["only with `fit`"]),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(runs, arguments, words):
    output = Output(*arguments)
    assert output.code == 1
    assert output.err.startswith("lightning-cl: error: ")
    assert len(output.err.splitlines()) == 1
    assert all(word in output.err for word in words), output.err
    assert runs[0] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--trainer.logger=false"], ["folder of its own", "trainer.logger"]),
        (["--trainer.logger.init_args.version=0"], ["folder of its own", "version"]),
        (["--ckpt_path=/nowhere.ckpt"], ["whole run", "/nowhere.ckpt"]),
    ],
)
def test_a_run_that_cannot_be_one_of_several(tmp_path, monkeypatch, more, words):
    """What only the run itself can know, from its configuration."""
    monkeypatch.setenv("LIGHTNING_CL_RUN_FOLDER_FILE", str(tmp_path / "folder"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(configuration(tmp_path), sort_keys=False))
    output = Output("fit", "--config", tmp_path / "tiny.yaml", *more)
    assert output.code == 1
    assert all(word in output.err for word in words), output.err
    assert not (tmp_path / "folder").exists()
    assert not list(tmp_path.rglob("report.json"))


def test_a_summary_of_one_seed_says_that_it_is_not_complete():
    table = summarize([result(5, {"a": 1.0}, 1.0)], ["fit"], [5, 6], {"seed": 6, "exit_code": 1, "folder": None})
    assert not table["complete"]
    assert table["rows"][0]["mean"] == 1.0
    assert table["rows"][0]["low"] is None
