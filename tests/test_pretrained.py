"""Names of pretrained models: samples of a package, GGUF files and their conversion."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from toys import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_cl import CausalLM, TrainedBPE
from lightning_cl.data.text import pretrained
from lightning_cl.data.text.pretrained import convert_gguf, resolve_source
from lightning_cl.data.text.tokenizer import load_tokenizer
from lightning_cl.models.loading import load_pretrained

SAMPLE = "sample:SmolLM2-135M-Instruct"
TEXTS = ["the cat sleeps in the barn", "the dog sleeps in the house", "def cat(x): return x + 1"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def permuted(weight, heads):
    """The order of rows that GGUF keeps for rotary embeddings: pairs side by side."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, quantized=False):
    """A Llama and its byte-level tokenizer, as llama.cpp's converter writes them."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == tokenizer.eos_token else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        kind = module.rsplit(".", 1)[-1]
        value = permuted(weight.detach(), heads[kind]) if kind in heads else weight.detach()
        value = value.contiguous().numpy()
        if quantized and value.ndim == 2:
            quantization = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quants.quantize(value, quantization)
            writer.add_tensor(f"{names[module]}.weight", value, raw_dtype=quantization)
        else:
            writer.add_tensor(f"{names[module]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TrainedBPE(280, str(tmp_path_factory.mktemp("vocabulary"))).train(TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "tie_word_embeddings": False, "num_key_value_heads": 1}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    return path


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(20)[None] * 3).logits.float()


# ---------------------------------------------------------------------- GGUF


def test_a_gguf_file_is_the_model_that_was_written(file, model, tokenizer):
    made = load_pretrained(str(file), dtype="float32")
    torch.testing.assert_close(logits(made), logits(model))
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    read = load_tokenizer(str(file))
    for text in [*TEXTS, "a fox, ünknown"]:
        assert read(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.eos_token_id == tokenizer.eos_token_id


def test_quantised_weights_are_read_as_plain_ones(tmp_path, model, tokenizer):
    write_gguf(tmp_path / "q8.gguf", model, tokenizer, quantized=True)
    made = load_pretrained(str(tmp_path / "q8.gguf"), dtype="float32")
    error = float((logits(made) - logits(model)).std() / logits(model).std())
    assert 0 < error < 0.05
    assert not hasattr(made.config, "quantization_config")


def test_a_gguf_file_can_be_trained_and_saved_as_a_folder(tmp_path, file):
    module = CausalLM(file)
    module.configure_model()
    assert all(p.requires_grad for p in module.parameters())
    module.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(module.lm))


def test_settings_reach_a_gguf_model(file):
    assert load_pretrained(str(file), settings={"attn_implementation": "eager"}).config._attn_implementation == "eager"
    assert load_pretrained(str(file), dtype="bfloat16").dtype == torch.bfloat16


def adapted(file):
    module = CausalLM(file, lora={"r": 2})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return module


def test_an_adapter_is_merged_into_a_gguf_file(tmp_path, file):
    module = adapted(file)
    module.save_pretrained(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(module.lm), rtol=1e-3, atol=1e-3)


def test_an_adapter_around_a_gguf_file_is_saved_so_that_its_base_is_found(tmp_path, file):
    from peft import AutoPeftModelForCausalLM

    module = adapted(file)
    module.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(module.lm))


def test_conversion_writes_a_folder_that_transformers_loads(tmp_path, file, model, tokenizer):
    convert_gguf(file, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("the cat")["input_ids"][-2:] == tokenizer("the cat")["input_ids"][-2:]
    assert read.chat_template == TEMPLATE


def test_a_gguf_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=rf"tokenizer='.*no\.gguf': there is no such GGUF file \(looked in {tmp_path}"):
        load_tokenizer(str(tmp_path / "no.gguf"))
    with pytest.raises(ValueError, match=r"model='.*no\.gguf': there is no such GGUF file"):
        load_pretrained(str(tmp_path / "no.gguf"))


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(ValueError, match=r"broken\.gguf") as caught:
        load_pretrained(str(tmp_path / "broken.gguf"))
    assert "none on the hub" not in str(caught.value)  # the file is there


# ---------------------------------------------------------------------- samples


def test_other_names_stay_as_they_are(tmp_path):
    for name in ("HuggingFaceTB/SmolLM2-135M", "gpt2", str(tmp_path)):
        assert resolve_source(name) == name


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that holds a sample's file, importable but never to be imported; and an empty cache."""
    name, file = pretrained._PACKAGES[SAMPLE.removeprefix("sample:")]
    folder = tmp_path / "site" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / file).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    return folder / file


