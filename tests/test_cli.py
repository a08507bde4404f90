"""The command line: help, configurations, typos, bad values, and whole small runs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import yaml

from lightning_cl.cli import first_help
from lightning_cl.cli.command import main

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore")


class Output:
    """What one command wrote, and how it ended."""

    def __init__(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        # Lightning's logger holds the stderr of the time of its import.
        log, logger = io.StringIO(), logging.getLogger("lightning.pytorch")
        handler = logging.StreamHandler(log)
        logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main([str(argument) for argument in arguments])
            self.code = 0
        except SystemExit as error:
            self.code = error.code or 0
        finally:
            logger.removeHandler(handler)
        self.out, self.err, self.log = out.getvalue(), err.getvalue(), log.getvalue()


def config_of(*arguments):
    output = Output("fit", *arguments, "--print_config")
    assert output.code == 0
    return yaml.safe_load(output.out)


def classes(config):
    return [callback["class_path"].split(".")[-1] for callback in config["trainer"]["callbacks"]]


@pytest.mark.parametrize(
    ("given", "right"),
    [("--data.max_len", "data.max_length"), ("--trainer.max_st", "trainer.max_steps"), ("--seed", "seeds")],
)
def test_the_beginning_of_an_option_is_not_taken_for_it(given, right):
    output = Output("fit", "--config", QUICKSTART, given, "3", "--print_config")
    assert output.code == 2
    assert f"unrecognized arguments: {given}" in output.err
    assert f"did you mean {right}" in output.err


# ---------------------------------------------------------------------- help


def test_help_names_the_subcommands_and_examples():
    output = Output("--help")
    assert output.code == 0
    assert all(f"\n    {name} " in output.out for name in ("fit", "validate", "test", "predict"))
    assert "lightning-cl fit --config configs/quickstart.yaml\n" in output.out


def test_help_says_of_each_subcommand_what_it_does_here():
    """Not what Lightning's Trainer methods of those names do."""
    subcommands = Output("--help").out.partition("Available subcommands:")[2]
    assert "one after another" in " ".join(subcommands.split())


def test_fit_help_has_the_docstrings_of_data_and_trainer():
    text = " ".join(Output("fit", "--help").out.split())
    assert "the most tokens in a sample" in text  # TaskDataModule, max_length
    assert "what to learn, in order" in text  # TaskDataModule, tasks
    assert "Stop training once this number of epochs is reached" in text  # Trainer, max_epochs
    assert "--ckpt_path" in text


def test_fit_help_is_two_screens_of_what_is_set_first():
    text = Output("fit", "--help").out
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 100
    for group in first_help._GROUPS.values():
        assert [option for option in group if f"--{option}" not in text] == []  # each is an option that there is
    # Each method stands in it, and the way to all else.
    assert [name for name in ("EWC", "SI", "LwF", "Replay", "DERpp", "TaskMatrix") if name not in text] == []
    assert ":class:" not in text
    assert "--trainer.limit_val_batches" not in text
    assert text.splitlines()[-1].endswith("lightning-cl fit --help all")


def test_everything_is_under_help_all():
    text = Output("fit", "--help", "all").out
    assert {"--trainer.limit_val_batches", "--data.length_buckets", "--strengths"} <= set(text.split())
    assert Output("fit", "-h", "all").out == text


def test_the_other_subcommands_show_options_that_they_have():
    text = Output("predict", "--help").out
    assert "--run" in text
    assert "--strengths" not in text


def test_help_of_a_class_shows_its_arguments():
    text = " ".join(Output("fit", "--trainer.callbacks.help=EWC").out.split())
    assert "number of samples of a task that the Fisher is measured on" in text


@pytest.mark.parametrize("option", ["optimizer", "lr_scheduler"])
def test_there_is_no_optimizer_that_is_built_once(option):
    """It would carry its momentum from task to task."""
    assert f"--{option}" not in Output("fit", "--help").out
    assert Output("fit", "--config", QUICKSTART, f"--{option}=AdamW").code == 2


# ---------------------------------------------------------------------- configurations


def test_overlays_are_merged_and_nothing_is_hidden():
    config = config_of("--config", QUICKSTART, "--config", ROOT / "configs/methods/ewc_replay.yaml")
    assert classes(config) == ["TaskMatrix", "PromptSamples", "ModelCheckpoint", "EWC", "Replay"]
    assert config["trainer"]["max_steps"] == 260
    assert config["trainer"]["callbacks"][3]["init_args"]["normalize"] is True  # a default, spelt out


