"""KFACEWC against factors by hand, EWC's diagonal, and closed forms (`test_laplace_optima` has where training ends)."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from regularized import (
    MASKED,
    TASKS,
    AtStep,
    Ends,
    Growing,
    Sequences,
    SomebodysLM,
    assert_each,
    fit,
    logits_of,
    plain_fit,
    seeded,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from toys import Classifier, classification

from lightning_cl import EWC, KFACEWC

LINEAR = ("net.0.weight", "net.4.weight")


def kfac(**settings):
    return KFACEWC(**{"normalize": False, "estimator": "empirical", "outputs": logits_of} | settings)


def product(pair):
    """``A ⊗ G``, for a weight row after row."""
    return torch.kron(pair.outputs.double(), pair.inputs.double())


def moments(module, values, dataset, exact=False):
    """Σ a aᵀ and Σ g gᵀ of both layers over samples, by autograd to the outputs of the layers, in float64."""
    module = copy.deepcopy(module).double().eval()
    module.load_state_dict(values, strict=False)
    sums = {n: [0, 0] for n in LINEAR}
    for x, y in dataset:
        inner = x.double()
        first = module.net[0](inner)
        hidden = torch.tanh(first)
        last = module.net[4](hidden)
        log_p = last.log_softmax(-1)
        labels = [(p, c) for c, p in enumerate(log_p.exp().tolist())] if exact else [(1.0, int(y))]
        sums[LINEAR[0]][0] = sums[LINEAR[0]][0] + torch.outer(inner, inner)
        sums[LINEAR[1]][0] = sums[LINEAR[1]][0] + torch.outer(hidden, hidden)
        for weight, label in labels:
            gradients = torch.autograd.grad(-log_p[label], [first, last], retain_graph=True)
            for n, g in zip(LINEAR, gradients, strict=True):
                sums[n][1] = sums[n][1] + weight * torch.outer(g, g)
    return {n: [part.detach() / len(dataset) for part in pair] for n, pair in sums.items()}


def assert_factors(method, expected, error=1e-4):
    assert method.factors.keys() == expected.keys()
    for n, (a, g) in expected.items():
        dense, actual = torch.kron(g, a), product(method.factors[n])
        off = (actual - dense).norm() / dense.norm()
        assert off <= error, f"{n}: off by {off:.1e}"


# ---------------------------------------------------------------------- the factors


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_factors_are_the_moments_of_inputs_and_of_gradients_at_outputs(tmp_path, estimator):
    method, ends = kfac(estimator=estimator), Ends()
    module = fit(tmp_path, [method, ends], tasks={"a": TASKS["a"]})
    assert_factors(method, moments(module, ends.weights[0], TASKS["a"], estimator == "exact"))
    assert set(method.importance) == {"net.0.bias", "net.4.bias"}
    assert set(method.anchor) == {*LINEAR, "net.0.bias", "net.4.bias"}


def test_mean_of_sampled_labels_approaches_exact(tmp_path):
    data = classification(1, samples=4)
    repeated = torch.utils.data.ConcatDataset([data] * 500)
    method, ends = kfac(estimator="sample", samples=2000), Ends()
    module = fit(tmp_path, [method, ends], tasks={"a": repeated}, limit_train_batches=2, max_epochs=1)
    assert_factors(method, moments(module, ends.weights[0], data, exact=True), error=0.08)


def test_softmax_regression_at_zero_has_the_fisher_in_closed_form(tmp_path):
    # All classes are equally probable for every input: F = E[x xᵀ] ⊗ (1/C − 1/C²), the whole of it.
    class Regression(Classifier):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Linear(8, 3)
            nn.init.zeros_(self.net.weight)
            nn.init.zeros_(self.net.bias)

    method, data = kfac(estimator="exact"), classification(1)
    fit(tmp_path, [method], seeded(Regression), {"a": data}, max_epochs=1)
    x = data.tensors[0].double()
    closed = torch.eye(3, dtype=torch.float64) / 3 - 1 / 9
    assert_factors_of = product(method.factors["net.weight"])
    torch.testing.assert_close(assert_factors_of, torch.kron(closed, x.T @ x / len(x)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.importance["net.bias"].double(), closed.diagonal(), rtol=1e-5, atol=1e-7)


def test_one_sample_has_its_fisher_exactly(tmp_path):
    # One sample and one position: the Fisher is a product, and its diagonal is EWC's.
    x, y = classification(1).tensors
    methods = [kfac(strength=0.0), EWC(0.0, estimator="empirical", normalize=False)]
    fit(tmp_path, methods, tasks={"a": TensorDataset(x[:1], y[:1])}, max_epochs=1)
    for n in LINEAR:
        torch.testing.assert_close(methods[0].factors[n].diagonal(), methods[1].importance[n], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("estimator", ["empirical", "sample", "exact"])
def test_all_that_has_no_factors_has_the_diagonal_of_ewc(tmp_path, estimator):
    settings = {"strength": 0.0, "estimator": estimator, "normalize": False, "outputs": logits_of}
    structured, diagonal = KFACEWC(**settings, largest=10), EWC(**settings)
    fit(tmp_path, [structured, diagonal])
    assert not structured.factors  # 16 hidden units are more than 10
    assert_each(structured.importance, diagonal.importance, 1e-5)
    structured, diagonal = KFACEWC(**settings, largest=16), EWC(**settings)
    fit(tmp_path, [structured, diagonal])
    assert set(structured.factors) == set(LINEAR)
    for n in ("net.0.bias", "net.4.bias"):
        torch.testing.assert_close(structured.importance[n], diagonal.importance[n], rtol=1e-5, atol=1e-9)


def test_normalized_the_mean_of_the_whole_diagonal_is_one(tmp_path):
    raw, normal = kfac(strength=0.0), kfac(strength=0.0, normalize=True)
    fit(tmp_path, [raw, normal], tasks={"a": TASKS["a"]})

    def diagonal(method):
        parts = [*(f.diagonal().flatten() for f in method.factors.values()), *method.importance.values()]
        return torch.cat([p.flatten() for p in parts])

    mean = diagonal(raw).mean()
    assert diagonal(normal).mean().item() == pytest.approx(1.0, rel=1e-4)
    assert_each(normal.importance, {n: v / mean for n, v in raw.importance.items()}, 1e-4)
    for n in LINEAR:
        dense = product(raw.factors[n]) / mean
        torch.testing.assert_close(product(normal.factors[n]), dense, rtol=1e-3, atol=1e-5 * dense.abs().max().item())


def test_of_several_tasks_the_nearest_product_is_kept(tmp_path):
    method, ends = kfac(strength=0.1, decay=0.7), Ends()
    module = fit(tmp_path, [method, ends], tasks=TASKS | {"c": classification(3)})
    kept = None
    for values, dataset in zip(ends.weights, [*TASKS.values(), classification(3)], strict=True):
        new = moments(module, values, dataset)
        terms = {n: [new[n]] + ([kept[n]] if kept else []) for n in new}
        kept = {n: [0.7 * part if i == 0 else part for i, part in enumerate(nearest(t))] for n, t in terms.items()}
    assert_factors(method, kept, error=1e-3)


def nearest(terms):
    """The leading singular vectors of the sum of ``vec(A) vec(G)ᵀ``."""
    total = sum(torch.outer(a.flatten(), g.flatten()) for a, g in terms)
    u, s, v = torch.linalg.svd(total)
    a, g = terms[0]
    return u[:, 0].reshape(a.shape) * s[0], v[0].reshape(g.shape)


class Small(Classifier):
    """In evaluation mode its loss is given in another unit."""

    unit = 1.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1.0 if self.training else self.unit)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_small_fisher_is_merged_as_a_large_one_is(tmp_path, normalize):
    """At factors of 1e-18 the earlier task was dropped: squares of squares are nothing in fp32."""
    found = []
    for unit in (1.0, 1e-9):
        method, module = kfac(strength=0.0, normalize=normalize), seeded(Small)
        module.unit = unit
        fit(tmp_path, [method], module)
        scale = 1.0 if normalize else unit**2
        found.append({n: product(f) / scale for n, f in method.factors.items()})
    assert_each(found[1], found[0], 1e-4)


# ---------------------------------------------------------------------- what is applied


def moved(module, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def test_the_penalty_is_the_dense_quadratic_form(tmp_path):
    method = kfac(strength=0.6)
    module = fit(tmp_path, [method])
    assert method.penalty(module) == pytest.approx(0.0, abs=1e-6)
    moved(module)
    expected = 0.0
    for n, p in module.named_parameters():
        delta = (p.detach() - method.anchor[n]).double().flatten()
        hessian = product(method.factors[n]) if n in LINEAR else method.importance[n].double().diag()
        expected += 0.5 * 0.6 * (delta @ hessian @ delta).item()
    assert method.penalty(module) == pytest.approx(expected, rel=1e-4)


class Watched(Classifier):
    """Gradients as the optimizer gets them, and the weights it leaves."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.steps, self.ends = [], []

    def on_before_optimizer_step(self, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in self.named_parameters()})

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.ends.append({n: p.detach().clone() for n, p in self.named_parameters()})


