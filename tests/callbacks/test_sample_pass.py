"""The pass over single samples on modules that make it hard."""

from __future__ import annotations

import copy

import pytest
import torch
from regularized import TASKS, Ends, Sequences, SomebodysLM, assert_each, fit, logits_of, seeded
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import Classifier

from lightning_cl import EWC, KFACEWC, MAS

pytestmark = pytest.mark.filterwarnings("ignore")


class Reentrant(Classifier):
    """Gradient checkpointing as it was before torch 2: it works with `loss.backward()` alone."""

    def forward(self, x):
        hidden = self.net[0](x)
        return self.net[4](checkpoint(lambda h: self.net[3](h), hidden, use_reentrant=True))


METHODS = {
    "EWC": lambda: EWC(estimator="empirical", normalize=False),
    "KFACEWC": lambda: KFACEWC(estimator="empirical", normalize=False),
    "MAS": lambda: MAS(outputs=logits_of, normalize=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_reentrant_gradient_checkpointing(tmp_path, name):
    # It works with `backward()` alone, and not with `torch.autograd.grad`.
    found = []
    for kind in (Classifier, Reentrant):
        method = METHODS[name]()
        fit(tmp_path, [method], seeded(kind), {"a": TASKS["a"]}, max_epochs=1)
        found.append(method.importance)
    assert_each(found[1], found[0], 1e-3)


class Masked(SomebodysLM):
    """A masked language model: position t predicts label t."""

    def __init__(self):
        from transformers import BertConfig, BertForMaskedLM

        super().__init__(optimizer=torch.optim.SGD, lr=0.1)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = BertForMaskedLM(BertConfig(vocab_size=11, max_position_embeddings=32, **sizes, **off))


def test_the_empirical_fisher_of_labels_that_are_not_shifted(tmp_path):
    # The first label bears loss too: a mean over n tokens must not be taken for one over n − 1.
    data, method, ends = Sequences(1, [0, 1, 0, 3, 0, 0, 2, 0]), EWC(estimator="empirical", normalize=False), Ends()
    module = fit(tmp_path, [method, ends], seeded(Masked), {"a": data}, batch_size=4, max_epochs=1)
    module = copy.deepcopy(module).eval()
    module.load_state_dict(ends.weights[0], strict=False)
    theta = {n: p for n, p in module.named_parameters() if "key.bias" not in n}  # no gradient but rounding
    total, tokens = {n: torch.zeros_like(p) for n, p in theta.items()}, 0
    for index in range(len(data)):
        sample = {k: v[None] for k, v in data[index].items()}
        logits = module.model(**sample).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, sample["labels"].flatten(), reduction="sum")
        tokens += int((sample["labels"] != -100).sum())
        for sum_, gradient in zip(total.values(), torch.autograd.grad(loss, list(theta.values())), strict=True):
            sum_ += gradient.square()
    actual = {n: method.importance[n] for n in theta}
    assert_each(actual, {n: t / tokens for n, t in total.items()}, 1e-3)
