"""LoRA adapters as GGUF files: llama.cpp applies them as peft does."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import byte_bpe, tiny

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

from lightning_cl.export.gguf import export_gguf  # noqa: E402
from lightning_cl.export.gguf_adapter import export_adapter_gguf  # noqa: E402
from lightning_cl.export.llama_cpp import LlamaCpp  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's wheel xllamacpp is not installed"
)
IDS = torch.randint(3, 430, (40,), generator=torch.Generator().manual_seed(1)).tolist()
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {"lora_alpha": 24, "target_modules": LINEAR},
    "rank-stabilised": {"use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
    # The head and the embedding too; ranks and strengths of their own, as a mean of several adapters has them.
    "patterns": {
        "target_modules": [*LINEAR, "lm_head", "embed_tokens"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "down_proj": 2},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 5, "v_proj": 1.5},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder / "hf")
    return folder / "hf", export_gguf(
        folder / "hf", folder / "base.gguf", "f32", tokenizer=byte_bpe(), pre="gpt-2", check=False
    )


def adapted(folder, **settings):
    """A saved adapter whose factors are all random, and its model."""
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8} | settings)))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def expected(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


@needs_llama_cpp
def test_llama_cpp_applies_each_as_peft_does(base, tmp_path):
    """All of them loaded at once, one chosen by each request."""
    hf, file = base
    models = {case: adapted(tmp_path / case, **settings) for case, settings in CASES.items()}
    files = [export_adapter_gguf(tmp_path / case, tmp_path / f"{case}.gguf", hf) for case in CASES]
    llama = LlamaCpp(file, context=64, adapters=files)
    for i, (case, model) in enumerate(models.items()):
        wanted = expected(model)
        scales = [float(i == j) for j in range(len(files))]
        got = llama.logprobs(IDS, scales)
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=0, msg=lambda m, case=case: f"{case}: {m}")
        with model.disable_adapter():
            plain = expected(model)
        assert (plain - wanted).abs().max() > 0.1
    torch.testing.assert_close(llama.logprobs(IDS), plain, atol=1e-4, rtol=0)


def test_its_content(base, tmp_path):
    """As llama.cpp's own converter writes it: the file's strength is alpha, the first factor is as it is."""
    model = adapted(tmp_path / "person", **CASES["plain"])
    file = export_adapter_gguf(tmp_path / "person", tmp_path / "out" / "a.gguf", base[0], type="f16")
    reader = gguf.GGUFReader(file)
    assert reader.fields["adapter.lora.alpha"].contents() == 24
    assert reader.fields["general.architecture"].contents() == "llama"
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(held) == 2 * 2 * len(LINEAR)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert torch.equal(held["blk.1.attn_q.weight.lora_a"], layer.lora_A["default"].weight.half())
    rows = layer.lora_B["default"].weight.half()
    for head in range(4):  # neighbouring pairs instead of halves
        block = held["blk.1.attn_q.weight.lora_b"][16 * head : 16 * head + 16]
        assert torch.equal(block[::2], rows[16 * head : 16 * head + 8])
        assert torch.equal(block[1::2], rows[16 * head + 8 : 16 * head + 16])
    written = file.read_bytes()
    for part in ("person", str(tmp_path), str(base[0])):
        assert part.encode() not in written


def test_adapters_that_are_more_are_refused(base, tmp_path):
    adapted(tmp_path / "plain", target_modules=["q_proj"])
    config = tmp_path / "plain" / "adapter_config.json"
    settings = json.loads(config.read_text())
    changes = {
        "use_dora=True.*merge=True": {"use_dora": True},
        "modules_to_save=.*merge=True": {"modules_to_save": ["lm_head"]},
        "bias='all'": {"bias": "all"},
        "init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
        "trainable_token_indices": {"trainable_token_indices": [1]},
        "peft_type='LOHA'": {"peft_type": "LOHA"},
    }
    for message, change in changes.items():
        config.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            export_adapter_gguf(tmp_path / "plain", tmp_path / "a.gguf", base[0])
    config.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base=None"):
        export_adapter_gguf(tmp_path / "plain", tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="has no adapter_config"):
        export_adapter_gguf(base[0], tmp_path / "a.gguf", base[0])
    with pytest.raises(ValueError, match="write it with export_adapter_gguf"):
        export_gguf(tmp_path / "plain", tmp_path / "a.gguf")
    tiny(tie_word_embeddings=True).config.save_pretrained(tmp_path / "tied")
    adapted(tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="one matrix for both"):
        export_adapter_gguf(tmp_path / "head", tmp_path / "a.gguf", tmp_path / "tied")
    with pytest.raises(ValueError, match="wrong base"):
        export_adapter_gguf(tmp_path / "head", tmp_path / "a.gguf", _other(tmp_path))


def _other(folder):
    tiny(hidden_size=32).config.save_pretrained(folder / "other")
    return folder / "other"