class Before(L.Callback):
    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: (p.detach().clone(), p.grad.clone()) for n, p in pl_module.named_parameters()})


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_every_step_is_that_of_the_dense_quadratic_form(tmp_path, apply):
    method, before, module = kfac(strength=20.0, apply=apply), Before(), seeded(Watched)
    held = {}

    def hold(m):
        held.update({n: product(f) for n, f in method.factors.items()})
        held.update({n: i.double().diag() for n, i in method.importance.items()})
        held["anchor"] = {n: a.double().clone() for n, a in method.anchor.items()}

    fit(tmp_path, [before, method, AtStep(hold)], module, max_epochs=1)
    assert len(before.steps) == len(module.steps) == len(module.ends) == 12
    for old, new, end in list(zip(before.steps, module.steps, module.ends, strict=True))[6:]:
        for n, (theta, gradient) in old.items():
            anchor, hessian = held["anchor"][n].flatten(), 20.0 * held[n]
            delta = theta.double().flatten() - anchor
            if apply == "gradient":
                expected = gradient.double().flatten() + hessian @ delta
                torch.testing.assert_close(new[n].double().flatten(), expected, rtol=1e-3, atol=1e-5)
            else:
                assert torch.equal(new[n], gradient)
                system = torch.eye(len(delta), dtype=torch.float64) + 0.05 * hessian
                expected = anchor + torch.linalg.solve(system, delta - 0.05 * gradient.double().flatten())
                torch.testing.assert_close(end[n].double().flatten(), expected, rtol=1e-4, atol=1e-5)