def test_printed_configuration_can_be_fed_back(tmp_path):
    config = config_of("--config", QUICKSTART, "--config", ROOT / "configs/methods/ewc_replay.yaml")
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(config))
    assert config_of("--config", path) == config


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_shipped_method_adds_to_the_quickstart(path):
    base, config = config_of("--config", QUICKSTART), config_of("--config", QUICKSTART, "--config", path)
    added = {
        "agem": ["AGEM"],
        "progressive_network": ["ProgressiveNetwork"],
        "progressive_adapters": ["ProgressiveAdapters"],
        "block_expansion": ["BlockExpansion"],
        "der": ["DER"],
        "derpp": ["DERpp"],
        "forgetting_budget": ["ForgettingBudget"],
        "general_replay": ["GeneralReplay"],
        "replay_while_training": ["Replay"],
        "self_replay": ["SelfReplay"],
        "self_replay_to_base": ["SelfReplay", "LwF"],
        "ewc": ["EWC"],
        "ewc_auto": ["EWC"],
        "ewc_proximal": ["EWC"],
        "kfac": ["KFACEWC"],
        "kl_budget": ["EWC"],
        "l2sp": ["L2SP"],
        "loss_curves": ["LossCurves"],
        "lwf": ["LwF"],
        "lwf_replay": ["Replay", "LwF"],
        "mas": ["MAS"],
        "merge": ["Merge"],
        "migu": ["MIGU"],
        "packnet": ["PackNet"],
        "recovery_probe": ["RecoveryProbe"],
        "rwalk": ["RWalk"],
        "si": ["SI"],
        "task_adapters": ["TaskAdapters"],
        "replay": ["Replay"],
        "ewc_replay": ["EWC", "Replay"],
        "naive": [],
        "kl_to_base": ["KLToBase"],
        "general_probe": ["GeneralProbe"],
        "inflora": ["InfLoRA"],
        "input_freeze": ["InputFreeze"],
        "interpolate": ["Interpolate"],
        "orthogonal_lora": ["OrthogonalLoRA"],
        "subspace_freeze": ["SubspaceFreeze"],
        "weight_average": ["WeightAverage"],
    }
    assert classes(config) == [*classes(base), *added[path.stem]]


def test_the_command_line_wins_over_files():
    config = config_of("--config", QUICKSTART, "--trainer.max_steps=7", "--model.optimizer.init_args.lr=0.5")
    assert config["trainer"]["max_steps"] == 7
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


# ---------------------------------------------------------------------- typos


def overlay(**callback):
    return {"trainer": {"callbacks+": [callback]}}


TYPOS = {
    "trainer": (["--trainer.max_stepz=3"], None, "trainer.max_steps"),
    "data": (["--data.max_lenght=3"], None, "data.max_length"),
    "class": (["--trainer.callbacks+=EWCC"], None, "EWC"),
    "class in yaml": ([], overlay(class_path="lightning_cl.Reply"), "Replay"),
    "model class": (["--model=CausalLMM"], None, "CausalLM"),
    "argument": (["--trainer.callbacks+=EWC", "--trainer.callbacks.strenght=1"], None, "strength"),
    "argument in yaml": ([], overlay(class_path="lightning_cl.EWC", init_args={"sampels": 3}), "samples"),
    "model argument": (["--model.optimiser=AdamW"], None, "optimizer"),
    "model argument by path": (["--model.init_args.shedule=null"], None, "schedule"),
    "model argument that resembles one of another class": (["--model.modle=x"], None, "model"),
    "trainer in yaml": ([], {"trainer": {"max_step": 3}}, "max_steps"),
    "data in yaml": ([], {"data": {"batchsize": 3}}, "batch_size"),
    "top level in yaml": ([], {"trainr": {"max_steps": 3}}, "max_steps"),
}


@pytest.fixture(scope="module", params=TYPOS)
def typo(request, tmp_path_factory):
    arguments, content, right = TYPOS[request.param]
    if content is not None:
        path = tmp_path_factory.mktemp("typo") / "typo.yaml"
        path.write_text(yaml.safe_dump(content))
        arguments = ["--config", path]
    return Output("fit", "--config", QUICKSTART, *arguments), right


