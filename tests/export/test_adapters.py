"""Adapters of all tasks in one folder: served at once by llama.cpp, loaded by peft, and named by an index."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import urllib.request

import pytest
import torch
from peft import PeftModel
from tiny_models import byte_bpe, tiny
from transformers import AutoModelForCausalLM

from lightning_cl import CausalLM
from lightning_cl.export.adapters import read_index, serving_lines, write_adapters
from lightning_cl.models.adapters import allocate_adapter

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

from lightning_cl.export.gguf import export_gguf  # noqa: E402
from lightning_cl.export.llama_cpp import LlamaCpp  # noqa: E402

SECRET = "secret-user-name"
TASKS = ["zoo", '--it\'s "Äpfel"; rm -rf $HOME/\nx']
IDS = torch.randint(3, 430, (40,), generator=torch.Generator().manual_seed(1)).tolist()
REPORT = {
    "monitor": "val_loss",
    "mode": "min",
    "tasks": TASKS,
    "watched": [],
    "matrix": [[5.0, 6.0], [2.0, 5.5], [2.25, 1.5]],
    "sentences": ["zoo was kept."],
    "costs": {"tasks": []},
    "measured_on": {},
    "methods": {"Replay": {"stored": {"zoo": 1234, TASKS[1]: 7}, "storage": "disk", "folders": [f"/home/{SECRET}"]}},
}


def adapted(base, tasks, **lora):
    """A module whose adapters all do much."""
    module = CausalLM(str(base), lora={"r": 4} | lora, dtype="float32")
    module.tokenizer = byte_bpe()
    module.configure_model()
    for task in tasks:
        allocate_adapter(module, task)
    torch.manual_seed(3)
    for name, parameter in module.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return module


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder with a base in it."""
    home = tmp_path_factory.mktemp("home") / SECRET
    tiny().save_pretrained(home / "base")
    byte_bpe().save_pretrained(home / "base")
    return home


@pytest.fixture(scope="module")
def written(home):
    module = adapted(home / "base", TASKS)
    before = {name: config.base_model_name_or_path for name, config in module.lm.peft_config.items()}
    files = write_adapters(module, home / "out", REPORT)
    assert {name: config.base_model_name_or_path for name, config in module.lm.peft_config.items()} == before
    export_gguf(home / "base", home / "out" / "model.gguf", "f32", tokenizer=byte_bpe(), pre="gpt-2", check=False)
    return module, home / "out", files


def expected(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


def commands(text):
    """The lines that a shell runs, each as its arguments."""
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


# ---------------------------------------------------------------------- what is written


def test_peft_loads_each_on_a_base_that_is_given(written, home):
    module, folder, files = written
    assert list(files) == TASKS
    for task, file in files.items():
        module.use_task(task)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), file.with_suffix(""))
        assert torch.equal(expected(again), expected(module.lm))
        with again.disable_adapter():
            assert (expected(again) - expected(module.lm)).abs().max() > 0.1
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "adapters.json", "model.gguf"]


def test_the_index_has_what_the_report_has(written):
    index = read_index(written[1])
    assert [each.task for each in index.adapters] == TASKS
    assert [(each.loss_when_learnt, each.loss_at_the_end) for each in index.adapters] == [(2.0, 2.25), (1.5, 1.5)]
    assert {(each.rank, each.alpha) for each in index.adapters} == {(4, 8)}
    assert "q_proj" in index.adapters[0].target_modules
    assert index.base.name is None
    assert index.base.words == "`base`, a local copy"


def test_no_written_byte_names_the_user_or_the_folder(written, home):
    files = [path for path in written[1].rglob("*") if path.is_file()]
    assert len(files) >= 12
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert str(home).encode() not in content, path


def test_the_card_tells_what_was_kept_of_other_peoples_data(written):
    card = (written[1] / "adapters" / "zoo" / "README.md").read_text()
    assert "| Replay | training samples, verbatim | zoo: 1,234, --it's" in card
    assert "**It is not in this folder.**" in card
    assert "base_model" not in card.split("---")[1].replace("# base_model", "")
    assert "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)" in card
    assert "vllm serve BASE --enable-lora --max-loras 1 --max-lora-rank 8 --lora-modules zoo=." in card
    assert "--lora ../zoo.gguf" in card


def test_one_adapter_for_all_tasks_and_no_gguf(home, tmp_path):
    module = adapted(home / "base", [])
    files = write_adapters(module, tmp_path, gguf=False)
    assert files == {"default": tmp_path / "adapters" / "default"}
    (only,) = read_index(tmp_path).adapters
    assert (only.task, only.gguf, only.loss_at_the_end) == (None, None, None)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), files["default"])
    assert torch.equal(expected(again), expected(module.lm))
    write_adapters(adapted(home / "base", ["zoo"]), tmp_path, gguf=False)  # in its place
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["zoo"]
    assert [each.task for each in read_index(tmp_path).adapters] == ["zoo"]
    assert "have no GGUF files" in serving_lines(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "missing", "index", "outside"])