def test_proximal_with_a_huge_strength_stays_finite_and_near_the_anchor(tmp_path):
    gaps = []
    for strength in (0.0, 10.0, 1e3, 1e12):
        method, ends = kfac(strength=strength, apply="proximal"), Ends()
        fit(tmp_path, [method, ends])
        first, last = ends.weights
        assert all(v.isfinite().all() for v in last.values())
        gaps.append(sum((last[n] - first[n]).square().sum().item() for n in first) ** 0.5)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.1 * gaps[0]


# ---------------------------------------------------------------------- which layers


def test_frozen_layers_cost_nothing(tmp_path):
    module, method = seeded(), kfac()
    module.net[0].requires_grad_(False)
    fit(tmp_path, [method], module)
    assert set(method.factors) == {"net.4.weight"}
    assert set(method.importance) == {"net.4.bias"}
    assert method.state_bytes() == 4 * (16**2 + 3**2) + 4 * 48 + 8 * 3


def test_a_grown_head_keeps_its_rows_and_new_rows_have_no_importance(tmp_path):
    module, method = seeded(Growing), kfac(strength=5.0)
    plain_fit(tmp_path, [method], module, 1)
    before, anchor = method.factors["net.4.weight"], method.anchor["net.4.weight"].clone()
    module.widen_head()
    seen = {}

    def look(m):
        seen["factors"], seen["penalty"] = method.factors["net.4.weight"], method.penalty(m)
        with torch.no_grad():
            m.net[4].weight[3:] += 7.0
        seen["new rows moved"] = method.penalty(m)
        with torch.no_grad():
            m.net[4].weight[0] += 0.1  # one row alone: a softmax does not notice what all classes do together
        seen["old rows moved"] = method.penalty(m)

    plain_fit(tmp_path, [method, AtStep(look, task=0)], module, 2)
    torch.testing.assert_close(seen["factors"].inputs, before.inputs)
    torch.testing.assert_close(seen["factors"].outputs[:3, :3], before.outputs)
    assert seen["factors"].outputs.shape == (5, 5)
    assert not seen["factors"].outputs[3:].any()
    assert not seen["factors"].outputs[:, 3:].any()
    assert seen["penalty"] == seen["new rows moved"] == 0.0
    assert seen["old rows moved"] > 0
    assert anchor.shape == (3, 16)
    assert method.factors["net.4.weight"].outputs.shape == (5, 5)
    assert method.anchor["net.4.weight"].shape == (5, 16)


