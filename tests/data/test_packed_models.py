"""Packed batches: their fields by hand, and real models that see each document as if it were alone."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.data.text.collator import TokenCollator


def sample(ids, mask=None):
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int32),
        "loss_mask": torch.tensor(mask if mask is not None else [1] * len(ids), dtype=torch.bool),
    }


def test_packed_batch_by_hand():
    batch = TokenCollator(9)([[sample([1, 2, 3], [1, 0, 1]), sample([4, 5])], [sample([6, 7, 8])]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, 5], [-100, 7, 8, -100, -100]]
    assert batch["use_cache"] is False
    assert set(batch) == {"input_ids", "position_ids", "labels", "use_cache"}
    assert {value.dtype for value in batch.values() if isinstance(value, torch.Tensor)} == {torch.int64}


def test_a_single_sample_gives_the_unpacked_form():
    assert set(TokenCollator(0)([sample([1, 2])])) == {"input_ids", "attention_mask", "labels"}


KINDS = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8},
}
SHARED = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # small weights hardly attend to anything
}
generator = torch.Generator().manual_seed(0)
BLOCKS = [
    [
        sample(torch.randint(3, 50, (n,), generator=generator).tolist(), [0] * prompt + [1] * (n - prompt))
        for n, prompt in block
    ]
    for block in ([(12, 4), (7, 0), (9, 5)], [(20, 2)], [(3, 1), (14, 6)])
]


def model_of(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHARED, **KINDS[kind])).double()


def loss_and_gradient(model, batches):
    """Loss over all loss-bearing tokens, and its gradient, from batches one by one."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    model.zero_grad()
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_blocks_are_as_if_alone(kind):
    model, collate = model_of(kind), TokenCollator(0)
    alone, gradient = loss_and_gradient(model, [collate([document]) for block in BLOCKS for document in block])
    packed = collate(BLOCKS)
    loss, packed_gradient = loss_and_gradient(model, [packed])
    assert loss == pytest.approx(alone, rel=1e-5)
    assert float((packed_gradient - gradient).norm() / gradient.norm()) < 1e-5
    # What the collator guards against: with a cache, or a mask of ones, documents see those before them.
    cached = {key: value for key, value in packed.items() if key != "use_cache"}
    masked = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    for leaky in (cached, masked):
        loss, leaky_gradient = loss_and_gradient(model, [leaky])
        assert abs(loss / alone - 1) > 1e-4
        assert float((leaky_gradient - gradient).norm() / gradient.norm()) > 1e-2
