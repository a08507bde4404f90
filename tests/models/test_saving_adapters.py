"""Adapters of several tasks on disk: each by itself, all, their mean, merged; never the untrained base in silence."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from adapting import IDS, base_model, logits, move
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_cl import CausalLM, TrainedBPE
from lightning_cl.models.adapter_factors import adapter_factors
from lightning_cl.models.adapter_names import adapter_name
from lightning_cl.models.adapters import allocate_adapter, train_adapter, use_adapter, using_adapter

TASKS = ["chat", "my/code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(path)
    return path


def with_tasks(folder, tasks=TASKS, untrained=(), lora=None, **settings):
    module = CausalLM(folder, lora={"r": 4} | (lora or {}), **settings)
    module.configure_model()
    for task in [*tasks, *untrained]:
        allocate_adapter(module, task)
    move(module, tasks)
    module.lm.eval()
    return module


def outputs(module, task):
    with using_adapter(module, task):
        return logits(module.lm)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*untrained")
        yield


# ---------------------------------------------------------------------- one task


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_loaded_by_peft_and_gives_its_logits(tmp_path, folder, task):
    module = with_tasks(folder)
    use_adapter(module, "chat")
    expected = outputs(module, task)
    assert (expected - logits(base_model())).abs().max() > 0.1
    module.save_pretrained(tmp_path / "out", task=task)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path / "out")), expected)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # In memory nothing has changed: what is in use, and the configuration.
    assert module.lm.active_adapters == ["task-chat"]
    assert not module.lm.peft_config[adapter_name(task)].inference_mode


def test_a_copy_of_a_whole_layer_is_saved_with_its_task(tmp_path):
    base_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    module = with_tasks(tmp_path / "base", lora={"modules_to_save": ["lm_head"]})
    module.save_pretrained(tmp_path / "out", task="my/code")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), outputs(module, "my/code"))


def test_the_only_task_needs_no_name(tmp_path, folder):
    module = with_tasks(folder, ["chat"])
    module.save_pretrained(tmp_path / "out")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), outputs(module, "chat"))


# ---------------------------------------------------------------------- all


@pytest.mark.parametrize("task", ["all", None])
def test_all_tasks_are_in_folders_of_their_names(tmp_path, folder, task):
    module = with_tasks(folder, [*TASKS, "my_code", "base!"])
    module.tokenizer = TrainedBPE(280, str(tmp_path / "bpe")).train(["the cat sleeps in the barn"])
    module.save_pretrained(tmp_path / "out", task=task)
    places = {"chat": "chat", "my/code": "my_code", "my_code": "my_code-3", "base!": "base_"}
    places["base!"] = next(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("base"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(places.values())
    for name, place in places.items():
        again = PeftModel.from_pretrained(base_model(), tmp_path / "out" / place)
        assert torch.equal(logits(again), outputs(module, name))
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / place)("the cat")["input_ids"]


def test_all_tasks_merged_are_models(tmp_path, folder):
    module = with_tasks(folder)
    module.save_pretrained(tmp_path / "out", task="all", merge=True)
    for task, place in zip(TASKS, ("chat", "my_code"), strict=True):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / place)
        torch.testing.assert_close(logits(again), outputs(module, task), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------- the mean


def mean_model(module, tasks):
    """The base plus the mean of all ΔW, by hand."""
    model = base_model()
    with torch.no_grad():
        for task in tasks:
            for factors in adapter_factors(module.lm, adapter_name(task)):
                weight = model.get_submodule(factors.path.removeprefix("base_model.model.")).weight
                weight += factors.scale * factors.second @ factors.first / len(tasks)
    return model


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": ["k_proj", "embed_tokens"]}]
)
def test_the_mean_of_the_tasks(tmp_path, folder, lora):
    module = with_tasks(folder, [*TASKS, "third"], untrained=["later"], lora=lora)
    if "target_modules" in lora:  # an adapter of the embeddings is none of the tied head
        expected = None
    else:
        expected = logits(mean_model(module, [*TASKS, "third"]))
    module.save_pretrained(tmp_path / "out", task="mean")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 12
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    for factors in adapter_factors(again, "default"):
        assert factors.scale == 1
        parts = [f for t in [*TASKS, "third"] for f in adapter_factors(module.lm, adapter_name(t))]
        mean = sum(f.scale * f.second @ f.first for f in parts if f.path == factors.path) / 3
        torch.testing.assert_close(factors.second @ factors.first, mean)
    if expected is not None:
        torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)
        module.save_pretrained(tmp_path / "merged", task="mean", merge=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_the_mean_of_one_task_is_that_task(tmp_path, folder):
    module = with_tasks(folder, ["chat"])
    module.save_pretrained(tmp_path / "out", task="mean")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), outputs(module, "chat"))


# ---------------------------------------------------------------------- merged


@pytest.mark.parametrize("use", ["chat", "my/code", None])
def test_a_merged_task_is_that_task_and_not_the_base(tmp_path, folder, use):
    """Whatever is in use, and although the model came with an adapter that nobody trained."""
    module = with_tasks(folder)
    module.use_task(use)
    module.save_pretrained(tmp_path / "out", task="my/code", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), outputs(module, "my/code"), rtol=1e-3, atol=1e-3)
    assert (logits(merged) - logits(base_model())).abs().max() > 0.1
    written, base = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
    assert all(not torch.equal(written[n], base[n]) for n in base if "_proj" in n)


def test_after_training_one_task_alone_the_merged_model_is_trained(tmp_path, folder):
    module = with_tasks(folder, [], untrained=["chat"])
    train_adapter(module, "chat")
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        module.lm(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    module.save_pretrained(tmp_path / "out", merge=True)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(merged, outputs(module, "chat"), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(merged, logits(base_model()), rtol=1e-3, atol=1e-3)


def test_several_tasks_are_not_merged_by_guessing(tmp_path, folder):
    with pytest.raises(ValueError, match=r"adapters of \['chat', 'my/code'\]: give one of them as `task`, or 'mean'"):
        with_tasks(folder).save_pretrained(tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [False, True])
def test_an_untrained_adapter_among_others_is_not_exported_in_silence(tmp_path, folder, merge):
    module = with_tasks(folder, ["chat"], untrained=["later"])
    with pytest.warns(UserWarning, match="the adapter 'later' is untrained"):
        module.save_pretrained(tmp_path / "out", task="later", merge=merge)
    nothing = with_tasks(folder, [], untrained=["a", "b"])
    with pytest.raises(ValueError, match=r"'mean'.*: none of the adapters has been trained"):
        nothing.save_pretrained(tmp_path / "mean", task="mean", merge=merge)


def test_an_adapter_of_peft_besides_the_untrained_default(tmp_path, folder):
    """A model that somebody gave a second adapter: the first one is in the root of what peft writes."""
    module = CausalLM(folder, lora={"r": 4})
    module.configure_model()
    module.lm.add_adapter("mine", module.lm.peft_config["default"])
    move(module, ["mine"])
    module.lm.set_adapter("mine")
    expected = logits(module.lm)
    module.save_pretrained(tmp_path / "adapter", task="mine")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    module.save_pretrained(tmp_path / "merged", task="mine", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="give one of them as `task`"):
        module.save_pretrained(tmp_path / "guess", merge=True)


# ---------------------------------------------------------------------- checkpoints


def test_the_adapters_of_all_tasks_are_in_a_checkpoint_and_the_base_is_not(folder):
    module = with_tasks(folder)
    train_adapter(module, "my/code")
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    other = with_tasks(folder, [], untrained=TASKS)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    for task in TASKS:
        assert torch.equal(outputs(other, task), outputs(module, task))


def test_a_checkpoint_of_another_rank_of_the_tasks_keeps_its_base(folder):
    """The model is described by the adapter that it was built with, not by those of the tasks."""
    module, other = (CausalLM(folder, lora={"r": 4}) for _ in range(2))
    for made in (module, other):
        made.configure_model()
    allocate_adapter(module, "chat", rank=2)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    allocate_adapter(other, "chat", rank=2)
    other.load_state_dict(checkpoint["state_dict"])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("task", "message"), [("cod", r"task='cod': it has no adapter"), ("mean", "has use_dora")])
def test_mistakes_are_named_before_anything_is_written(tmp_path, folder, task, message):
    module = with_tasks(folder, lora={"use_dora": True})
    with pytest.raises(ValueError, match=message):
        module.save_pretrained(tmp_path / "out", task=task)
    assert not (tmp_path / "out").exists()


def test_a_task_without_any_adapter(tmp_path, folder):
    module = CausalLM(folder)
    module.configure_model()
    with pytest.raises(ValueError, match=r"save_pretrained\(task='chat'\): there is no adapter to save \(lora=None\)"):
        module.save_pretrained(tmp_path / "out", task="chat")