def test_a_damaged_file_is_named(written, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(written[1], folder)
    weights, index = folder / "adapters" / "zoo" / "adapter_model.safetensors", folder / "adapters.json"
    name = {"changed": weights.name, "missing": "zoo.gguf"}.get(damage, index.name)
    if damage == "changed":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        (folder / "adapters" / "zoo.gguf").unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-40])
    else:
        index.write_text(index.read_text().replace('"adapters/zoo.gguf"', '"../zoo.gguf"'))
    with pytest.raises(ValueError, match=name):
        read_index(folder)


def test_what_cannot_be_written_is_refused_and_the_earlier_folder_stays(written, home, tmp_path):
    with pytest.raises(RuntimeError, match="no model yet"):
        write_adapters(CausalLM(str(home / "base"), lora={"r": 2}), tmp_path)
    write_adapters(adapted(home / "base", ["zoo"]), tmp_path)
    before = (tmp_path / "adapters.json").read_bytes()
    with pytest.raises(ValueError, match=r"use_dora=True.*merge=True"):
        write_adapters(adapted(home / "base", ["cow"], use_dora=True), tmp_path)
    assert (tmp_path / "adapters.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "adapters.json"]
    assert [each.task for each in read_index(tmp_path).adapters] == ["zoo"]


# ---------------------------------------------------------------------- served


def test_odd_names_reach_each_program_whole(written):
    _, folder, files = written
    odd = files[TASKS[1]].stem
    assert not odd.startswith("-")
    (folder / "Modelfile.zoo").write_text("FROM x")
    text = serving_lines(folder)
    (folder / "Modelfile.zoo").unlink()
    vllm, llama, *curls, ollama = commands(text)
    assert vllm == [
        *shlex.split("vllm serve BASE --enable-lora --max-loras 2 --max-lora-rank 8 --lora-modules zoo=adapters/zoo"),
        f"{odd}=adapters/{odd}",
    ]
    assert llama == [
        *shlex.split("llama-server -m model.gguf --lora-init-without-apply --lora adapters/zoo.gguf --lora"),
        f"adapters/{odd}.gguf",
    ]
    assert [json.loads(curl[-1])["lora"] for curl in curls] == [[{"id": 0, "scale": 1.0}], [{"id": 1, "scale": 1.0}]]
    assert ollama == ["ollama", "create", "model-zoo", "-f", "Modelfile.zoo"]
    assert "write_task_modelfiles" in text
    elsewhere = commands(serving_lines(folder, "/models/it's here/x.gguf"))[1]
    assert elsewhere[:3] == ["llama-server", "-m", "/models/it's here/x.gguf"]


def test_vllm_gets_no_adapter_that_it_would_compute_wrongly(home, tmp_path):
    """It reads one rank and one strength for all layers."""
    write_adapters(adapted(home / "base", ["zoo"], alpha_pattern={"q_proj": 3}), tmp_path, gguf=False)
    text = serving_lines(tmp_path)
    assert "# vLLM cannot serve these adapters exactly (zoo: alpha_pattern)" in text
    assert commands(text) == []


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's wheel is not installed")
def test_llama_cpp_switches_with_each_request_as_the_lines_say(written):
    module, folder, files = written
    wanted = []
    for task in TASKS:
        module.use_task(task)
        wanted.append(expected(module.lm))
    module.use_task(None)
    base = expected(module.lm)
    llama = LlamaCpp(folder / "model.gguf", context=64, adapters=list(files.values()))
    for scales, logits in (((1.0, 0.0), wanted[0]), ((0.0, 1.0), wanted[1]), ((0.0, 0.0), base), ((1.0,), wanted[0])):
        torch.testing.assert_close(llama.logprobs(IDS, scales), logits, atol=2e-4, rtol=0)
    assert min(float((one - base).abs().max()) for one in wanted) > 0.1
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.1
    # The bodies of the printed requests, in another order, with tokens as the prompt.
    lines = serving_lines(folder).splitlines()
    bodies = [json.loads(shlex.split(line)[-1]) for line in lines if line.startswith("curl")]
    bodies.append({"lora": json.loads(next(x for x in lines if "alone: " in x).rpartition("alone: ")[2])})
    for i in (1, 0, 2, 0):
        body = bodies[i] | {"prompt": IDS, "n_predict": 1, "n_probs": 5, "temperature": 0, "cache_prompt": False}
        request = urllib.request.Request(
            f"{llama._server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            told = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        for entry in told:
            assert entry["logprob"] == pytest.approx(float([*wanted, base][i][entry["id"]]), abs=2e-4)
