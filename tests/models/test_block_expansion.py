"""Inserted blocks change nothing at first, can learn, and leave a plain model, in every architecture that is known."""

from __future__ import annotations

import copy
import doctest
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl.models import expansion
from lightning_cl.models.block_copies import _OUTPUTS
from lightning_cl.models.expansion import (
    active_blocks,
    check_expandable,
    decoder_blocks,
    expand_blocks,
    inserted_blocks,
    moved_blocks,
    new_parameters,
    rebuild_blocks,
    spread_positions,
    structure_of,
)

COMMON = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 64}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = COMMON | SIZE | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
SETTINGS = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 5},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma": LLAMA,
    "gemma2": LLAMA | {"sliding_window": 5, "tie_word_embeddings": True},
    "gemma3_text": LLAMA | {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "phi": LLAMA,
    "phi3": LLAMA,
    "gpt2": COMMON | OLD,
    "gpt_neox": COMMON | SIZE,
    "opt": COMMON | SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "bloom": COMMON | {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": COMMON | SIZE | {"new_decoder_architecture": False, "alibi": False},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "granite": LLAMA | {"residual_multiplier": 0.5},
    "smollm3": LLAMA | {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "gpt_neo": COMMON
    | {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]}
    | {"window_size": 5},
    "gptj": COMMON | OLD | {"rotary_dim": 4},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA | EXPERTS | {"num_experts": 4, "mlp_only_layers": [1]},
}
IDS = torch.tensor([[5, 9, 33, 2, 60, 17, 8, 41, 25, 13], [7, 7, 12, 50, 3, 66, 21, 30, 11, 4]])


def build(kind, seed=0, **settings):
    """A tiny model of the architecture, its biases and norms shaken so that none is 0 or 1 by accident."""
    torch.manual_seed(seed)
    given = SETTINGS.get(kind, COMMON | OLD if kind == "gpt_bigcode" else LLAMA) | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def train(model, parameters, steps=1, lr=0.01):
    """Adam on these parameters alone, without dropout."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def indices(model):
    """What the attention of each block takes for its index."""
    names = ("layer_idx", "layer_id")
    return [
        {vars(module)[name] for module in block.modules() for name in names if name in vars(module)}
        for block in decoder_blocks(model)
    ]


@pytest.mark.parametrize("kind", SETTINGS)
def test_insertion_changes_no_logit_and_no_old_block(kind):
    model = build(kind)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    old = list(decoder_blocks(model))
    assert expand_blocks(model, [0, 2]) == [1, 4]
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == len(decoder_blocks(model)) == 5
    assert [block for i, block in enumerate(decoder_blocks(model)) if i not in (1, 4)] == old
    assert indices(model) == [{0}, {1}, {2}, {3}, {4}]
    untouched = {name: value for name, value in model.state_dict().items() if name not in new_parameters(model)}
    assert len(untouched) == len(state)
    assert all(torch.equal(a, b) for a, b in zip(untouched.values(), state.values(), strict=True))


@pytest.mark.parametrize("kind", [kind for kind in _OUTPUTS if kind not in SETTINGS])
def test_every_known_architecture_keeps_its_logits(kind):
    model = build(kind)
    before = logits(model)
    expand_blocks(model, [0, 2])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_trained_expansion_reloads_to_the_bit_and_generates_the_same_with_and_without_cache(kind, tmp_path):
    model = build(kind)
    before = logits(model)
    expand_blocks(model, [0, 1])
    train(model, list(new_parameters(model).values()), steps=2, lr=0.05)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert structure_of(again) == structure_of(model) == {"base_blocks": 3, "positions": [[0, 1]]}
    for each in (model, again):
        settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        cached, slow = (each.generate(IDS, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, slow)
    # Greedy choices hide small differences: the logits of a cached step, too.
    with torch.no_grad():
        past = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=IDS[:, -1:], past_key_values=past, use_cache=True).logits[:, 0]
    assert torch.allclose(step, logits(model)[:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_new_blocks_learn(kind):
    model = build(kind, **({"output_router_logits": True} if kind in ("mixtral", "qwen3_moe") else {}))
    expand_blocks(model, [0, 1])
    new = new_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in new.items()}
    zero = [name for name, value in start.items() if not value.any()]
    assert len(zero) >= 4
    train(model, list(new.values()))
    assert all(new[name].grad.any() for name in zero)
    train(model, list(new.values()))
    still = [name for name, parameter in new.items() if torch.equal(parameter, start[name])]
    assert still == []


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bloom"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    found = []
    for when in ("never", "before", "after"):
        model = build(kind, **settings).train()
        if when == "before":
            model.gradient_checkpointing_enable()
        expand_blocks(model, [0, 2])
        if when == "after":
            model.gradient_checkpointing_enable()
        assert all(block.training for block in decoder_blocks(model))
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_tied_weights_stay_tied(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    expand_blocks(model, 1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_outputs_of_all_blocks_are_recorded_also_when_recording_began_before():
    model = build("llama")
    assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 4
    expand_blocks(model, 2)
    states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(states) == 6
    assert torch.equal(states[2], states[3])  # the copy after block 1 gives back its input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_logits_and_type(dtype):
    model = build("qwen2").to(dtype)
    before = logits(model)
    expand_blocks(model, 3)
    assert torch.equal(logits(model), before)
    assert {parameter.dtype for parameter in new_parameters(model).values()} == {dtype}


def test_new_parameters_are_trainable_copies_and_old_ones_keep_their_flag():
    model = build("llama").requires_grad_(False)
    expand_blocks(model, [1])
    new = new_parameters(model)
    assert all(name.startswith("model.layers.2.") for name in new)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(new)
    original = dict(decoder_blocks(model)[1].named_parameters())
    for name, parameter in new.items():
        source = original[name.removeprefix("model.layers.2.")]
        assert parameter.data_ptr() != source.data_ptr()
        silent = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(parameter, torch.zeros_like(source) if silent else source)
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_the_examples_run():
    result = doctest.testmod(expansion)
    assert result.attempted > 0
    assert result.failed == 0


def test_insertion_takes_no_random_number():
    model = build("gpt2")
    state = torch.get_rng_state()
    expand_blocks(model, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("base", [1, 2, 5, 7, 12, 32])
def test_spread_positions_makes_groups_whose_sizes_differ_by_at_most_one(base):
    for count in range(1, base + 1):
        positions = spread_positions(base, count)
        sizes = [b - a for a, b in zip([-1, *positions], positions, strict=False)]
        assert len(positions) == count
        assert positions[-1] == base - 1
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == -(-base // count)
    assert spread_positions(32, 8) == [3, 7, 11, 15, 19, 23, 27, 31]  # the paper's 32 → 40


def test_lists_of_the_configuration_follow_their_blocks():
    model = build("gemma3_text")
    expand_blocks(model, [1, 2])
    assert model.config.layer_types == ["sliding_attention"] * 3 + ["full_attention"] * 2
    model = build("smollm3")
    expand_blocks(model, [1])
    assert model.config.no_rope_layers == [1, 0, 0, 1]
    model = build("qwen3_moe")
    expand_blocks(model, [0, 1])
    assert model.config.mlp_only_layers == [2, 3]
    model = build("gpt_neo")
    expand_blocks(model, [1])
    assert model.config.attention_types == [[["global", "local", "local", "global"], 1]]


# Several tasks


def test_a_task_is_expanded_once():
    model = build("llama")
    assert expand_blocks(model, [0, 2], task=0) == [1, 4]
    train(model, list(new_parameters(model).values()), steps=2)
    blocks, before = list(decoder_blocks(model)), logits(model)
    assert expand_blocks(model, [2, 0], task=0) == [1, 4]
    assert list(decoder_blocks(model)) == blocks
    assert expand_blocks(model, [0], task=1) == [2]
    assert inserted_blocks(model, 0) == [1, 5]
    assert inserted_blocks(model) == [1, 2, 5]
    assert torch.equal(logits(model), before)
    assert indices(model) == [{0}, {1}, {2}, {3}, {4}, {5}]
    # The copy for task 1 is one of the base block, not of what task 0 has learnt.
    assert torch.equal(decoder_blocks(model)[2].mlp.up_proj.weight, decoder_blocks(model)[0].mlp.up_proj.weight)
    assert set(new_parameters(model)) == set(new_parameters(model, 0)) | set(new_parameters(model, 1))
    assert not set(new_parameters(model, 0)) & set(new_parameters(model, 1))


def test_a_fresh_model_takes_the_structure_from_plain_data_and_then_the_weights():
    model = build("gemma2")
    expand_blocks(model, [0, 2], task=0)
    expand_blocks(model, 1, task=1)
    train(model, list(new_parameters(model).values()), steps=2)
    data = json.loads(json.dumps(structure_of(model)))
    for expanded in (False, True):
        fresh = build("gemma2", seed=1)
        if expanded:
            expand_blocks(fresh, [0, 2])
        for _ in range(2):
            rebuild_blocks(fresh, data)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(fresh), logits(model))
        assert list(new_parameters(fresh, 1)) == list(new_parameters(model, 1))
        assert fresh.config.to_dict() == model.config.to_dict()


def test_names_move_as_said():
    model = build("llama")
    names = {index: list(decoder_blocks(model)[index].parameters()) for index in range(3)}
    base = structure_of(model)
    assert base is None
    expand_blocks(model, [0, 2], task=0)
    first = structure_of(model)
    expand_blocks(model, [0], task=1)
    moved = moved_blocks(base, structure_of(model))
    assert moved == {0: 0, 1: 3, 2: 4}
    for index, parameters in names.items():
        there = list(decoder_blocks(model)[moved[index]].parameters())
        assert all(a is b for a, b in zip(parameters, there, strict=True))
    assert moved_blocks(first, structure_of(model)) == {0: 0, 1: 1, 2: 3, 3: 4, 4: 5}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neo", "smollm3"])
def test_the_blocks_of_other_tasks_can_leave_the_path(kind, tmp_path):
    model = build(kind)
    base = logits(model)
    expand_blocks(model, [0, 2], task=0)
    train(model, list(new_parameters(model, 0).values()), steps=2, lr=0.05)
    first = logits(model)
    expand_blocks(model, [1, 2], task=1)
    train(model, list(new_parameters(model, 1).values()), steps=2, lr=0.05)
    both, config = logits(model), model.config.to_dict()
    with active_blocks(model, []):
        assert torch.equal(logits(model), base)
        assert structure_of(model) is None
    with active_blocks(model, [0]):
        assert torch.equal(logits(model), first)
        assert indices(model) == [{0}, {1}, {2}, {3}, {4}]
        model.save_pretrained(tmp_path)
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), first)
    assert torch.equal(logits(model), both)
    named_when_saved = {"dtype", "architectures"}
    assert {k: v for k, v in model.config.to_dict().items() if k not in named_when_saved} == {
        k: v for k, v in config.items() if k not in named_when_saved
    }
    assert indices(model) == [{0}, {1}, {2}, {3}, {4}, {5}, {6}]
    with (
        pytest.raises(ValueError, match=r"tasks=\[2\]: the model has the blocks of 2 tasks"),
        active_blocks(model, [2]),
    ):
        pass


def test_a_task_alone_is_exact_after_later_tasks():
    """The gated reading: each task trains its own blocks alone in the path."""
    model, ends = build("llama"), []
    for task in range(3):
        expand_blocks(model, 2, task=task)
        with active_blocks(model, [task]):
            train(model, list(new_parameters(model).values()), steps=2, lr=0.05)
            ends.append(logits(model))
    for task, end in enumerate(ends):
        with active_blocks(model, [task]):
            assert torch.equal(logits(model), end)


# Bases of other kinds


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_copies_of_a_4_bit_base_have_16_bits(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    build(kind, hidden_size=64, word_embed_proj_dim=64).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.bfloat16
    ).eval()
    for module in model.modules():  # no new layout of the weights at the first evaluation
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    before = logits(model)
    expand_blocks(model, [0, 2])
    assert torch.equal(logits(model), before)
    assert {parameter.dtype for parameter in new_parameters(model).values()} == {torch.bfloat16}
    new = list(new_parameters(model).values())
    train(model, new)
    assert all(parameter.grad is not None for parameter in new)
    model.save_pretrained(tmp_path / "expanded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded").eval()
    assert {parameter.dtype for parameter in new_parameters(again).values()} == {torch.bfloat16}
    assert all(
        torch.equal(a, b) for a, b in zip(new_parameters(again).values(), new_parameters(model).values(), strict=True)
    )


def test_adapters_come_after_the_blocks():
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"'llama' \(LlamaForCausalLM\) has adapters.*insert the blocks first"):
        expand_blocks(adapted, 1)
    expand_blocks(model, 1)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert len(decoder_blocks(adapted)) == 4
    names = new_parameters(adapted)
    assert any("lora_A" in name for name in names)
    assert all("layers.3." in name for name in names)
    assert set(names) <= {name for name, _ in adapted.named_parameters()}


# Refusals: the model is as it was afterwards


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "changes its input by up to .* a norm stands in the residual path"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "changes its input by up to"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'attn.scaling' of a block depends on its index"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, "depends on its index|cannot be built"),
    ],
)
def test_what_would_not_stay_the_same_is_refused(kind, settings, words):
    model = build(kind, **settings)
    before, blocks, config = logits(model), list(decoder_blocks(model)), model.config.to_dict()
    with pytest.raises(ValueError, match=rf"'{kind}' \({type(model).__name__}\)") as error:
        expand_blocks(model, [0, 2])
    error.match(words)
    assert list(decoder_blocks(model)) == blocks
    assert model.config.to_dict() == config
    assert structure_of(model) is None
    assert indices(model) == [{0}, {1}, {2}]
    assert torch.equal(logits(model), before)


def test_an_unknown_architecture_is_named_and_can_be_told(monkeypatch):
    model = build("llama")
    monkeypatch.delitem(_OUTPUTS, "llama")
    with pytest.raises(ValueError, match=r"blocks of 'llama' \(LlamaForCausalLM\) are not known.*outputs=.*o_proj"):
        check_expandable(model)
    before = logits(model)
    with pytest.raises(ValueError, match="changes its input"):
        expand_blocks(model, 2, outputs=["mlp.down_proj"])
    with pytest.raises(ValueError, match="reads the zeros of another"):
        expand_blocks(model, 2, outputs=["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
    with pytest.raises(ValueError, match=r"no layer or parameter 'mlp\.out'.*\['input_layernorm', 'mlp'"):
        expand_blocks(model, 2, outputs=["mlp.out"])
    with pytest.raises(ValueError, match="outputs='mlp': expected a list"):
        expand_blocks(model, 2, outputs="mlp")
    expand_blocks(model, 2, outputs=["self_attn.o_proj", "mlp.down_proj"])
    assert torch.equal(logits(model), before)


def test_models_without_a_list_of_blocks_are_named():
    with pytest.raises(ValueError, match="Linear has no configuration; expected a causal model of transformers"):
        decoder_blocks(torch.nn.Linear(2, 2))
    model = build("llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"'llama' \(LlamaForCausalLM\) has no list of 2 decoder blocks"):
        decoder_blocks(model)


@pytest.mark.parametrize("blocks", [0, 4, True, -1, 1.5, [], [3], [-1], [0, 0], [True], "12", None])
def test_blocks_out_of_range_are_named(blocks):
    with pytest.raises(ValueError, match="blocks="):
        expand_blocks(build("llama"), blocks)


def test_tasks_out_of_order_are_named():
    model = build("llama")
    with pytest.raises(ValueError, match="task=1: the model has the blocks of 0 tasks; expected a number from 0 to 0"):
        expand_blocks(model, 1, task=1)
    expand_blocks(model, [0])
    with pytest.raises(ValueError, match=r"blocks=\[1\]: task 0 has its blocks after the base blocks \[0\] already"):
        expand_blocks(model, [1], task=0)
    with pytest.raises(ValueError, match="same base"):
        rebuild_blocks(model, {"base_blocks": 3, "positions": [[1]]})
    with pytest.raises(ValueError, match="same base"):
        rebuild_blocks(build("llama"), {"base_blocks": 4, "positions": [[1]]})
    for wrong in ({}, {"base_blocks": 3, "positions": [[7]]}, {"base_blocks": "3", "positions": []}, None):
        with pytest.raises(ValueError, match="structure="):
            rebuild_blocks(model, wrong)
    model.config.block_expansion = {"base_blocks": 3, "positions": [[0, 1]]}
    with pytest.raises(ValueError, match=r"has 4 blocks; expected 5: delete the setting"):
        structure_of(model)
