"""Architectures at their ordinary initial weights: which see later tokens, and which see other packed documents."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import trainer

from lightning_cl import CausalLM, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.models.visibility import check_causality, check_isolation

SHARED = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1, "mamba_d_head": 8}
OWN = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
    | {"use_mamba_kernels": False},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "gemma3_text": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "xlnet": {"num_key_value_heads": None, "d_inner": 64, "d_head": 8},
}
ALONE = ["jamba", "falcon_h1", "lfm2", "mamba", "mamba2", "rwkv", "recurrent_gemma", "opt", "bloom"]
APART = ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "phi3", "olmo2"]
FUTURE = ["bert", "roberta", "electra", "xlnet", "big_bird", "xlm-roberta"]
quiet = pytest.mark.filterwarnings("ignore")


def config(kind):
    own = SHARED | {"model_type": kind} | OWN.get(kind, {})
    return {name: value for name, value in own.items() if value is not None}


def model(kind, **settings):
    torch.manual_seed(0)
    module = CausalLM(config(kind) | {"pad_token_id": 0} | settings)
    module.configure_model()
    return module.lm


@quiet
@pytest.mark.parametrize("kind", FUTURE)
def test_a_model_that_sees_the_future_is_refused(kind):
    with pytest.raises(MisconfigurationException, match=r"model: \w+ sees the tokens that it is to predict"):
        check_causality(model(kind))


@quiet
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_the_same_architecture_as_a_decoder_is_causal(kind):
    check_causality(model(kind, is_decoder=True))
    with pytest.raises(MisconfigurationException, match="is_decoder=False"):
        check_causality(model(kind))


@quiet
@pytest.mark.parametrize("kind", [*ALONE, *APART])
def test_causal_models_are_not_refused(kind):
    check_causality(model(kind))


@quiet
@pytest.mark.parametrize("kind", ALONE)
def test_states_convolutions_and_unread_positions_are_leaks_between_packed_documents(kind):
    """At ordinary initial weights, where what leaks can be smaller than rounding."""
    with pytest.raises(MisconfigurationException, match="packed documents see each other"):
        check_isolation(model(kind))


@quiet
@pytest.mark.parametrize("kind", APART)
def test_documents_that_stay_apart_are_not_refused(kind):
    check_isolation(model(kind))


@quiet
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_no_reason_to_refuse(kind, dtype):
    check_causality(model(kind).to(getattr(torch, dtype)))


@quiet
@pytest.mark.parametrize(("kind", "refused"), [("bert", True), ("llama", False), ("mixtral", False)])
def test_where_there_is_no_gradient_the_logits_are_compared(kind, refused, monkeypatch):
    monkeypatch.setattr("lightning_cl.models.visibility._is_sharded", lambda model: True)
    lm = model(kind)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    if refused:
        with pytest.raises(MisconfigurationException, match="sees the tokens"):
            check_causality(lm)
    else:
        check_causality(lm)


class Never(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pytest.fail("an optimizer step has begun")


@quiet
@pytest.mark.parametrize("matrix", [True, False])
def test_fit_tasks_refuses_it_before_training(tmp_path, matrix):
    tokenizer = TrainedBPE(257, str(tmp_path / "bpe")).train(["any"])
    data = TaskDataModule({"a": {"train": ["x" * 40] * 3, "val": ["x" * 40]}}, tokenizer, max_length=64)
    callbacks = [Never(), *([TaskMatrix()] if matrix else [])]
    bert = {name: value for name, value in config("bert").items() if name != "vocab_size"}
    with pytest.raises(MisconfigurationException, match="BertLMHeadModel sees the tokens"):
        fit_tasks(trainer(tmp_path, callbacks, max_steps=1), CausalLM(bert), data)


@quiet
def test_a_hybrid_model_is_refused_with_packing_and_trained_without(tmp_path):
    tokenizer = TrainedBPE(257, str(tmp_path / "bpe")).train(["any"])
    lfm2 = {name: value for name, value in config("lfm2").items() if name != "vocab_size"}
    for packing in (True, False):
        data = TaskDataModule({"a": ["x" * 40] * 9}, tokenizer, max_length=64, packing=packing)
        if packing:
            with pytest.raises(MisconfigurationException, match="packing=True: Lfm2ForCausalLM"):
                fit_tasks(trainer(tmp_path, max_steps=1), CausalLM(lfm2), data)
        else:
            fit_tasks(trainer(tmp_path, max_steps=1), CausalLM(lfm2), data)
