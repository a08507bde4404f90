"""MAS against loops of plain autograd, one sample at a time, on a classifier and on language models."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import (
    MASKED,
    TASKS,
    Ends,
    Sequences,
    SomebodysLM,
    assert_each,
    assert_same,
    fit,
    logits_of,
    seeded,
)
from toys import TINY_LLAMA, classification, trainer

from lightning_cl import KFACEWC, MAS, CausalLM, TaskDataModule, TrainedBPE, fit_tasks


def mas(**settings):
    return MAS(**{"outputs": logits_of, "normalize": False} | settings)


def reference(module, values, dataset):
    """``1/N Σ_x |∂ ‖f(x)‖² / ∂θ|``, in float64."""
    module = copy.deepcopy(module).double().eval()
    module.load_state_dict(values, strict=False)
    theta = dict(module.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in theta.items()}
    for x, _ in dataset:
        outputs = module(x[None].double())
        gradients = torch.autograd.grad(outputs.square().sum(), list(theta.values()))
        for sum_, gradient in zip(total.values(), gradients, strict=True):
            sum_ += gradient.abs()
    return {n: t / len(dataset) for n, t in total.items()}


def test_importance_is_the_mean_over_samples_of_absolute_gradients(tmp_path):
    method, ends = mas(), Ends()
    module = fit(tmp_path, [method, ends], tasks={"a": TASKS["a"]})
    expected = reference(module, ends.weights[0], TASKS["a"])
    assert_each(method.importance, expected, 1e-5)
    assert_same(method.anchor, ends.weights[0], rtol=0, atol=0)
    # Not the absolute value of the mean, nor the gradient of the norm itself.
    theta = dict(module.double().named_parameters())
    outputs = module(TASKS["a"].tensors[0].double())
    for value in (outputs.square().sum(1).mean(), outputs.norm(dim=1).mean()):
        (gradient,) = torch.autograd.grad(value, theta["net.0.weight"], retain_graph=True)
        assert (gradient.abs() / expected["net.0.weight"]).median() < 0.8


def test_it_is_measured_in_evaluation_mode(tmp_path):
    method, ends = mas(), Ends()
    module = fit(tmp_path, [method, ends], seeded(dropout=0.5, batch_norm=True), {"a": TASKS["a"]})
    state = module.state_dict() | ends.weights[0]
    assert_each(method.importance, reference(module, state, TASKS["a"]), 1e-5)
    assert module.training


def test_importance_adds_up_over_tasks(tmp_path):
    method, ends = mas(strength=0.1), Ends()
    module = fit(tmp_path, [method, ends])
    parts = [reference(module, w, d) for w, d in zip(ends.weights, TASKS.values(), strict=True)]
    assert_each(method.importance, {n: parts[0][n] + parts[1][n] for n in parts[0]}, 1e-5)
    assert_same(method.anchor, ends.weights[1], rtol=0, atol=0)


def test_normalized_tasks_have_mean_one_each(tmp_path):
    method, ends = mas(strength=0.1, normalize=True), Ends()
    module = fit(tmp_path, [method, ends])
    total = 0
    for values, dataset in zip(ends.weights, TASKS.values(), strict=True):
        part = reference(module, values, dataset)
        total = (
            total
            + torch.cat([p.flatten() for p in part.values()]) / torch.cat([p.flatten() for p in part.values()]).mean()
        )
    actual = torch.cat([method.importance[n].flatten() for n in part]).double()
    torch.testing.assert_close(actual, total, rtol=1e-4, atol=1e-6)
    assert actual.mean().item() == pytest.approx(2.0, rel=1e-5)


def test_labels_are_not_needed(tmp_path):
    found = []
    for shift in (0, 1):
        x, y = TASKS["a"].tensors
        method = mas()
        data = torch.utils.data.TensorDataset(x, (y + shift) % 3)
        fit(tmp_path, [method], seeded(lr=0.0), {"a": data}, max_epochs=1)
        found.append(method.importance)
    assert_same(*found, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 5, 48])
def test_the_batch_size_of_the_pass_changes_nothing(tmp_path, batch_size):
    method, ends = mas(batch_size=batch_size), Ends()
    module = fit(tmp_path, [method, ends], tasks={"a": TASKS["a"]}, max_epochs=1)
    assert_each(method.importance, reference(module, ends.weights[0], TASKS["a"]), 1e-5)


def test_samples_limits_the_pass(tmp_path):
    # Two kinds of inputs that tell by their importance how many were looked at: a mean over as many as asked for.
    data, seen = classification(1), []

    def outputs(module, batch):
        seen.extend(row.tolist() for row in batch[0])
        return module(batch[0])

    method, ends = mas(samples=5, outputs=outputs), Ends()
    module = fit(tmp_path, [method, ends], tasks={"a": data}, max_epochs=1)
    rows = [row for row in data.tensors[0].tolist() if row in seen]
    assert len(rows) == 5
    chosen = [(torch.tensor(row), 0) for row in rows]
    assert_each(method.importance, reference(module, ends.weights[0], chosen), 1e-5)


def test_without_logits_it_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"(?s)outputs=|\.logits"):
        fit(tmp_path, [MAS()], tasks={"a": TASKS["a"]}, max_epochs=1)


# ---------------------------------------------------------------------- language models


def lm_reference(module, values, data, dtype=torch.float64):
    """The sequence is the sample: absolute values of the gradient of a sum over its positions, per position."""
    module = copy.deepcopy(module)
    module.load_state_dict(values, strict=False)
    model = (module.lm if hasattr(module, "lm") else module.model).to(dtype).eval()
    theta = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total, count = {n: torch.zeros_like(p) for n, p in theta.items()}, 0
    for index in range(len(data)):
        positions = data.positions(index)
        count += len(positions)
        if positions:
            logits = model(input_ids=data.ids[index][None]).logits[0, positions]
            gradients = torch.autograd.grad(logits.square().sum(), list(theta.values()))
            for sum_, gradient in zip(total.values(), gradients, strict=True):
                sum_ += gradient.abs()
    return {n: t / count for n, t in total.items()}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_lm_the_sequence_is_the_sample_and_masked_tokens_have_no_part(tmp_path, tie):
    method, ends, data = MAS(normalize=False), Ends(), Sequences(1, MASKED)
    module = fit(tmp_path, [method, ends], seeded(SomebodysLM, tie=tie), {"a": data}, batch_size=4, max_epochs=1)
    assert ("model.lm_head.weight" in method.importance) is not tie
    assert_each(method.importance, lm_reference(module, ends.weights[0], data), 1e-4)


def test_lm_causal_lm(tmp_path):
    torch.manual_seed(0)
    config = SomebodysLM().model.config.to_dict()
    module = CausalLM({k: config[k] for k in config if k in KEYS}, lambda p: torch.optim.SGD(p, lr=0.1), schedule=None)
    method, ends, data = MAS(normalize=False), Ends(), Sequences(1, MASKED)
    fit(tmp_path, [method, ends], module, {"a": data}, batch_size=4, max_epochs=1)
    assert_each(method.importance, lm_reference(module, ends.weights[0], data), 1e-4)


KEYS = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
}


def test_lm_mixture_of_experts_falls_back_to_single_samples(tmp_path):
    # Experts see rows of all samples at once: their importance must come out all the same.
    method, ends, data = MAS(normalize=False), Ends(), Sequences(1, MASKED)
    torch.manual_seed(0)
    module = SomebodysLM(kind="mixtral", tie=False, num_local_experts=4, num_hidden_layers=1)
    fit(tmp_path, [method, ends], module, {"a": data}, batch_size=4, max_epochs=1)
    assert any(".experts." in name for name in method.importance)
    assert_each(method.importance, lm_reference(module, ends.weights[0], data, torch.float32), 1e-4)


def test_lm_lora(tmp_path):
    from peft import LoraConfig, get_peft_model

    class Adapted(SomebodysLM):
        def __init__(self):
            super().__init__()
            self.model = get_peft_model(self.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))

    method, ends, data = MAS(normalize=False), Ends(), Sequences(1, MASKED)
    module = fit(tmp_path, [method, ends], seeded(Adapted), {"a": data}, batch_size=4)
    assert len(method.importance) == 8
    assert all(".lora_" in name for name in method.importance)
    expected = lm_reference(module, ends.weights[0], data)
    assert_each(method.importance, expected, 1e-4)


@pytest.mark.parametrize("method", [lambda **s: MAS(**s), lambda **s: KFACEWC(estimator="empirical", **s)])
def test_lm_packing_does_not_change_what_a_sample_is(tmp_path, method):
    lengths = torch.randint(2, 40, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for packing in (False, True):
        torch.manual_seed(0)
        module = CausalLM(TINY_LLAMA | {"initializer_range": 0.2}, lambda p: torch.optim.SGD(p, lr=0.0), schedule=None)
        measured = method(normalize=False)
        data = TaskDataModule(
            {"a": ["ab" * length for length in lengths]},
            tokenizer=TrainedBPE(257, str(tmp_path)),
            max_length=48,
            batch_size=4,
            packing=packing,
        )
        fit_tasks(trainer(tmp_path, [measured], max_epochs=1), module, data)
        factors = {n: f.diagonal() for n, f in getattr(measured, "factors", {}).items()}
        found.append(measured.importance | factors)
    assert_each(found[1], found[0], 1e-5)


def test_lm_in_bf16_the_importance_is_nearly_that_of_fp32(tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        method = MAS(normalize=False)
        module = seeded(SomebodysLM, lr=0.0)
        fit(tmp_path, [method], module, {"a": Sequences(1, MASKED)}, batch_size=4, max_epochs=1, precision=precision)
        found.append(method.importance)
    assert_each(found[1], found[0], 0.06)


@pytest.mark.parametrize("setting", [{"samples": 0}, {"batch_size": 0}, {"strength": -1.0}, {"strength": "most"}])
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MAS(**setting)
