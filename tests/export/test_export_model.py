"""A whole export: the losses in its table, adapters, what is refused, what is left when it fails, and the callback."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from tiny_models import byte_bpe, tiny
from toys import trainer
from transformers import AutoModelForCausalLM

from lightning_cl import CausalLM, Export, Task, TaskAdapters, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.export.adapters import write_adapters
from lightning_cl.export.formats import INDEX, TORCH, Exported, Format
from lightning_cl.export.handover import export_model
from lightning_cl.export.modelfile import read_modelfile
from lightning_cl.export.sequences import held_out_sequences
from lightning_cl.models.adapters import use_adapters

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = {
    "zoo": "The quick brown fox sleeps in the barn; I'm sure that it's 12 or 123. ",
    "ant/2": "def f(x):\n    if x > 0:\n        return x**2\n",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny().save_pretrained(folder)
    byte_bpe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(TEXTS.values()):
        (folder / f"{index}.txt").write_text(text * 40)
    return folder


def learn(folder, base, texts, callbacks, **settings):
    """A run of two tasks, two steps each."""
    torch.manual_seed(0)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    module = CausalLM(base, optimizer=optimizer, schedule=None, dtype="float32", **settings)
    tasks = [Task(name, str(texts / f"{index}.txt")) for index, name in enumerate(TEXTS)]
    data = TaskDataModule(tasks, tokenizer=byte_bpe(), max_length=24, batch_size=2, seed=1)
    run = trainer(folder, callbacks, max_steps=2, num_sanity_val_steps=0, limit_val_batches=2)
    fit_tasks(run, module, data)
    return module, data


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, base, texts):
    """A model with an adapter for each task, both of which do much."""
    module, data = learn(tmp_path_factory.mktemp("adapted"), base, texts, [TaskAdapters(), TaskMatrix()], lora={"r": 2})
    torch.manual_seed(1)
    for name, parameter in module.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return module, data


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, texts):
    return learn(tmp_path_factory.mktemp("trained"), base, texts, [TaskMatrix()])


def loss_of(model, ids):
    """The mean loss of one text, position by position."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids))) / (len(ids) - 1)


def mean_loss(model, rows):
    """The mean over the tokens of all sequences, each computed by itself."""
    weights = [len(each.ids) - 1 for each in rows]
    return sum(w * loss_of(model, each.ids) for w, each in zip(weights, rows, strict=True)) / sum(weights)


def row(done, name):
    return next(each for each in done.formats if each.name == name)


def approx(losses, tolerance=2e-4):
    return {task: pytest.approx(loss, abs=tolerance) for task, loss in losses.items()}


# ---------------------------------------------------------------------- what is measured


def test_sequences_are_documents_alone_and_end_at_the_last_token_that_is_asked_for(tmp_path):
    """Packed rows, padded rows and completions, whose prompts bear no loss."""
    records = [{"prompt": "Q: 12?", "completion": " it's HE"}, {"prompt": "x", "completion": " return x**2"}]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n")
    tokenizer = byte_bpe()
    found = {}
    for packing in (False, True):
        task = Task("task", str(file), val=str(file))
        data = TaskDataModule([task], tokenizer=tokenizer, max_length=64, batch_size=2, packing=packing)
        data.prepare_data()
        data.setup("fit")
        found[packing] = held_out_sequences(data, task, 1000)
        cut = held_out_sequences(data, task, 3)
        assert sum(label != -100 for each in cut for label in each.labels) == 3
        assert cut[-1].labels[-1] != -100
        assert cut[0].ids == found[packing][0].ids[: len(cut[0].ids)]
    assert sorted(found[True]) == sorted(found[False])
    for record, each in zip(records, found[False], strict=True):
        prompt = len(tokenizer(record["prompt"])["input_ids"])
        assert each.labels[:prompt] == [-100] * prompt
        assert each.labels[prompt:] == each.ids[prompt:]
        assert tokenizer.decode(each.ids, skip_special_tokens=True) == record["prompt"] + record["completion"]


