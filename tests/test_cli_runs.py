"""``--run`` and ``--add``: tomorrow's data on yesterday's run, and going on with a run that was interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from test_cli import Output

from lightning_cl.cli.earlier_run import expand_run, last_boundary
from lightning_cl.cli.parser import take_option

pytestmark = pytest.mark.filterwarnings("ignore")

SUBCOMMANDS = ("fit", "validate", "test", "predict")
TEXTS = {
    "zoo": "The quick brown fox sleeps in the barn, and the lazy dog does not. ",
    "ant": "def add(first, second):\n    return first + second\n\n",
    "bee=1": "#include <vector>\nint main() { return 0; }\n",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text * 60)
    return folder


def configuration(root, texts):
    """Two tasks, whose order is not that of the alphabet; a tiny model; a checkpoint at every step."""
    model = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokenizer = {"vocab_size": 280, "cache_dir": str(texts / "cache")}
    return {
        "seed_everything": 3,
        "model": {"class_path": "lightning_cl.CausalLM", "init_args": {"model": model}},
        "data": {
            "tasks": {name: str(texts / f"{name}.txt") for name in ("zoo", "ant")},
            "tokenizer": {"class_path": "lightning_cl.TrainedBPE", "init_args": tokenizer},
            "max_length": 16,
            "batch_size": 2,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_val_batches": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(root), "name": "runs", "version": 0},
            },
            "callbacks": [
                {"class_path": "lightning_cl.TaskMatrix"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
                },
            ],
        },
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, texts):
    """The folder of a finished run, with its version spelt out."""
    root = tmp_path_factory.mktemp("run")
    path = root / "start.yaml"
    path.write_text(yaml.safe_dump(configuration(root, texts), sort_keys=False))
    assert Output("fit", "--config", path).code == 0
    return root / "runs" / "version_0"


def state_of(folder):
    """What is in a folder, byte for byte, and since when."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def report(folder):
    return json.loads((folder / "report.json").read_text())


def weights(folder, name):
    return torch.load(folder / "tasks" / name, weights_only=True)["state_dict"]


def printed(*arguments):
    """The configuration that a command line means."""
    output = Output("fit", *arguments, "--print_config")
    assert output.code == 0, output.err
    return yaml.safe_load(output.out)


# ---------------------------------------------------------------------- one more task


@pytest.fixture(scope="module")
def added(run, texts):
    before = state_of(run)
    output = Output("fit", "--run", run, f"--add=new={texts / 'bee=1.txt'}")
    assert output.code == 0, output.err
    return run.with_name("version_1"), before, output


def test_the_new_task_comes_behind_the_old_ones(added):
    assert report(added[0])["tasks"] == ["zoo", "ant", "new"]
    assert list(yaml.safe_load((added[0] / "config.yaml").read_text())["data"]["tasks"]) == ["zoo", "ant", "new"]
    assert [path.name for path in (added[0] / "tasks").iterdir()] == ["2-new.ckpt"]  # it alone was trained


def test_what_was_measured_before_is_still_known(run, added):
    old, new = report(run)["matrix"], report(added[0])["matrix"]
    assert [row[:2] for row in new[:3]] == old
    assert None not in new[3]


def test_the_old_run_is_not_touched(run, added):
    assert state_of(run) == added[1]


def test_it_says_what_it_goes_on_from(run, added):
    assert f"Goes on from {run / 'tasks' / '1-ant.ckpt'}; new: new" in added[2].log


def test_it_is_what_the_long_command_line_does(run, added, texts, tmp_path):
    """Bit for bit the run with all tasks and the checkpoint spelt out."""
    tasks = {"zoo": str(texts / "zoo.txt"), "ant": str(texts / "ant.txt"), "new": str(texts / "bee=1.txt")}
    config = configuration(tmp_path, texts)
    config["data"]["tasks"] = tasks
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    output = Output("fit", "--config", tmp_path / "all.yaml", f"--ckpt_path={run / 'tasks' / '1-ant.ckpt'}")
    assert output.code == 0, output.err
    long = tmp_path / "runs" / "version_0"
    assert report(long)["matrix"] == report(added[0])["matrix"]
    one, other = weights(long, "2-new.ckpt"), weights(added[0], "2-new.ckpt")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_can_be_repeated_on_the_new_run(run, added, texts):
    output = Output("fit", "--run", added[0], "--add", f"fourth={texts / 'zoo.txt'}", "--trainer.max_steps", "1")
    assert output.code == 0, output.err
    folder = run.with_name("version_2")
    assert report(folder)["tasks"] == ["zoo", "ant", "new", "fourth"]
    assert [row[:3] for row in report(folder)["matrix"][:4]] == report(added[0])["matrix"]
    assert [cost["steps"] for cost in report(folder)["costs"]["tasks"]] == [3, 3, 3, 1]