def test_a_typo_is_answered_with_the_right_name(typo):
    output, right = typo
    hint = next((line for line in output.err.splitlines() if "did you mean" in line), "did you mean nothing")
    first = hint.split("did you mean ")[1].split(",")[0].split(" or ")[0].strip("?'-")
    assert first in (right, f"trainer.{right}", f"data.{right}")
    assert output.code == 2


def test_the_answer_to_a_typo_is_short_and_from_this_program(typo):
    output, _ = typo
    assert output.err.startswith("lightning-cl: error: ")
    assert "Traceback" not in output.err
    assert "nothing of a similar name" not in output.err
    assert len(output.err.splitlines()) <= 5


def test_a_name_that_resembles_nothing_is_not_guessed():
    output = Output("fit", "--config", QUICKSTART, "--qqqqxxxx=1")
    assert output.code == 2
    assert "did you mean" not in output.err
    assert "qqqqxxxx" in output.err


def test_unknown_subcommand_is_answered_with_the_known_ones():
    output = Output("fitt")
    assert output.code == 2
    assert all(name in output.err for name in ("'fitt'", "fit", "validate", "test", "predict"))


def test_a_typo_in_a_process_of_its_own(tmp_path):
    """`python -m`: the name of the program comes from another place than in the tests above."""
    path = tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump(TYPOS["argument in yaml"][1]))
    done = forked.run("-m", "lightning_cl", "fit", "--config", QUICKSTART, "--config", path, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("lightning-cl: error: ")
    assert "'samples'" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------- bad values


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The quickstart, made small by the command line alone: three little texts, a tiny model, four steps."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {
        "prose": "The quick brown fox sleeps in the barn, and the lazy dog does not. ",
        "python": "def add(first, second):\n    return first + second\n\n",
        "cpp": "#include <vector>\nint main() { return 0; }\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text * 80)
    model = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    previous = os.environ.get("LIGHTNING_CL_CACHE")
    os.environ["LIGHTNING_CL_CACHE"] = str(folder / "cache")
    yield [
        *("--config", QUICKSTART, "--trainer.max_steps=4", "--trainer.limit_val_batches=2"),
        *("--data.max_length=32", "--data.tokenizer.vocab_size=280", "--trainer.enable_progress_bar=false"),
        *(f"--data.tasks.{name}={folder / name}.txt" for name in texts),
        *(f"--model.model.{name}={value}" for name, value in model.items()),
    ]
    os.environ.pop("LIGHTNING_CL_CACHE")
    if previous is not None:
        os.environ["LIGHTNING_CL_CACHE"] = previous


def below(folder):
    return [f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.callbacks+=EWC", "--trainer.callbacks.strength=-1"], ["strength=-1", "at least 0"]),
        (["--trainer.callbacks+=Replay", "--trainer.callbacks.ratio=1.5"], ["ratio=1.5", "[0, 1)"]),
        (["--data.tasks.cpp=/nowhere/cpp.txt"], ["'cpp'", "/nowhere/cpp.txt", "no such file"]),
        (["--data.tasks.cpp=sample:java"], ["sample:java", "sample:python"]),
        (["--data.tokenizer=/nowhere/tokenizer"], ["tokenizer='/nowhere/tokenizer'", "no tokenizer folder"]),
        (["--data.batch_size=0"], ["batch_size=0", "at least 1"]),
        (["--ckpt_path=/nowhere/a.ckpt"], ["ckpt_path='/nowhere/a.ckpt'", "no such file"]),
        (["--ckpt_path=last"], ["ckpt_path='last'", "no checkpoint"]),
        (["--model.model=/nowhere/model"], ["model='/nowhere/model'", "no model folder"]),
        (["--model.model.vocab_size=100"], ["tokenizer", "280", "100"]),
        (["--model.model.model_type=lama"], ["lama", "llama"]),
        (["--model.schedule.init_args.warmup=2"], ["warmup=2", "between 0 and 1"]),
        (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], ["'prose'", "max_epochs"]),
    ],
    ids=lambda value: value[-1] if str(value[0]).startswith("--") else "",
)
def test_a_bad_value_is_one_line_and_no_traceback(tmp_path, small, arguments, words):
    output = Output("fit", *small, *below(tmp_path), *arguments)
    assert output.code == 1
    (line,) = (line for line in output.err.splitlines() if "lightning-cl: error:" in line)
    assert output.err.splitlines()[-1] == line
    assert all(word in line for word in words)
    assert "Traceback" not in output.err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_error_of_other_code_keeps_its_traceback(tmp_path, small, monkeypatch):
    """Only a message of ours says it all."""

    def broken(*args, **kwargs):
        return {}["somebody's bug"]

    monkeypatch.setattr("lightning_cl.cli.command.fit_tasks", broken)
    with pytest.raises(KeyError, match="somebody's bug"):
        Output("fit", *small, *below(tmp_path))


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, small):
    root = tmp_path_factory.mktemp("run")
    output = Output("fit", *small, *below(root), "--trainer.callbacks+=Replay")
    assert output.code == 0
    return root, root / "quickstart" / "version_0", output


