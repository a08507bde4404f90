"""Rows of one batch under different adapters are, to the last bit, what each adapter gives by itself."""

from __future__ import annotations

import pytest
import torch
from adapting import IDS, base_model, logits, move, peft_model
from peft import LoraConfig, get_peft_model

from lightning_cl.models.adapter_rows import adapters_per_row
from lightning_cl.models.adapters import allocate_adapter, train_adapter, use_adapter, using_adapter
from lightning_cl.passes.generation import continue_tokens
from lightning_cl.passes.heads import SplitHead

ROWS = ["a", None, "b"]


def with_tasks(model, tasks=("a", "b")):
    for task in tasks:
        allocate_adapter(model, task)
    move(model, tasks)
    return model.eval()


def one_by_one(model, function):
    """Row i of the whole batch under the adapter of row i."""
    found = []
    for i, task in enumerate(ROWS):
        with using_adapter(model, task):
            found.append(function(i))
    assert not torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[2]))
    return found


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"use_rslora": True, "lora_dropout": 0.3}),
        (torch.float32, {"target_modules": ["q_proj", "embed_tokens"]}),
        (torch.float32, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_logits(dtype, lora):
    untied = {"tie_word_embeddings": False}
    model = with_tasks(peft_model(dtype=dtype, sizes=untied, **lora))
    expected = one_by_one(model, lambda i: logits(model)[i])
    alone = one_by_one(model, lambda i: logits(model, IDS[i : i + 1])[0])
    with adapters_per_row(model, ROWS):
        found = logits(model)
    for i in range(3):
        assert torch.equal(found[i], expected[i])
        torch.testing.assert_close(found[i], alone[i], rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantised_base(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    from lightning_cl import CausalLM

    base_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    module = CausalLM(tmp_path, lora={"r": 4}, quantization=quantization)
    module.configure_model()
    with_tasks(module)
    expected = one_by_one(module, lambda i: logits(module.lm)[i])
    with adapters_per_row(module, ROWS):
        found = logits(module.lm)
    for i in range(3):
        if quantization == "nf4":
            assert torch.equal(found[i], expected[i])
        else:  # columns with an outlier in any row are multiplied in 16 bits for all rows
            torch.testing.assert_close(found[i], expected[i], rtol=0.1, atol=0.1)
            assert (found[i] - expected[(i + 2) % 3]).abs().max() > 0.5


def test_through_the_decoder_alone():
    model = with_tasks(peft_model())
    head = SplitHead(model)
    expected = one_by_one(model, lambda i: logits(model)[i])
    with adapters_per_row(model, ROWS), torch.no_grad():
        found = head.logits(head.hidden_states({"input_ids": IDS}))
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_left_padding_and_cache(dtype):
    model = with_tasks(peft_model(dtype=dtype)).train()
    prompts = [[5, 9], [7, 3, 8, 100, 42], [5, 9, 11]]
    expected = one_by_one(model, lambda i: continue_tokens(model, prompts, 12, 0)[i])
    with adapters_per_row(model, ROWS):
        assert continue_tokens(model, prompts, 12, 0) == expected
    assert model.training


def test_beams_have_the_task_of_their_row():
    model = with_tasks(peft_model())
    arguments = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:, :4]

    def search(i):
        return model.generate(input_ids=ids, **arguments)[i].tolist()

    expected = one_by_one(model, search)
    with adapters_per_row(model, ROWS):
        assert model.generate(input_ids=ids, **arguments).tolist() == expected


def test_afterwards_everything_is_as_before():
    model = with_tasks(peft_model())
    train_adapter(model, "b", "B")
    use_adapter(model, None)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    with adapters_per_row(model, ["a", "a", "a"]):
        inside = logits(model)
    with pytest.raises(KeyError), adapters_per_row(model, ROWS):
        raise KeyError
    assert torch.equal(logits(model), logits(base_model()))
    assert not torch.equal(inside, logits(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    use_adapter(model, "a")
    assert torch.equal(logits(model), inside)


def test_a_model_that_is_no_transformer():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    model = with_tasks(get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"])))
    x = torch.randn(3, 4)
    expected = one_by_one(model, lambda i: model(x)[i])
    with adapters_per_row(model, ROWS):
        assert torch.equal(model(x), torch.stack(expected))
        with pytest.raises(ValueError, match=r"3 were given, but the input of .* has the shape \[6, 4\]"):
            model(x.repeat(2, 1))


# ---------------------------------------------------------------------- mistakes


def test_other_numbers_of_rows_are_refused():
    model = with_tasks(peft_model())
    with adapters_per_row(model, ["a", "b"]), pytest.raises(ValueError, match=r"tasks: 2 were given.*\[3, 9, 32\]"):
        logits(model)
    flat = with_tasks(peft_model(target_modules=["lm_head"], sizes={"tie_word_embeddings": False}))
    hidden = torch.randn(6, 32)  # chosen positions of all rows, as a loss needs them
    with adapters_per_row(flat, ROWS), pytest.raises(ValueError, match=r"lm_head has the shape \[6, 32\]"):
        flat.get_base_model().lm_head(hidden)


def test_training_mode_is_refused():
    model = with_tasks(peft_model()).train()
    with adapters_per_row(model, ROWS), pytest.raises(ValueError, match="is in training mode"):
        model(input_ids=IDS)


def test_adapters_that_need_the_whole_batch_are_refused():
    dora = with_tasks(peft_model(use_dora=True))
    with pytest.raises(ValueError, match="adapter of 'a' is a DoRA one"), adapters_per_row(dora, ROWS):
        pass
    merged = with_tasks(peft_model())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into"), adapters_per_row(merged, ROWS):
        pass


@pytest.mark.parametrize(("tasks", "message"), [(["a", "x", "b"], "task='x': it has no adapter"), ([], "it is empty")])
def test_unknown_tasks_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message), adapters_per_row(with_tasks(peft_model()), tasks):
        pass
