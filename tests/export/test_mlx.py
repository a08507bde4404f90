"""Folders for mlx-lm: MLX computes what torch computes; its training loop replays at the share that was asked for."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import byte_bpe, tiny
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.export import mlx as export
from lightning_cl.export import mlx_adapter
from lightning_cl.export.memory import read_memory, save_buffer
from lightning_cl.export.mlx import export_mlx, import_mlx_lm, load_mlx, mlx_config, mlx_losses
from lightning_cl.export.mlx_adapter import export_adapter_mlx

LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
IDS = torch.randint(3, 430, (40,), generator=torch.Generator().manual_seed(1)).tolist()
ROPES = {
    "base": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
    "llama 3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 32},
}
MODELS = {
    **{f"llama, {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": ROPES["linear"]}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "smollm3": ("smollm3", {}),
}


@pytest.fixture
def mx():
    return pytest.importorskip("mlx.core", reason="the extra [mlx] is not installed")


def saved(folder, kind="llama", **settings):
    model = tiny(kind, **(SMALL | settings))
    model.save_pretrained(folder)
    return model


def logprobs(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def close(got, wanted):
    """To rounding: a few units in the last place of the largest number."""
    off = float((torch.tensor(np.array(got)) - wanted).abs().max())
    assert off < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("case", MODELS)
def test_mlx_computes_what_torch_computes(mx, tmp_path, case):
    kind, settings = MODELS[case]
    model = saved(tmp_path / "hf", kind, **settings)
    out = export_mlx(tmp_path / "hf", tmp_path / "mlx")
    loaded, _ = import_mlx_lm().load_model(out)  # as anybody does it
    got = loaded(mx.array([IDS]))[0]
    close((got - mx.logsumexp(got, axis=-1, keepdims=True)), logprobs(model))
    close(logprobs(AutoModelForCausalLM.from_pretrained(out)), logprobs(model))


def test_the_folder(tmp_path):
    """What the model's folder holds and nothing else, as copies; MLX is not needed."""
    hf = tmp_path / "hf"
    tiny(**SMALL, rope_parameters=ROPES["llama 3"]).save_pretrained(hf, max_shard_size="40kB")
    byte_bpe().save_pretrained(hf)
    (hf / "adapter").mkdir()
    out = export_mlx(hf, tmp_path / "mlx")
    names = {path.name for path in hf.iterdir() if path.is_file()}
    assert {path.name for path in out.iterdir()} == names
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert all((out / name).read_bytes() == (hf / name).read_bytes() for name in names - {"config.json"})
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == "llama3"
    with pytest.raises(ValueError, match="other files already"):
        export_mlx(hf, out)
    with pytest.raises(ValueError, match="other files already"):
        export_mlx(hf, hf)
    linked = export_mlx(hf, tmp_path / "linked", link=True)
    weights = next(path.name for path in hf.glob("model-*.safetensors"))
    assert (linked / weights).samefile(hf / weights)
    assert not (out / weights).samefile(hf / weights)


def test_a_wrong_copy_gets_no_name(tmp_path, monkeypatch):
    saved(tmp_path / "hf")

    def copy(source, target):
        content = source.read_bytes()
        target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(RuntimeError, match=r"model\.safetensors.*cannot be read back"):
        export_mlx(tmp_path / "hf", tmp_path / "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantised"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window=64"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "qwen2", "head_dim": 24}, "head_dim=24"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True,
          "sliding_window": 64, "max_window_layers": 1}, "sliding_window=64"),
        ({"rope_parameters": ROPES["yarn"] | {"attention_factor": 1.5}}, "attention_factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_that_mlx_would_compute_otherwise(tmp_path, changes, message):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        mlx_config(tmp_path)


def test_other_architectures_are_compared(mx, tmp_path, monkeypatch):
    """Without the rotary embedding's base in its place, granite does not load; with another one, it is found."""
    saved(tmp_path / "hf", "granite")
    assert export_mlx(tmp_path / "hf", tmp_path / "mlx").is_dir()
    monkeypatch.setattr(export, "mlx_config", lambda folder: mlx_config(folder) | {"rope_theta": 10.0})
    with pytest.raises(RuntimeError, match="off those of transformers"):
        export_mlx(tmp_path / "hf", tmp_path / "wrong")
    saved(tmp_path / "llama")
    export_mlx(tmp_path / "llama", tmp_path / "unseen")
    with pytest.raises(RuntimeError, match="off those of transformers"):
        export_mlx(tmp_path / "llama", tmp_path / "wrong", check=True)


# ---------------------------------------------------------------------- adapters

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "plain": {"lora_alpha": 24, "target_modules": LINEAR},
    "rank-stabilised": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5},
    "one layer and the head": {"target_modules": ["q_proj", "lm_head"]},
    "first layer": {"target_modules": ["v_proj"], "layers_to_transform": [0]},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "down_proj": 6},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 5, "v_proj": 1.5},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    saved(folder, rope_parameters=ROPES["base"])
    byte_bpe().save_pretrained(folder)
    return folder