@pytest.mark.parametrize("name", ["report.json", "matrix.csv", "matrix.png", "config.yaml", "metrics.csv"])
def test_a_run_leaves_its_files_in_one_folder(run, name):
    assert (run[1] / name).stat().st_size > 0


def test_a_run_leaves_a_checkpoint_for_every_task(run):
    assert {path.name for path in (run[1] / "tasks").iterdir()} == {"0-prose.ckpt", "1-python.ckpt", "2-cpp.ckpt"}


def test_the_saved_configuration_is_that_of_the_run(run):
    (path,) = run[0].rglob("config.yaml")
    config = yaml.safe_load(path.read_text())
    assert config["trainer"]["max_steps"] == 4
    assert classes(config)[-1] == "Replay"


def test_the_table_is_printed(run):
    report = json.loads((run[1] / "report.json").read_text())
    shown = run[2].log
    for name, row in zip(["before training", "prose", "python", "cpp"], report["matrix"], strict=True):
        cells = [name, *(f"{value:.3f}" for value in row)]
        assert any(line.split() == " ".join(cells).split() for line in shown.splitlines())


def test_the_model_folder_is_the_final_checkpoint(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run[1] / "model").eval()
    state = torch.load(run[1] / "tasks" / "2-cpp.ckpt", weights_only=True)["state_dict"]
    reference = AutoModelForCausalLM.from_config(model.config).eval()
    reference.load_state_dict({name.removeprefix("lm."): value for name, value in state.items()})
    ids = torch.tensor([AutoTokenizer.from_pretrained(run[1] / "model")("#include <vector>")["input_ids"]])
    assert torch.equal(model(ids).logits, reference(ids).logits)


def interrupted(run, folder):
    """A run that was killed right behind its second task."""
    (folder / "tasks").mkdir(parents=True)
    shutil.copy(run[1] / "tasks" / "1-python.ckpt", folder / "tasks")