# ---------------------------------------------------------------------- what the options stand for


def test_several_tasks_keep_their_order_and_their_paths(run):
    config = printed(f"--run={run}", "--add", "z=a=b.txt", "--add=10=sample:cpp", "--add", "1e3=x/y/")
    assert list(config["data"]["tasks"].items())[2:] == [("z", "a=b.txt"), ("10", "sample:cpp"), ("1e3", "x/y/")]
    assert config["ckpt_path"] == str(run / "tasks" / "1-ant.ckpt")


@pytest.mark.parametrize("behind", [True, False])
def test_further_options_override_wherever_they_are(run, tmp_path, behind):
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 7}, "ckpt_path": None}))
    more = ["--data.batch_size", "4", "--config", tmp_path / "overlay.yaml"]
    options = ["--run", run, "--add=c=sample:cpp"]
    config = printed(*([*options, *more] if behind else [*more, *options]))
    assert (config["data"]["batch_size"], config["trainer"]["max_steps"], config["seed_everything"]) == (4, 7, 3)
    assert config["ckpt_path"] == str(run / "tasks" / "1-ant.ckpt")
    assert config["trainer"]["logger"]["init_args"]["version"] is None  # else the old run's folder


def with_config(run, folder, **changes):
    """A run's folder with another configuration."""
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in changes.items():
        part, _, name = key.partition("__")
        (config[part] if name else config)[name or part] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


@pytest.mark.parametrize("as_class", [True, False])
def test_a_list_of_tasks_is_continued_as_a_list(run, texts, tmp_path, as_class):
    tasks = [{"name": name, "train": str(texts / f"{name}.txt")} for name in ("zoo", "ant")]
    if as_class:
        tasks = [{"class_path": "lightning_cl.Task", "init_args": task} for task in tasks]
    folder = with_config(run, tmp_path / "run", data__tasks=tasks)
    root = f"--trainer.logger.save_dir={tmp_path}"
    output = Output("fit", "--run", folder, "--add", f"new={texts / 'bee=1.txt'}", "--trainer.max_steps=1", root)
    assert output.code == 0, output.err
    assert report(tmp_path / "runs" / "version_0")["tasks"] == ["zoo", "ant", "new"]
    again = Output("fit", "--run", folder, "--add=ant=sample:cpp")
    assert "a task of that name already (its tasks: zoo, ant)" in again.err