def adapted(folder, **settings):
    """A saved adapter whose factors are all random, and its model."""
    model = get_peft_model(
        tiny(**SMALL, rope_parameters=ROPES["base"]),
        LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8} | settings)),
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize("case", ADAPTERS)
def test_mlx_applies_an_adapter_as_peft_does(mx, base, tmp_path, case):
    wanted = logprobs(adapted(tmp_path / "peft", **ADAPTERS[case]))
    out = export_adapter_mlx(tmp_path / "peft", tmp_path / "mlx", base)
    model = import_mlx_lm().load_adapters(load_mlx(base), str(out))
    model.eval()
    got = model(mx.array([IDS]))[0]
    close((got - mx.logsumexp(got, axis=-1, keepdims=True)), wanted)
    assert (logprobs(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max() > 0.05


def test_an_adapters_files(base, tmp_path, monkeypatch):
    adapted(tmp_path / "peft", **ADAPTERS["plain"])
    out = export_adapter_mlx(tmp_path / "peft", tmp_path / "mlx", base)
    config = json.loads((out / "adapter_config.json").read_text())
    keys = {f"{'mlp' if 'gate' in n or 'up' in n or 'down' in n else 'self_attn'}.{n}" for n in LINEAR}
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], set(parameters["keys"])) == (4, 6.0, keys)
    theirs, ours = load_file(tmp_path / "peft" / "adapter_model.safetensors"), load_file(out / "adapters.safetensors")
    assert len(theirs) == len(ours) == 28
    for name, tensor in ours.items():
        part = name[-1].upper()
        assert torch.equal(tensor.T, theirs[f"base_model.model.{name[:-7]}.lora_{part}.weight"])
    assert export_adapter_mlx(tmp_path / "peft", out, base) == out  # replaced

    def damaged(tensors, path, metadata):
        name = min(tensors)
        save_file(tensors | {name: tensors[name] * 1.001}, path, metadata)

    monkeypatch.setattr(mlx_adapter, "save_file", damaged)
    with pytest.raises(RuntimeError, match="is not what was written"):
        export_adapter_mlx(tmp_path / "peft", tmp_path / "again", base)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA.*mlx-lm does not know; merge it"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the embedding is not adapted here"),
    ],
    ids=["DoRA", "biases", "whole layers", "embedding"],
)
def test_adapters_that_are_more(base, tmp_path, settings, message):
    adapted(tmp_path / "peft", **({"target_modules": ["q_proj"]} | settings))
    with pytest.raises(ValueError, match=message):
        export_adapter_mlx(tmp_path / "peft", tmp_path / "mlx", base)


def test_an_adapter_of_another_base(base, tmp_path):
    adapted(tmp_path / "peft", target_modules=["q_proj"])
    saved(tmp_path / "small", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"layers\.1.*the base has 1 layers; wrong base"):
        export_adapter_mlx(tmp_path / "peft", tmp_path / "mlx", tmp_path / "small")


# ---------------------------------------------------------------------- losses


def test_losses_are_those_of_torch(mx, base, tmp_path):
    model = adapted(tmp_path / "peft", **ADAPTERS["patterns"])
    sequences = [
        (IDS, [-100] * 5 + IDS[5:]),
        (IDS[:9], [token if i % 2 else -100 for i, token in enumerate(IDS[:9])]),
        (IDS[:7], [IDS[0], *[-100] * 6]),
        ([5], [5]),
    ]

    def wanted(model):
        found = []
        for ids, labels in sequences:
            targets = torch.tensor(labels[1:])
            total = F.cross_entropy(logprobs(model, ids)[:-1], targets, reduction="sum") if len(ids) > 1 else 0.0
            found += [float(total), int((targets != -100).sum())]
        return found

    def got(adapter=None):
        return [number for pair in mlx_losses(base, sequences, adapter) for number in pair]

    out = export_adapter_mlx(tmp_path / "peft", tmp_path / "mlx", base)
    assert got(out) == pytest.approx(wanted(model), rel=1e-5)
    assert got(tmp_path / "peft") == got(out)
    with model.disable_adapter():
        assert got() == pytest.approx(wanted(model), rel=1e-5)
    with pytest.raises(ValueError, match=r"sequences\[0\]: 2 ids and 1 labels"):
        mlx_losses(base, [([1, 2], [1])])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == LIMIT