def test_a_layer_used_twice_is_measured(tmp_path):
    class Twice(Classifier):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.again = nn.Linear(8, 8)

        def forward(self, x):
            return self.net(torch.tanh(self.again(torch.tanh(self.again(x)))))

    structured, diagonal = kfac(strength=0.0), EWC(0.0, estimator="empirical", normalize=False)
    fit(tmp_path, [structured, diagonal], seeded(Twice), {"a": TASKS["a"]})
    assert "again.weight" in {*structured.factors, *structured.importance}
    if "again.weight" in structured.importance:  # a diagonal must then be the exact one
        assert_each(
            {"w": structured.importance["again.weight"]}, {"w": diagonal.importance["again.weight"]}, error=1e-4
        )
    torch.testing.assert_close(
        structured.importance["again.bias"], diagonal.importance["again.bias"], rtol=1e-4, atol=1e-9
    )


# ---------------------------------------------------------------------- language models


def lm_moments(module, values, data, layers):
    """Moments over the positions that the loss depends on, scaled as the Fisher: a sum per loss token."""
    module = copy.deepcopy(module)
    module.load_state_dict(values, strict=False)
    module.double().eval()
    seen, sums = {}, {n: [0, 0, 0] for n in layers}
    for n in layers:
        layer = module.get_submodule(n.removesuffix(".weight"))

        def hook(_, args, out, n=n):
            seen[n] = (args[0].detach()[0], out)

        layer.register_forward_hook(hook)
    tokens = 0
    for index in range(len(data)):
        positions = data.positions(index)
        if not positions:
            continue
        tokens += len(positions)
        logits = module.model(input_ids=data.ids[index][None]).logits[0]
        targets = data.ids[index][[t + 1 for t in positions]]
        loss = F.cross_entropy(logits[positions], targets, reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[n][1] for n in layers])
        for n, g in zip(layers, gradients, strict=True):
            used = g[0].abs().sum(1) > 0
            a, g = seen[n][0][used], g[0][used]
            for i, part in enumerate((a.T @ a, g.T @ g, len(a))):
                sums[n][i] = sums[n][i] + part
    # Positions as independent samples: F = Σ_positions E[aaᵀ] ⊗ E[ggᵀ] / loss tokens.
    return {n: (a / count, g / tokens) for n, (a, g, count) in sums.items()}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_lm_positions_are_expanded_and_scaled_as_ewcs_fisher(tmp_path, tie):
    settings = {"strength": 0.0, "estimator": "empirical", "normalize": False}
    structured, diagonal, ends = KFACEWC(**settings), EWC(**settings), Ends()
    data = Sequences(1, MASKED)
    module = seeded(SomebodysLM, tie=tie)
    fit(tmp_path, [structured, diagonal, ends], module, {"a": data}, batch_size=4, max_epochs=1)
    names = [n for n, p in module.named_parameters() if p.ndim == 2 and ("proj" in n or "lm_head" in n)]
    assert set(structured.factors) == set(names)
    assert ("model.lm_head.weight" in names) is not tie
    expected = lm_moments(module, ends.weights[0], data, names)
    # The first position of a sequence has one key to attend to: the gradient at its query is zero but for rounding,
    # and whether it counts as a position is a matter of chance.
    for queries in (True, False):
        part = {n: e for n, e in expected.items() if ("q_proj" in n) is queries}
        factors = {n: structured.factors[n] for n in part}
        assert_factors(SimpleNamespace(factors=factors), part, 0.15 if queries else 1e-3)
    rest = {n: i for n, i in diagonal.importance.items() if n not in structured.factors}
    assert "model.model.embed_tokens.weight" in rest
    assert_each(structured.importance, rest, 1e-4)


def test_lm_one_position_with_loss_in_a_model_without_attention_is_exact(tmp_path):
    # One position per sequence alone bears loss, and the head sees each position by itself: as for a classifier.
    settings = {"strength": 0.0, "estimator": "empirical", "normalize": False}
    structured, diagonal = KFACEWC(**settings), EWC(**settings)
    data = Sequences(1, [6])
    fit(tmp_path, [structured, diagonal], seeded(SomebodysLM, tie=False), {"a": data}, batch_size=1, max_epochs=1)
    torch.testing.assert_close(
        structured.factors["model.lm_head.weight"].diagonal(),
        diagonal.importance["model.lm_head.weight"],
        rtol=1e-4,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    "setting", [{"largest": 0}, {"samples": 0}, {"decay": 2.0}, {"estimator": "batched!"}, {"mode": "separate"}]
)
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        KFACEWC(**setting)