def test_a_configuration_comes_back_as_it_was(run, tmp_path):
    """Strings that look like something else, too, and without what belonged to one start only."""
    prompts = ["12", "yes", "echo $HOME: {x}", "# no comment"]
    callbacks = [{"class_path": "lightning_cl.PromptSamples", "init_args": {"prompts": prompts}}]
    folder = with_config(run, tmp_path / "run", ckpt_path="/nowhere", verbose=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["callbacks"] = callbacks
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    again = printed("--run", folder, "--add=c=sample:cpp")
    assert again["trainer"]["callbacks"][0]["init_args"]["prompts"] == prompts
    assert again["ckpt_path"] == str(folder / "tasks" / "1-ant.ckpt")


def test_other_commands_are_left_alone():
    arguments = ["fit", "--config", "a.yaml", "--trainer.max_steps", "3"]
    assert expand_run(arguments, SUBCOMMANDS) == (arguments, None)


def test_options_are_taken_out_in_both_spellings():
    arguments = ["fit", "--add", "a=b=c", "--added", "--add=d=e", "x"]
    assert take_option(arguments, "--add a=b") == (["a=b=c", "d=e"], ["fit", "--added", "x"])


# ---------------------------------------------------------------------- going on


def test_an_interrupted_run_goes_on_inside_its_task_to_the_same_end(run, texts, tmp_path):
    folder, root = tmp_path / "stopped", f"--trainer.logger.save_dir={tmp_path}"
    checkpoint = next(path for path in run.rglob("*.ckpt") if "1-ant" in str(path) and "step=4" in path.name)
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", folder)
    shutil.copy(checkpoint, folder / "checkpoints")
    output = Output("fit", "--run", folder, root)
    assert output.code == 0, output.err
    end = tmp_path / "runs" / "version_0"
    assert report(end)["matrix"] == report(run)["matrix"]
    one, other = weights(end, "1-ant.ckpt"), weights(run, "1-ant.ckpt")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_boundary_is_that_of_the_highest_index(tmp_path):
    (tmp_path / "tasks").mkdir()
    for index in (9, 10, 2):  # the newest file is not the last task
        torch.save({"x": torch.zeros(1)}, tmp_path / "tasks" / f"{index}-a.ckpt")
    assert last_boundary(tmp_path).name == "10-a.ckpt"
    whole = (tmp_path / "tasks" / "10-a.ckpt").read_bytes()
    (tmp_path / "tasks" / "10-a.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="10-a.ckpt is damaged"):
        assert last_boundary(tmp_path).name == "9-a.ckpt"


def test_validate_takes_configuration_and_last_boundary_of_a_run(run, tmp_path):
    output = Output("validate", f"--run={run}", f"--trainer.logger.save_dir={tmp_path}")
    assert output.code == 0, output.err
    lines = [line.split() for line in output.log.splitlines()]
    column = 1 + next(line for line in lines if "val_loss" in line).index("val_loss")
    for name, expected in zip(["zoo", "ant"], report(run)["matrix"][-1], strict=True):
        assert float(next(line for line in lines if line[:1] == [name])[column]) == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--add=new=a.txt"], ["--add=new=a.txt", "--run"]),
        (["--run={run}", "--add=new"], ["--add=new", "name=path"]),
        (["--run={run}", "--add==a.txt"], ["--add==a.txt", "name=path"]),
        (["--run={run}", "--add=new="], ["--add=new=", "name=path"]),
        (["--run={run}", "--add"], ["--add", "a value is missing"]),
        (["--run", "--add=a=b"], ["--run", "a value is missing"]),
        (["--run={run}", "--add=ant=a.txt"], ["--add=ant=a.txt", "zoo, ant", "another name"]),
        (["--run={run}", "--add=c=a.txt", "--add=c=b.txt"], ["--add=c=b.txt", "zoo, ant, c"]),
        (["--run={run}", "--ckpt_path=last"], ["--run and --ckpt_path", "one of them"]),
        (["--run={run}", "--ckpt_path", "last"], ["--run and --ckpt_path", "one of them"]),
        (["--run={run}", "--run={run}"], ["--run", "2 times"]),
        (["--run=/nowhere"], ["/nowhere", "no config.yaml"]),
        (["--run={run}/.."], ["no config.yaml", "did you mean --run"]),
        (["--run={run}", "--add=new=/nowhere.txt"], ["'new'", "/nowhere.txt", "no such file"]),
        (["--run={run}", "--config={overlay}", "--add=c={text}"], ["--add=c=", "data.tasks", "'zoo', 'ant'"]),
        (["--run={run}", "--trainer.logger=false", "--trainer.default_root_dir={run}"], ["same folder"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_a_wrong_command_is_answered_in_one_line(run, texts, tmp_path, arguments, words):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"tasks": configuration(run, texts)["data"]["tasks"]}}, sort_keys=False))
    before = state_of(run)
    output = Output("fit", *(a.format(run=run, overlay=overlay, text=texts / "ant.txt") for a in arguments))
    assert output.code in (1, 2)
    line = output.err.splitlines()[-1]
    assert line.startswith("lightning-cl: error: ")
    assert all(word in line for word in words), line
    assert "Traceback" not in output.err
    assert state_of(run) == before


@pytest.mark.parametrize(
    ("subcommand", "missing", "words"),
    [
        ("fit", ["tasks", "checkpoints"], ["no checkpoint to go on from", "--config"]),
        ("validate", ["tasks"], ["no whole checkpoint", "tasks/*.ckpt"]),
    ],
)
def test_a_run_without_checkpoints(run, tmp_path, subcommand, missing, words):
    shutil.copytree(run, tmp_path / "run")
    for name in missing:
        shutil.rmtree(tmp_path / "run" / name)
    output = Output(subcommand, "--run", tmp_path / "run")
    assert output.code == 1
    assert all(word in output.err for word in words)


def test_add_is_for_fit_only(run):
    output = Output("validate", "--run", run, "--add=c=sample:cpp")
    assert output.code == 1
    assert "only `fit` trains a new task" in output.err


@pytest.mark.parametrize("content", ["[1, 2", "- 1", "trainer: {}"])
def test_a_config_that_is_none_is_named(run, tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    output = Output("fit", "--run", tmp_path)
    assert output.code == 1
    assert str(tmp_path / "config.yaml") in output.err


@pytest.mark.parametrize(("given", "right"), [("--rum=x", "run"), ("--ads=a=b", "add"), ("--sedes=3", "seeds")])
def test_typos_of_the_options_are_known(given, right):
    output = Output("fit", given)
    assert output.code == 2
    assert f"did you mean {right}" in output.err


def test_a_shortened_option_is_not_silently_dropped(run):
    output = Output("fit", "--ru", run)
    assert output.code == 2
    assert "unrecognized arguments: --ru" in output.err
    assert "did you mean run?" in output.err


def test_help_has_the_options():
    text = " ".join(Output("fit", "--help").out.split())
    assert all(option in text for option in ("--run RUN", "--add NAME=PATH", "--seeds N|S,S,…", "--against SEEDS_JSON"))
    assert "--run RUN" in Output("validate", "--help").out
    assert "--add" not in Output("validate", "--help").out
