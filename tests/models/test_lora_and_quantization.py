"""LoRA adapters and quantised bases: what is trained, what it starts from, and what stays as it was."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from toys import TINY_LLAMA, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import CausalLM, fit_tasks
from lightning_cl.models import loading
from lightning_cl.models.visibility import check_isolation

VOCABULARY = 97
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model of 16-bit weights whose logits differ from token to token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    path = tmp_path_factory.mktemp("model")
    model.bfloat16().save_pretrained(path)
    return path


def lm(folder, lr=0.01, **settings):
    torch.manual_seed(0)
    settings = {"lora": {"r": 4}} | settings
    module = CausalLM(folder, lambda p: torch.optim.AdamW(p, lr=lr), schedule=None, **settings)
    module.configure_model()
    return module


def texts(seed=0, count=8):
    ids = torch.randint(VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def loader(seed=0, count=8):
    return torch.utils.data.DataLoader(texts(seed, count), 4)


def adapter_names(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------- the adapter


def test_only_the_adapter_is_trainable_on_all_linear_layers_but_the_head(folder):
    module = lm(folder)
    trainable = adapter_names(module)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    places = {name.split(".lora_")[0] for name in trainable}
    assert {place.rsplit(".", 1)[1] for place in places} == LINEAR
    assert len(places) == len(LINEAR) * TINY_LLAMA["num_hidden_layers"]
    # r rows in, r columns out, for each of them.
    linears = [m for m in AutoModelForCausalLM.from_pretrained(folder).model.modules() if type(m) is torch.nn.Linear]
    size = sum(4 * (m.in_features + m.out_features) for m in linears)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == size


@pytest.mark.parametrize(
    ("settings", "alpha", "rank"),
    [({"r": 4}, 8, 4), ({}, 16, 8), ({"r": 4, "lora_alpha": 1}, 1, 4), ({"lora_alpha": 3}, 3, 8)],
)
def test_alpha_is_twice_the_rank_unless_given(folder, settings, alpha, rank):
    (config,) = lm(folder, lora=settings).lm.peft_config.values()
    assert (config.lora_alpha, config.r) == (alpha, rank)
    layer = lm(folder, lora=settings).lm.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": alpha / rank}


def test_targets_that_are_named_are_the_only_ones(folder):
    module = lm(folder, lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapter_names(module)} == {"q_proj", "v_proj"}


def test_the_settings_that_were_given_are_left_alone(folder):
    settings = {"r": 4}
    lm(folder, lora=settings)
    assert settings == {"r": 4}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_a_fresh_adapter_changes_no_logit(folder, dtype):
    module, ids = lm(folder, dtype=dtype), torch.arange(10)[None]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    assert base.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert torch.equal(module.lm.eval()(ids).logits, base(ids).logits)


def test_the_adapter_is_kept_in_32_bits_on_a_base_of_16(folder):
    module = lm(folder)
    types = {name: p.dtype for name, p in module.named_parameters()}
    assert {types[name] for name in adapter_names(module)} == {torch.float32}
    assert {types[name] for name in types.keys() - adapter_names(module)} == {torch.bfloat16}


def test_full_tuning_is_in_32_bits_whatever_is_stored(folder):
    module = lm(folder, lora=None)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in module.parameters())


def test_the_base_is_the_same_bit_for_bit_after_training(tmp_path, folder):
    module = lm(folder)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit_tasks(trainer(tmp_path, max_epochs=2), module, {"a": loader(0), "b": loader(1)})
    after = module.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == adapter_names(module)


def test_two_modules_of_one_seed_have_one_adapter_and_the_next_random_number_is_the_same(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = CausalLM(folder, lora={"r": 4})
    one.configure_model()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    other = CausalLM(folder, lora={"r": 4})
    other.configure_model()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ---------------------------------------------------------------------- quantised bases


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_quantised_base_is_trained_around_and_the_loss_falls(tmp_path, folder, quantization, layer):
    pytest.importorskip("bitsandbytes")
    module = lm(folder, quantization=quantization)
    kinds = [type(m).__name__ for m in module.modules() if type(m).__module__.startswith("bitsandbytes.nn")]
    assert kinds == [layer] * len(LINEAR) * TINY_LLAMA["num_hidden_layers"]  # the head is not
    assert {p.dtype for n, p in module.named_parameters() if n in adapter_names(module)} == {torch.float32}
    before = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    run = trainer(tmp_path, max_epochs=12)
    data, losses = loader(), []
    for _ in range(2):
        losses.append(run.validate(module, data, verbose=False)[0]["val_loss"])
        if len(losses) == 1:
            fit_tasks(run, module, {"a": data})
    assert losses[1] < 0.7 * losses[0]
    changed = {name for name, value in module.state_dict().items() if name in before and not value.equal(before[name])}
    assert changed == adapter_names(module)


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 0.35), ("int8", 0.05)])
def test_a_quantised_base_computes_about_what_the_base_does(folder, quantization, tolerance):
    """And not the same: else it would not be quantised."""
    pytest.importorskip("bitsandbytes")
    ids = torch.arange(20)[None] * 3
    exact = lm(folder).lm.eval()(ids).logits.float()
    made = lm(folder, quantization=quantization).lm.eval()(ids).logits.float()
    error = float((made - exact).square().mean().sqrt() / exact.std())
    assert 0 < error < tolerance


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_a_quantised_model_computes_does_not_depend_on_earlier_evaluations(folder, quantization):
    """Kernels that lay weights out anew when they are first evaluated round them once more."""
    pytest.importorskip("bitsandbytes")
    row = texts()[0]
    batch = {key: value[None] for key, value in row.items()}

    def evaluated(module, training):
        with torch.set_grad_enabled(training):
            return module.lm.train(training)(**batch).loss.detach()

    # Training and evaluation may go different ways (int8 does); each must not depend on the other.
    module, other = lm(folder, quantization=quantization), lm(folder, quantization=quantization)
    training, evaluation = evaluated(module, True), evaluated(other, False)
    assert torch.equal(evaluated(module, False), evaluation)
    assert torch.equal(evaluated(other, True), training)
    assert torch.equal(evaluated(module, True), training)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_packed_documents_are_isolated_in_a_quantised_model(folder, quantization):
    """Rounding that depends on what else is in the batch is no leak."""
    pytest.importorskip("bitsandbytes")
    check_isolation(lm(folder, quantization=quantization).lm)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loss_and_gradients_of_a_quantised_model_are_the_models_own(folder, quantization):
    pytest.importorskip("bitsandbytes")
    module, (row, *_) = lm(folder, quantization=quantization), texts()
    module.log_dict = module.log = lambda *args, **settings: None
    batch = {key: value[None] for key, value in row.items()}
    results = []
    for loss in (module.training_step(dict(batch), 0), module.lm(**batch).loss):
        module.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)])
    for made, expected in zip(*results, strict=True):
        torch.testing.assert_close(made, expected.float(), rtol=0.02, atol=1e-3)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lora": {"rank": 8}}, ValueError, r"lora: peft's LoraConfig has no 'rank'; did you mean '.*'\?"),
        ({"lora": {"lora_alfa": 8}}, ValueError, r"no 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"lora": {"r": 0}}, ValueError, r"lora: r=0: expected a rank of at least 1"),
        ({"lora": {"r": 2.5}}, ValueError, r"lora: r=2\.5: expected a rank"),
        ({"lora": {"r": True}}, ValueError, r"lora: r=True"),
        ({"lora": {"r": "8"}}, ValueError, r"lora: r='8'"),
        ({"lora": None, "quantization": "nf4"}, ValueError, r"quantization='nf4'.*cannot be trained.*lora=\{'r': 8\}"),
        ({"quantization": "nf5"}, ValueError, r"quantization='nf5': expected one of \['nf4', 'int8'\], or None"),
        ({"dtype": "fp8"}, ValueError, r"dtype='fp8': expected one of \['float32', 'bfloat16', 'float16'\], or None"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens=0"),
        ({"lora": 8}, (TypeError, ValueError), r"lora=8"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_anything_is_loaded(settings, error, message):
    with pytest.raises(error, match=message):
        CausalLM("no/such/model", **{"lora": {"r": 8}} | settings)


def test_a_configuration_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"quantization='int8'.*pretrained `model`"):
        CausalLM(TINY_LLAMA, lora={"r": 2}, quantization="int8")


def test_targets_that_the_model_does_not_have(folder):
    with pytest.raises(ValueError, match=r"lora=\{'target_modules': \['nowhere'\]\}: Target modules.*nowhere"):
        lm(folder, lora={"target_modules": ["nowhere"]})


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"model='.*nothing': no model folder of that name and none on the hub"):
        lm(tmp_path / "nothing")


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))


def test_without_bitsandbytes_the_message_says_what_to_install(folder, monkeypatch):
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(ValueError, match=r"^quantization='nf4': bitsandbytes is not installed: pip install"):
        loading.load_pretrained(str(folder), quantization="nf4")


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    without(monkeypatch, "peft")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises((ValueError, ImportError), match=r"lora.*pip install"):
        CausalLM("some/model", lora={"r": 8})


def test_a_setting_that_the_model_refuses_is_not_taken_for_a_missing_folder(folder):
    with pytest.raises(ValueError, match="nonsense") as caught:
        loading.load_pretrained(str(folder), settings={"attn_implementation": "nonsense"})
    assert "no model folder of that name" not in str(caught.value)


def test_without_gguf_the_message_says_what_to_install(tmp_path, monkeypatch):
    without(monkeypatch, "gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"reading a GGUF file needs the package gguf: pip install gguf"):
        loading.load_pretrained(str(tmp_path / "model.gguf"))


def test_a_gguf_file_is_not_quantised_while_it_is_loaded(tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"cannot be quantised while it is loaded; save it as a Hugging Face folder"):
        loading.load_pretrained(str(tmp_path / "model.gguf"), quantization="int8")


def test_extras_that_messages_name_are_there():
    """What a message says to install must exist."""
    import configparser
    import re
    from pathlib import Path

    root = Path(__file__).parents[2]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    named = {
        extra
        for file in (root / "lightning_cl").rglob("*.py")
        for extra in re.findall(r"lightning_cl\[(\w+)\]'", file.read_text(encoding="utf-8"))
    }
    assert named >= {"4bit", "demo"}
    assert named <= {option.lower() for option in setup["options.extras_require"]}