def test_large_models_are_not_computed_on_the_cpu(mx, base, monkeypatch):
    assert export.is_quick(base)
    monkeypatch.setattr(export, "_SMALL", 1000)
    assert export.is_quick(base) == (mx.default_device() == mx.gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not export.is_quick(base)


def test_without_mlx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(ImportError, match=r"lightning_cl\[mlx\]"):
        mlx_losses("anywhere", [([1, 2], [1, 2])])


# ---------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def memory(base, tmp_path_factory):
    tokenizer = byte_bpe()
    buffer = ReplayBuffer(40, "fifo")
    for number in range(40):
        ids = torch.tensor(tokenizer.encode(f"stored {'words ' * (number % 7)}{number}")).int()
        buffer.add({"input_ids": ids, "loss_mask": torch.arange(len(ids)) >= number % 4}, "a")
    buffer.add({"input_ids": torch.tensor([3, 4]).int(), "loss_mask": torch.zeros(2).bool()}, "a")  # bears no loss
    return save_buffer(buffer, tmp_path_factory.mktemp("memory") / "m")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_the_share_is_exact_to_one_sample_over_any_beginning(mx, memory, tmp_path, share):
    from lightning_cl.export.mlx_loop import mixed, stored_samples

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 50)
    new = [(np.full(n, -1), np.arange(n) >= n // 3) for n in lengths]
    counts = {"new": 0, "old": 0}
    held = {tuple(s.sample["input_ids"].tolist()): s.sample["loss_mask"].tolist() for s in read_memory(memory)}
    total = old = longest = 0
    seen = []
    for ids, learnt in mixed(iter(new), stored_samples(memory, rng), share, counts):
        tokens = int(np.asarray(learnt)[1:].sum())
        if ids[0] != -1:
            assert held[tuple(ids.tolist())] == learnt.astype(bool).tolist()
            old += tokens
        else:
            seen.append(ids)
        total, longest = total + tokens, max(longest, tokens)
        assert abs(old - share * total) <= longest
    assert len(seen) == 50
    assert counts == {"new": total - old, "old": old}


def test_it_trains_and_transformers_loads_the_weights(mx, base, memory, tmp_path, capsys):
    from lightning_cl.export.mlx_loop import main

    lines = [{"text": f"new text {i}"} for i in range(6)] + [{"prompt": "one and one", "completion": " is two"}] * 2
    (tmp_path / "new.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    arguments = [str(base), str(tmp_path / "new.jsonl"), str(memory), str(tmp_path / "out")]
    main([*arguments, "--share", "0.4", "--lr", "0.01", "--epochs", "2"])
    shares = [float(line.rsplit(" ")[-1]) for line in capsys.readouterr().out.splitlines()]
    assert shares[-1] == pytest.approx(0.4, abs=0.04)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, tmp_path / "out"))
    ids = [*byte_bpe().encode("new text 3"), byte_bpe().eos_token_id]
    gain = [float(F.cross_entropy(logprobs(model, ids)[:-1], torch.tensor(ids[1:]))) for model in (before, after)]
    assert gain[1] < gain[0] - 0.5
    assert mlx_losses(tmp_path / "out", [(ids, ids)])[0][0] == pytest.approx(gain[1] * (len(ids) - 1), rel=1e-5)
    with pytest.raises(FileExistsError):
        main(arguments)


def test_its_loss_is_that_of_torch(mx, base, memory):
    from lightning_cl.export.mlx_loop import loss

    batch = [
        (np.array(IDS[:9], np.int32), np.arange(9) >= 4),
        (np.array(IDS[9:40], np.int64), (np.arange(31) % 2).astype(np.uint8)),
    ]
    model = AutoModelForCausalLM.from_pretrained(base)
    terms = []
    for ids, learnt in batch:
        losses = -logprobs(model, ids.tolist())[:-1].gather(1, torch.tensor(ids[1:]).long()[:, None])[:, 0]
        terms.append(losses[torch.tensor(learnt[1:].astype(bool))])
    assert loss(load_mlx(base), batch).item() == pytest.approx(float(torch.cat(terms).mean()), rel=1e-5)