def test_losses_are_those_of_the_same_tokens_in_every_format(trained, tmp_path):
    module, data = trained
    done = export_model(module, tmp_path / "out", ["gguf", "ollama", "hf"], ["f32", "q4_0"], data=data, tokens=40)
    expected = {}
    for task in data.tasks:
        rows = held_out_sequences(data, task, 40)
        expected[task.name] = mean_loss(module.lm.eval(), rows)
    assert row(done, TORCH).losses == approx(expected, 1e-5)
    assert row(done, "gguf f32").losses == approx(expected)
    assert row(done, "hf").losses == approx(expected, 1e-5)
    packed = row(done, "gguf q4_0").losses
    assert all(1e-4 < abs(packed[task] - expected[task]) < 0.5 for task in expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.lm.state_dict().items())
    assert set(done.checksums) >= {"out-f32.gguf", "out-q4_0.gguf", "Modelfile", "hf/model.safetensors"}
    modelfile = read_modelfile((tmp_path / "out" / "Modelfile").read_text())
    assert dict(modelfile)["from"] == "./out-f32.gguf"


@pytest.mark.parametrize(("monitor", "value"), [("val_loss", math.nan), ("val_token_accuracy", 0.05)])
def test_forgetting_of_another_unit_or_unknown_is_not_set_next_to_nats(trained, tmp_path, monitor, value):
    module, data = trained
    report = module.run_report | {"monitor": monitor, "forgetting": value}
    done = export_model(module, tmp_path / "out", ["hf"], data=data, report=report, tokens=8)
    assert done.forgetting is None


