"""Models on disk: whole, as an adapter, merged; what is written is checked before the call returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import CausalLM, TrainedBPE

VOCABULARY = 300


def save_model(path, tied, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TrainedBPE(280, str(tmp_path_factory.mktemp("vocabulary"))).train(["the cat sleeps in the barn"])


def lm(folder, tokenizer=None, size=0.1, **settings):
    """With weights, or an adapter, that training has moved."""
    torch.manual_seed(0)
    module = CausalLM(folder, schedule=None, **settings)
    module.tokenizer = tokenizer
    module.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    module.lm.eval()
    return module


IDS = torch.arange(24)[None] * 7 % VOCABULARY


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


# ---------------------------------------------------------------------- whole


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_whole(tmp_path, folder, tokenizer, dtype):
    module = lm(folder, tokenizer, dtype=dtype)
    module.save_pretrained(tmp_path / "new" / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", dtype="auto")
    assert again.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert torch.equal(logits(again), logits(module.lm))
    tied = module.lm.config.tie_word_embeddings
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "model" / "model.safetensors")) != tied
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(module.lm))


def perturbing(monkeypatch, model, file, change):
    """`save_pretrained` as a failing disk leaves it."""
    original = type(model).save_pretrained

    def save(self, folder, *args, **settings):
        original(self, folder, *args, **settings)
        path = Path(folder) / file
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", save)


def flip(content):
    name = sorted(content)[-1]
    value = content[name].clone()
    value.view(-1)[-1] = torch.nextafter(value.view(-1)[-1], torch.tensor(9.0))
    content[name] = value


def drop(content):
    content.pop(sorted(content)[0])


def transpose(content):
    name = next(name for name in sorted(content) if content[name].ndim == 2)
    content[name] = content[name].flip(0).contiguous()


@pytest.mark.parametrize("change", [flip, transpose])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "adapter"])
def test_a_write_that_went_wrong_is_noticed(tmp_path, folder, monkeypatch, change, lora):
    module = lm(folder, lora=lora)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    perturbing(monkeypatch, module.lm, file, change)
    with pytest.raises(RuntimeError, match=r"model: what was written is not what is in memory: \['"):
        module.save_pretrained(tmp_path / "model")


def test_a_tensor_that_was_not_written_is_noticed(tmp_path, folder, monkeypatch):
    module = lm(folder, lora={"r": 4})
    perturbing(monkeypatch, module.lm, "adapter_model.safetensors", drop)
    with pytest.raises(RuntimeError, match="what was written is not what is in memory"):
        module.save_pretrained(tmp_path / "model")


def test_a_merged_model_that_was_written_wrong_is_noticed(tmp_path, folder, monkeypatch):
    module = lm(folder, lora={"r": 4})
    perturbing(monkeypatch, module.lm.get_base_model(), "model.safetensors", flip)
    with pytest.raises(RuntimeError, match="what was written is not what is in memory"):
        module.save_pretrained(tmp_path / "model", merge=True)


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_an_adapter_is_loaded_by_peft_with_its_base(tmp_path, folder, tokenizer, quantization):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    if quantization:
        pytest.importorskip("bitsandbytes")
    module = lm(folder, tokenizer, lora={"r": 4}, quantization=quantization)
    module.save_pretrained(tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert written
    assert all(".lora_" in name for name in written)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    if quantization is None:
        assert torch.equal(logits(again), logits(module.lm))
    else:  # peft loads the base unquantised
        plain = lm(folder, lora={"r": 4})
        adapter = {name: p for name, p in module.named_parameters() if p.requires_grad}
        plain.load_state_dict(adapter, strict=False)
        torch.testing.assert_close(logits(again), logits(plain.lm))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "adapter")("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    )


def test_an_adapter_with_a_trained_head_is_saved_with_it(tmp_path):
    from peft import AutoPeftModelForCausalLM

    folder = save_model(tmp_path / "base", tied=False)
    module = lm(folder, lora={"r": 4, "modules_to_save": ["lm_head"]})
    module.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(module.lm))


def test_what_was_unfrozen_beside_the_adapter_is_not_lost_in_silence(tmp_path, folder):
    """Adapter and merged model are made from the base on disk, which has not been trained."""
    module = lm(folder, lora={"r": 4})
    with torch.no_grad():
        norm = module.lm.get_base_model().model.norm.weight
        norm.requires_grad_(True).mul_(2)
    for merge in (False, True):
        with pytest.raises((RuntimeError, ValueError), match=r"model\.norm\.weight"):
            module.save_pretrained(tmp_path / str(merge), merge=merge)


# ---------------------------------------------------------------------- merged


def test_merged_computes_what_base_and_adapter_compute(tmp_path, folder, tokenizer):
    module = lm(folder, tokenizer, lora={"r": 4})
    expected = logits(module.lm)
    module.save_pretrained(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    base = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (expected - base).abs().max() > 0.1  # the adapter does something
    content = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(content) == set(load_file(folder / "model.safetensors"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    # W + α/r B A, by hand.
    name = "model.layers.1.mlp.down_proj"
    state = module.lm.state_dict()
    a, b = (state[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
    torch.testing.assert_close(
        content[f"{name}.weight"], load_file(folder / "model.safetensors")[f"{name}.weight"] + 2 * b @ a
    )
    # The model in memory is still base and adapter.
    assert torch.equal(logits(module.lm), expected)


def test_a_merge_that_went_wrong_is_noticed(tmp_path, folder, monkeypatch):
    """Here nothing is merged at all."""
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, **settings: None)
    with pytest.raises(RuntimeError, match=r"the merged weight .* is not the base's plus the adapter's"):
        lm(folder, lora={"r": 4}).save_pretrained(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_of_a_quantised_base_is_merged_into_the_base_before_quantisation(
    tmp_path, folder, quantization, dtype
):
    pytest.importorskip("bitsandbytes")
    module = lm(folder, lora={"r": 4}, quantization=quantization, dtype=dtype, size=0.05)
    module.save_pretrained(tmp_path / "merged", merge=True)
    content = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert set(content) == set(original)  # no absmax, no quant_state, no SCB
    assert {v.dtype for v in content.values()} == {torch.bfloat16 if dtype else torch.float32}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert not hasattr(merged.config, "quantization_config")
    name = "model.layers.0.self_attn.q_proj"
    state = module.lm.state_dict()
    a, b = (state[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
    exact = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(content[f"{name}.weight"].float(), original[f"{name}.weight"] + 2 * b @ a, **exact)


def test_merging_in_16_bits_is_no_error_at_the_size_of_a_real_model(tmp_path):
    """Rounding to 16 bits differs between base + adapter and merged weights; more layers and tokens, more of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 30, "vocab_size": 8000}
    config = AutoConfig.for_model(**TINY_LLAMA | sizes | {"initializer_range": 0.1})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "base")
    module = lm(tmp_path / "base", lora={"r": 8}, size=0.02)
    module.save_pretrained(tmp_path / "merged", merge=True)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if ".self_attn." in name or ".mlp." in name}


# ---------------------------------------------------------------------- mistakes


def test_there_is_nothing_to_merge_without_an_adapter(tmp_path, folder):
    with pytest.raises(ValueError, match=r"save_pretrained\(merge=True\): there is no adapter to merge"):
        lm(folder).save_pretrained(tmp_path / "model", merge=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_whose_base_is_nowhere_is_not_saved(tmp_path, merge):
    module = lm(TINY_LLAMA | {"vocab_size": VOCABULARY}, lora={"r": 4})
    with pytest.raises(ValueError, match=r"base was made from a configuration and is saved nowhere"):
        module.save_pretrained(tmp_path / "model", merge=merge)