def converting(monkeypatch, then=lambda folder: None):
    calls = []

    def convert(file, folder):
        calls.append(file)
        (folder / "model.safetensors").write_text(file.read_text())
        then(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    return calls


def test_a_sample_is_converted_once(tmp_path, package, monkeypatch):
    calls = converting(monkeypatch)
    folder = Path(resolve_source(SAMPLE))
    assert folder.parent == tmp_path / "cache"
    assert (folder / "model.safetensors").read_text() == "weights"
    assert os.access(folder, os.R_OK)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert resolve_source(SAMPLE, "tokenizer") == str(folder)
    assert calls == [package]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    # Another file in the package, another folder.
    package.write_bytes(b"new weights")
    assert (Path(resolve_source(SAMPLE)) / "model.safetensors").read_text() == "new weights"
    assert len(calls) == 2


def test_a_conversion_that_breaks_off_leaves_nothing_behind(tmp_path, package, monkeypatch):
    def fail(folder):
        raise KeyboardInterrupt

    converting(monkeypatch, fail)
    with pytest.raises(KeyboardInterrupt):
        resolve_source(SAMPLE)
    assert list((tmp_path / "cache").iterdir()) == []
    converting(monkeypatch)
    assert (Path(resolve_source(SAMPLE)) / "config.json").exists()


def test_two_processes_that_convert_at_once_get_one_folder(tmp_path, package, monkeypatch):
    """While this one converts, the other finishes."""
    target = tmp_path / "cache" / f"{SAMPLE.removeprefix('sample:')}-{package.stat().st_size}"

    def other(folder):
        target.mkdir()
        (target / "config.json").write_text("the other's")

    converting(monkeypatch, other)
    assert resolve_source(SAMPLE) == str(target)
    assert (target / "config.json").read_text() == "the other's"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [target.name]


def test_a_sample_is_a_model_and_its_tokenizer(tmp_path, package, file, model, tokenizer):
    """The whole way, with a small file in the package."""
    shutil.copy(file, package)
    module = CausalLM(SAMPLE)
    module.configure_model()
    torch.testing.assert_close(logits(module.lm), logits(model))
    ids = load_tokenizer(SAMPLE)("the cat", add_special_tokens=False)["input_ids"]
    assert ids == tokenizer("the cat")["input_ids"]


def test_an_unknown_sample():
    with pytest.raises(ValueError, match=r"model='sample:SmolLM': no such sample; there are \['sample:SmolLM2-135M-In"):
        CausalLM("sample:SmolLM").configure_model()
    with pytest.raises(ValueError, match=r"tokenizer='sample:x': no such sample"):
        load_tokenizer("sample:x")


@pytest.mark.parametrize("there", ["no package", "no file"])
def test_a_sample_that_is_not_installed(package, monkeypatch, there):
    if there == "no package":
        find = importlib.util.find_spec
        name = package.parent.name
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *more: None if n == name else find(n, *more))
    else:
        package.unlink()
    for load, what in ((load_tokenizer, "tokenizer"), (lambda name: CausalLM(name).configure_model(), "model")):
        with pytest.raises(ValueError, match=rf"^{what}='{SAMPLE}': the package that holds it is not installed: pip"):
            load(SAMPLE)