def test_a_model_that_diverged_is_exported_too(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_cl.export.making.torch_loss", lambda model, sequences: math.inf)
    done = export_model(trained[0], tmp_path / "out", ["hf"], data=trained[1], tokens=8)
    assert done.rows()[1][2:4] == ["–", "–"]


def test_tokens_are_of_several_documents_and_as_many_as_asked_for(trained):
    data = trained[1]
    for tokens in (8, 40, 160, 10**6):
        rows = held_out_sequences(data, data.tasks[0], tokens)
        count = sum(label != -100 for each in rows for label in each.labels)
        every = held_out_sequences(data, data.tasks[0], 10**9)
        assert count == min(tokens, sum(len(each.ids) - 1 for each in every))
        assert len(rows) == min(8, len(every)) or count > 8
        assert all(len(each.ids) <= 5 for each in held_out_sequences(data, data.tasks[0], tokens, 5))


def test_without_llama_cpp_the_numbers_of_the_file_are_unpacked(trained, tmp_path, monkeypatch):
    module, data = trained
    through = export_model(module, tmp_path / "a", ["gguf"], "q8_0", data=data, tokens=16)
    monkeypatch.setattr("lightning_cl.export.making.is_installed", lambda: False)
    monkeypatch.setattr("lightning_cl.export.gguf.is_installed", lambda: False)
    unpacked = export_model(module, tmp_path / "b", ["gguf"], "q8_0", data=data, tokens=16)
    assert row(unpacked, "gguf q8_0").measured == "torch, unpacked"
    assert row(unpacked, "gguf q8_0").losses == approx(row(through, "gguf q8_0").losses, 0.05)
    assert row(unpacked, "gguf q8_0").losses != row(unpacked, TORCH).losses


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("task", ["zoo", "ant/2"])
def test_a_tasks_adapter_is_merged(adapted, tmp_path, task):
    module, data = adapted
    done = export_model(module, tmp_path / "out", ["gguf"], "f32", task, data, tokens=16)
    assert row(done, "gguf f32").losses == approx(row(done, TORCH).losses)
    module.use_task(task)
    rows = held_out_sequences(data, data.tasks[0], 16)
    assert row(done, TORCH).losses["zoo"] == pytest.approx(mean_loss(module.lm.eval(), rows), abs=1e-5)


def test_the_mean_of_all_adapters_is_another_model_than_each(adapted, tmp_path):
    module, data = adapted
    done = export_model(module, tmp_path / "out", ["gguf", "hf"], "f32", "mean", data, tokens=16)
    assert row(done, "gguf f32").losses == approx(row(done, "hf").losses)
    assert row(done, TORCH).losses == approx(row(done, "hf").losses)
    # The model in memory has no such mean: it is shown, and what a format costs is not taken from it.
    rises = [row(done, "hf").losses[task] - loss for task, loss in row(done, "own adapters").losses.items()]
    assert min(map(abs, rises)) > 1e-3
    assert not done.sentences()[1:]


def test_adapters_that_add_up_are_exported_as_their_sum(adapted, tmp_path):
    """As OrthogonalLoRA leaves them: all are in use at once, for every task."""
    module, data = adapted
    use_adapters(module, list(TEXTS))
    rows = held_out_sequences(data, data.tasks[1], 16)
    with pytest.raises(ValueError, match="task='all': this model adds the adapters of all tasks up"):
        export_model(module, tmp_path / "no", ["hf"], task="all")
    done = export_model(module, tmp_path / "out", ["gguf", "hf"], "f32", None, data, tokens=16)
    expected = mean_loss(module.lm.eval(), rows)
    for name in (TORCH, "gguf f32", "hf"):
        assert row(done, name).losses["ant/2"] == pytest.approx(expected, abs=2e-4)
    module.use_task("zoo")
    assert abs(mean_loss(module.lm, rows) - expected) > 1e-2


@pytest.mark.parametrize("to", ["hf", "mlx", "ollama"])
def test_adapters_apart_are_there_in_every_format(adapted, tmp_path, to):
    done = export_model(adapted[0], tmp_path / "out", [to], "f32", "all")
    assert {path.name for path in (tmp_path / "out" / "adapters").iterdir() if path.is_dir()} == {"zoo", "ant_2"}
    assert any("adapters/" in file for each in done.formats for file in each.files)


def test_a_task_without_an_adapter_is_measured_on_the_base(adapted, tmp_path, monkeypatch):
    """As a task of later, or one that is only watched."""
    module, data = adapted
    monkeypatch.setattr("lightning_cl.export.handover.adapted_tasks", lambda module: ["zoo"])
    monkeypatch.setattr("lightning_cl.export.making.write_adapters", only_zoo)
    module.use_task("ant/2")
    done = export_model(module, tmp_path / "out", ["gguf"], "f32", "all", data, tokens=16)
    module.use_task(None)
    base = mean_loss(module.lm.eval(), held_out_sequences(data, data.tasks[1], 16))
    assert row(done, TORCH).losses["ant/2"] == pytest.approx(base, abs=1e-5)
    assert row(done, "gguf f32").losses == approx(row(done, TORCH).losses)


def only_zoo(*arguments, **more):
    return {task: file for task, file in write_adapters(*arguments, **more).items() if task == "zoo"}


def test_a_measurement_that_fails_leaves_the_files(trained, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        raise RuntimeError("context is too long")

    monkeypatch.setattr("lightning_cl.export.making.llama_loss", broken)
    module, data = trained
    with pytest.warns(UserWarning, match="gguf f16: its losses could not be measured: context is too long"):
        done = export_model(module, tmp_path / "out", ["gguf"], "f16", data=data, tokens=8)
    assert done.rows()[-1][2:4] == ["–", "–"]
    assert (tmp_path / "out" / "out-f16.gguf").is_file()


@pytest.mark.parametrize("llama", [True, False])
def test_adapters_apart_each_compute_their_own_task(adapted, tmp_path, monkeypatch, llama):
    module, data = adapted
    if not llama:
        monkeypatch.setattr("lightning_cl.export.making.is_installed", lambda: False)
    done = export_model(module, tmp_path / "out", ["gguf", "ollama"], "f32", "all", data, tokens=16)
    expected = {}
    for task in data.tasks:
        module.use_task(task.name)
        expected[task.name] = mean_loss(module.lm.eval(), held_out_sequences(data, task, 16))
    assert row(done, TORCH).losses == approx(expected, 1e-5)
    assert row(done, "gguf f32").losses == approx(expected)
    assert len(row(done, "ollama").files) == 2


@pytest.mark.parametrize("task", ["zoo", "all"])
def test_mlx_computes_the_same_merged_and_apart(adapted, tmp_path, task):
    if importlib.util.find_spec("mlx_lm") is None:  # its import would lower the number of files that may be open
        pytest.skip("the extra mlx is not installed")
    module, data = adapted
    done = export_model(module, tmp_path / "out", ["mlx", "hf"], task=task, data=data, tokens=16)
    assert row(done, "mlx").losses == approx(row(done, TORCH).losses)
    assert row(done, "mlx").measured == "MLX"
    assert (tmp_path / "out" / "mlx-adapters").is_dir() == (task == "all")


# ---------------------------------------------------------------------- refused, and failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gguf"}, r"to='gguf': expected some of \['gguf', 'ollama', 'mlx', 'hf'\]"),
        ({"to": ["onnx"]}, r"to=\['onnx'\]"),
        ({"to": []}, r"to=\[\]"),
        ({"type": "q9"}, r"type='q9'"),
        ({"type": []}, r"type=\[\]: expected at least one"),
        ({"tokens": 0}, "tokens=0"),
        ({"task": None}, r"task=None: there is an adapter for each of \['zoo', 'ant/2'\]"),
        ({"task": "cow"}, "task='cow': it has no adapter"),
        ({"task": "sum"}, "task='sum': it has no adapter"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_written(adapted, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_model(adapted[0], tmp_path / "out", **{"task": "zoo"} | arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_in_it_is_left_alone(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="there are other files already"):
        export_model(trained[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_the_earlier_one(trained, tmp_path, monkeypatch):
    module, _ = trained
    first = export_model(module, tmp_path / "out", ["hf"])
    left = tmp_path / f".{2**22 + 1}.out"  # of a process that was killed: no process has this number
    left.mkdir()

    def full(*arguments, **more):
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_cl.export.making.write_modelfile", full)
    with pytest.raises(OSError, match="No space"):
        export_model(module, tmp_path / "out", ["ollama", "hf"], "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Exported.read(tmp_path / "out") == first
    monkeypatch.undo()
    export_model(module, tmp_path / "out", ["ollama", "hf"], "f16")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gguf")) == ["out-f16.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_table_says_what_a_format_costs_next_to_what_was_forgotten(tmp_path):
    nan = math.nan
    formats = (
        Format(TORCH, losses={"a": 2.0, "b": 1.0, "c": nan}, measured="torch"),
        Format("gguf q4_0", ("x.gguf",), 1_500_000, {"a": 2.3, "b": 1.1, "c": nan}, "llama.cpp"),
        Format("gguf f16", ("y.gguf",), 6_000_000, {"a": 2.001, "b": 1.0, "c": nan}, "llama.cpp"),
    )
    done = Exported(tmp_path, formats, {"a": 512, "b": 500, "c": 0}, 0.05, ("b",))
    assert done.rows()[2] == ["gguf q4_0", "1.5 MB", "+0.300", "+0.100", "–", "llama.cpp"]
    assert done.rows()[3][2:4] == ["+0.001", "0.000"]
    said = done.sentences()
    assert said[1:] == [
        "Without validation data, and so over training data: b.",
        "gguf q4_0 costs 0.200 nats a token on average, most on a (0.300); the tasks that came later cost 0.050.",
    ]
    done.write(tmp_path)
    again = Exported.read(tmp_path)
    assert again.rows() == done.rows()
    assert "NaN" not in (tmp_path / INDEX).read_text()


# ---------------------------------------------------------------------- after each task


def test_the_callback_exports_after_each_task_and_changes_no_training(base, texts, tmp_path, trained, monkeypatch):
    callback = Export(["hf"], tokens=8)
    module, _ = learn(tmp_path, base, texts, [callback, TaskMatrix()])
    assert all(torch.equal(value, module.lm.state_dict()[name]) for name, value in trained[0].lm.state_dict().items())
    folders = sorted((tmp_path / "export").iterdir())
    assert folders == list(callback.written.values())
    assert [folder.name[0] for folder in folders] == ["0", "1"]
    first, last = (AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict() for folder in folders)
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert all(torch.equal(value, last[name]) for name, value in module.lm.state_dict().items())
    # The card of the first is of the time after the first task.
    cards = [(folder / "hf" / "README.md").read_text() for folder in folders]
    assert cards[0].count("| zoo |") < cards[1].count("| zoo |") or len(cards[0]) < len(cards[1])


def test_an_export_that_fails_does_not_end_the_run(base, texts, tmp_path, monkeypatch, trained):
    def broken(*arguments, **more):
        raise ValueError("rope scaling is unknown")

    monkeypatch.setattr("lightning_cl.export.callback.export_model", broken)
    with pytest.warns(UserWarning, match="was not written .rope scaling is unknown.; the run is continued"):
        module, _ = learn(tmp_path, base, texts, [Export(["hf"])])
    assert all(torch.equal(value, module.lm.state_dict()[name]) for name, value in trained[0].lm.state_dict().items())