def weights(folder):
    (path,) = folder.rglob("2-cpp.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def test_ckpt_path_last_goes_on_to_the_same_end(run, small, tmp_path):
    interrupted(run, tmp_path)
    output = Output("fit", *small, *below(tmp_path), "--trainer.callbacks+=Replay", "--ckpt_path=last")
    assert output.code == 0
    assert not list(tmp_path.rglob("0-prose.ckpt"))  # what was trained is not trained again
    one, other = weights(run[1]), weights(tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [json.loads(next(folder.rglob("report.json")).read_text()) for folder in (run[1], tmp_path)]
    assert reports[0]["matrix"] == reports[1]["matrix"]


def test_a_changed_learning_rate_is_used_behind_a_boundary(run, small, tmp_path):
    interrupted(run, tmp_path)
    arguments = ["--trainer.callbacks+=Replay", "--model.optimizer.init_args.lr=0.0", "--ckpt_path=last"]
    assert Output("fit", *small, *below(tmp_path), *arguments).code == 0
    before = torch.load(run[1] / "tasks" / "1-python.ckpt", weights_only=True)["state_dict"]
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_processes(small, tmp_path):
    """A rank that waits for another one at the saving of the configuration waits for ever."""
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    command = [sys.executable, "-m", "lightning_cl", "fit", *small, *below(tmp_path), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (report,) = tmp_path.rglob("report.json")
    assert len(json.loads(report.read_text())["matrix"]) == 4
    assert [path.parent for path in tmp_path.rglob("config.yaml")] == [report.parent]


THEIRS = """
import lightning as L
import torch

SEEN = []

class Theirs(L.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = torch.nn.Embedding(300, 4)
        self.head = torch.nn.Linear(4, 300)

    def training_step(self, batch, batch_idx):
        logits = self.head(self.embedding(batch["input_ids"]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    validation_step = training_step

    def configure_optimizers(self):
        SEEN.append(self.hparams.lr)
        return torch.optim.SGD(self.parameters(), self.hparams.lr)
"""


def test_hyper_parameters_of_a_checkpoint_do_not_win_over_the_command_line(tmp_path, monkeypatch):
    """Lightning's own command line lets them, silently."""
    (tmp_path / "somebodys_module.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "text.txt").write_text("some text to learn, not much of it. " * 20)
    arguments = ["fit", "--model=somebodys_module.Theirs", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    arguments += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--data.max_length=16"]
    arguments += ["--data.tokenizer=TrainedBPE", "--data.tokenizer.vocab_size=280"]
    arguments += [f"--data.tokenizer.cache_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    tasks = {name: str(tmp_path / "text.txt") for name in "ab"}
    assert Output(*arguments, f"--data.tasks={json.dumps({'a': tasks['a']})}", "--model.lr=0.25").code == 0
    checkpoint = tmp_path / "tasks" / "0-a.ckpt"
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["lr"] == 0.25
    again = Output(*arguments, f"--data.tasks={json.dumps(tasks)}", "--model.lr=0.5", f"--ckpt_path={checkpoint}")
    assert again.code == 0
    import somebodys_module

    assert somebodys_module.SEEN == [0.25, 0.5]
    del sys.modules["somebodys_module"]


def test_validate_prints_a_row_per_task_with_the_reports_numbers(run, small, tmp_path):
    output = Output("validate", *small, *below(tmp_path), f"--ckpt_path={run[1] / 'tasks' / '2-cpp.ckpt'}")
    assert output.code == 0
    lines = [line.split() for line in output.log.splitlines()]
    header = next(line for line in lines if "val_loss" in line)
    last = json.loads((run[1] / "report.json").read_text())["matrix"][-1]
    for name, expected in zip(["prose", "python", "cpp"], last, strict=True):
        (row,) = (line for line in lines if line[:1] == [name])
        assert float(row[1 + header.index("val_loss")]) == pytest.approx(expected, abs=1e-4)


def test_test_without_test_data_says_so(small, tmp_path):
    output = Output("test", *small, *below(tmp_path))
    assert output.code == 1
    assert "lightning-cl: error: no task has test data" in output.err


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        (["--trainer.max_steps=7"], "7 steps"),
        (["--trainer.max_steps=-1", "--trainer.max_epochs=3"], "{3 * batches} steps"),
        (["--trainer.max_steps=100000", "--trainer.max_epochs=2"], "{2 * batches} steps"),
        (
            ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=4"],
            "{quarter} steps",
        ),
    ],
)
def test_the_plan_has_the_steps_of_the_full_run(small, tmp_path, limits, steps):
    output = Output("fit", *small, *below(tmp_path), *limits, "--trainer.fast_dev_run=true")
    assert output.code == 0
    assert ": 1 steps" in output.log  # what the preflight itself took
    plans = re.findall(r"\d\. \w+: (\d+) batches an epoch, (\d+ steps)", output.log)
    assert plans
    for batches, found in plans:
        values = {"{3 * batches}": 3 * int(batches), "{2 * batches}": 2 * int(batches)}
        values["{quarter}"] = 2 * math.ceil(int(batches) / 4)
        expected = steps
        for name, value in values.items():
            expected = expected.replace(name, str(value))
        assert found == expected


def test_fast_dev_run_prints_the_plan_and_leaves_no_model(small, tmp_path):
    output = Output("fit", *small, *below(tmp_path), "--trainer.callbacks+=EWC", "--trainer.fast_dev_run=true")
    assert output.code == 0
    assert "1. prose:" in output.log
    assert "with replay" not in output.log  # there is none in this run
    told = output.log
    assert told.index("1. prose:") < told.index("Task 1/3")
    assert "bears loss" in told
    assert "| The⟦" in told  # the sample text, its first token without loss
    assert not any(words in told + output.out for words in ("when learnt", "before training", "In this case"))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors", ".json")]
