"""Adapters on embeddings, and single trainable tokens: measured exactly, and trained beside every method."""

from __future__ import annotations

import pytest
import torch
from regularized import assert_each
from toys import TINY_LLAMA, trainer

from lightning_cl import EWC, KFACEWC, MAS, CausalLM, DERpp, KLToBase, LwF, TaskDataModule, TrainedBPE, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
ADAPTERS = {
    "LoRA": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "LoRA alone": {"r": 2, "target_modules": ["embed_tokens"]},
    "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": list(range(50, 120))},
}


def run(root, lora, *methods, tie=True, tasks=1, **settings):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = TINY_LLAMA | {"initializer_range": 0.2, "tie_word_embeddings": tie}
    module = CausalLM(config, lambda p: torch.optim.SGD(p, lr=0.5), schedule=None, lora=lora)
    texts = {"ab"[i]: ["abc" * (n % 4 + 2) for n in range(i, 7 + i)] for i in range(tasks)}
    data = TaskDataModule(texts, TrainedBPE(257, str(root)), max_length=32, batch_size=4, val_fraction=0.2, seed=0)
    fit_tasks(trainer(root, methods, max_steps=4), module, data)
    return module, data


def by_hand(module, data, term):
    """``Σ_b term(∂ Σ_t −log p)`` of one sequence after the other, per position that bears loss."""
    module.eval()
    loader = data.train_loader(data.tasks[0])
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total, positions = {n: torch.zeros_like(p) for n, p in parameters.items()}, 0
    for index in range(len(loader.dataset)):
        batch = loader.collate_fn([loader.dataset[index]])
        logits, labels = module.lm(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        positions += int((labels != -100).sum())
        for n, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[n] += term(g)
    return {n: value / positions for n, value in total.items()}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_fisher_is_that_of_single_sequences(tmp_path, adapter, tie):
    method = EWC(1.0, estimator="empirical", normalize=False)
    module, data = run(tmp_path, ADAPTERS[adapter], method, tie=tie)
    expected = by_hand(module, data, torch.square)
    assert any("embed_tokens" in n and bool(value.any()) for n, value in expected.items())
    assert_each(method.importance, expected, 1e-3)


@pytest.mark.parametrize("adapter", ["LoRA", "tokens"])
def test_other_methods_train_two_tasks_with_them(tmp_path, adapter):
    methods = [KFACEWC(0.1), MAS(0.1), LwF(), KLToBase(), DERpp(5, storage="memory")]
    module, _ = run(tmp_path, ADAPTERS[adapter], *methods, tasks=2)
    adapted = [n for n, p in module.named_parameters() if p.requires_grad and "embed_tokens" in n]
    assert adapted
    for method in methods[:2]:
        assert all(method.importance[n].any() for n in adapted)
    assert methods[3].kl["b"] > 0
    assert all(p.isfinite().all() for p in module.parameters())
