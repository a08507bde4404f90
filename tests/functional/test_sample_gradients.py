"""SampleGradients against plain autograd, one sample at a time, on every kind of layer and model that it may meet."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_cl.functional import SampleGradients, expected_label_losses


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=rng(seed))


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)


class Problem:
    """A module in evaluation mode and ``losses(rows)``: the scalars for some rows of a batch, summed over them."""

    def __init__(self, module, losses, samples, parameters=None):
        self.module, self.losses, self.samples = module.eval(), losses, samples
        self.parameters = parameters or {n: p for n, p in module.named_parameters() if p.requires_grad}

    def whole(self):
        return self.losses(slice(None))

    def singles(self):
        return [lambda i=i: self.losses(slice(i, i + 1)) for i in range(self.samples)]

    def engine(self, **settings):
        return SampleGradients(self.module, self.parameters, **settings)

    def loop(self, transform=torch.Tensor.square):
        """``Σ_b transform(∂L_b/∂θ)``, summed over samples in float64."""
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.parameters.items()}
        for single in self.singles():
            for loss in single():
                gradients = torch.autograd.grad(
                    loss, list(self.parameters.values()), retain_graph=True, allow_unused=True
                )
                for sum_, gradient in zip(total.values(), gradients, strict=True):
                    if gradient is not None:
                        sum_ += transform(gradient.double())
        return total


def classifier(module, x, classes=3, seed=5):
    y = randint(classes, len(x), seed=seed)

    def losses(rows):
        return [F.cross_entropy(module(x[rows]), y[rows], reduction="sum")]

    return Problem(module, losses, len(x))


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_close(engine, expected, tolerance=1e-5, but=()):
    assert engine.total.keys() == expected.keys()
    largest = max(value.norm().item() for value in expected.values())
    for name in expected.keys() - set(but):
        assert engine.total[name].dtype == torch.float32
        assert expected[name].any(), f"{name}: the test says nothing of it"
        # Queries and keys of an untrained model have next to no gradient: theirs is rounded in units of the others'.
        share = min(1.0, expected[name].norm().item() / (1e-2 * largest))
        error = relative_error(engine.total[name], expected[name]) * share
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_exact(problem, tolerance=1e-5, loose=(), **settings):
    """One batch has the loop's sums, and all parameters but `loose` are covered by a rule."""
    engine = problem.engine(**settings)
    engine.check(problem.samples, problem.whole, problem.singles())
    assert engine.loose == set(loose)
    engine = problem.engine(**settings)
    engine.add(problem.samples, problem.whole)
    transform = {"transform": torch.Tensor.abs} if settings else {}
    assert_close(engine, problem.loop(**transform), tolerance, but=loose)


# ---------------------------------------------------------------------- layers


def mlp(inputs=4, hidden=6, classes=3):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def test_mlp_with_biases():
    assert_exact(classifier(seeded(mlp), randn(7, 4)))


def test_absolute_values_of_single_samples_gradients():
    assert_exact(classifier(seeded(mlp), randn(7, 4)), transform=torch.Tensor.abs_)


def test_batches_add_up():
    problem = classifier(seeded(mlp), randn(7, 4))
    engine = problem.engine()
    engine.add(3, lambda: problem.losses(slice(0, 3)))
    engine.add(4, lambda: problem.losses(slice(3, 7)))
    assert_close(engine, problem.loop())


def test_one_sample_is_the_square_of_its_gradient():
    assert_exact(classifier(seeded(mlp), randn(1, 4)))


def test_a_check_adds_nothing_to_the_total():
    problem = classifier(seeded(mlp), randn(7, 4))
    engine = problem.engine()
    engine.check(7, problem.whole, problem.singles())
    engine.add(7, problem.whole)
    engine.check(7, problem.whole, problem.singles())
    assert_close(engine, problem.loop())


def test_some_parameters_alone():
    module = seeded(mlp)
    problem = classifier(module, randn(7, 4))
    problem.parameters = {"2.weight": module[2].weight, "0.bias": module[0].bias}
    assert_exact(problem)


def test_frozen_parameters_have_no_part():
    module = seeded(mlp)
    module[0].requires_grad_(False)
    problem = classifier(module, randn(7, 4))
    assert set(problem.parameters) == {"2.weight", "2.bias"}
    assert_exact(problem)


@pytest.mark.parametrize("positions", [(5,), (2, 3)], ids=["one axis", "two axes"])
def test_positions_of_a_sample_are_summed_before_they_are_squared(positions):
    module, x = seeded(mlp), randn(4, *positions, 4)
    problem = Problem(module, lambda rows: [module(x[rows]).pow(3).sum()], 4)
    assert_exact(problem)
    # What it must not be: the sum over positions of squares.
    flat = Problem(module, lambda rows: [module(x.flatten(0, -2)[rows]).pow(3).sum()], x.flatten(0, -2).shape[0])
    assert relative_error(flat.loop()["0.weight"], problem.loop()["0.weight"]) > 0.05


class Small(nn.Module):
    """A layer of one kind between two linear ones."""

    def __init__(self, layer, shape=()):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 12), layer, nn.Linear(12, 3)
        self.shape = shape

    def forward(self, x):
        hidden = self.first(x)
        hidden = self.layer(hidden.unflatten(-1, self.shape) if self.shape else hidden)
        return self.last(hidden.flatten(1) if self.shape else hidden)


def moved(layer):
    """Away from where a new layer starts: a weight of one would hide a missing factor."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng(8)), alpha=0.5)
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.add_(torch.rand(buffer.shape, generator=rng(9)))
    return layer


LAYERS = {
    "LayerNorm": lambda: Small(nn.LayerNorm(12)),
    "LayerNorm without bias": lambda: Small(nn.LayerNorm(12, bias=False)),
    "LayerNorm over two axes": lambda: Small(nn.LayerNorm((3, 4)), (3, 4)),
    "RMSNorm": lambda: Small(nn.RMSNorm(12)),
    "GroupNorm": lambda: Small(nn.GroupNorm(3, 12)),
    "GroupNorm with positions": lambda: Small(nn.GroupNorm(2, 4), (4, 3)),
    "InstanceNorm": lambda: Small(nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "PReLU": lambda: Small(nn.PReLU()),
    "PReLU per channel": lambda: Small(nn.PReLU(4), (4, 3)),
    "BatchNorm in evaluation mode": lambda: Small(nn.BatchNorm1d(12)),
    "BatchNorm with positions": lambda: Small(nn.BatchNorm1d(4), (4, 3)),
    "Conv1d": lambda: Small(nn.Conv1d(3, 3, 3, padding=1), (3, 4)),
    "Bilinear of one input": lambda: Small(nn.Linear(12, 12, bias=False)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind):
    module = moved(seeded(LAYERS[kind]))
    assert_exact(classifier(module, randn(6, 4)))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(27, 3),
    )


def test_conv_net():
    assert_exact(classifier(moved(seeded(conv_net)), randn(5, 2, 8, 8)))


class Named(nn.Module):
    """Layers that are called with keyword arguments."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(input=self.norm(input=torch.tanh(self.first(input=x))))


def test_layers_that_are_called_with_keyword_arguments():
    assert_exact_or_loose(classifier(moved(seeded(Named)), randn(6, 4)), exact=[])


class Odd(nn.Module):
    """A layer with several inputs or outputs between two ordinary ones."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        kinds = {
            "LSTM": lambda: nn.LSTM(4, 8, batch_first=True),
            "GRU with samples second": lambda: nn.GRU(4, 8),
            "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
            "bilinear": lambda: nn.Bilinear(4, 4, 8),
        }
        self.kind, self.odd = kind, kinds[kind]()

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.kind == "LSTM":
            x = self.odd(x.unflatten(1, (2, 4)))[0][:, -1]
        elif self.kind == "GRU with samples second":
            x = self.odd(x.unflatten(1, (2, 4)).transpose(0, 1))[0][-1]
        elif self.kind == "attention":
            rows = torch.stack([x, x.roll(1, 1), x**2], 1)
            x = self.odd(rows, rows, rows, need_weights=False)[0].mean(1)
        elif self.kind == "encoder layer":
            x = self.odd(torch.stack([x, x.roll(1, 1), x**2], 1)).mean(1)
        else:
            x = self.odd(x[:, :4], x[:, 4:])
        return self.last(x)


def assert_exact_or_loose(problem, exact):
    """Whatever is not loose is exact; `exact` is not loose."""
    engine = problem.engine()
    engine.check(problem.samples, problem.whole, problem.singles())
    assert not engine.loose & set(exact)
    expected, loose = problem.loop(), set(engine.loose)
    assert {n for n, e in expected.items() if not e.any()} <= {"odd.in_proj_bias", "odd.self_attn.in_proj_bias"}
    engine = problem.engine()
    engine.add(problem.samples, problem.whole)
    assert_close(engine, expected, but=loose)


@pytest.mark.parametrize("kind", ["LSTM", "GRU with samples second", "attention", "encoder layer", "bilinear"])
def test_layers_with_several_inputs_or_outputs(kind):
    ordinary = ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert_exact_or_loose(classifier(seeded(Odd, kind), randn(6, 4)), exact=ordinary)


class Positions(nn.Module):
    """Learnt positions that are looked up once for all samples: they have no axis of samples at all."""

    def __init__(self, length):
        super().__init__()
        self.first, self.places, self.last = nn.Linear(4, 5), nn.Embedding(length, 5), nn.Linear(5, 3)
        self.length = length

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.places(torch.arange(self.length))).mean(1))


@pytest.mark.parametrize("length", [3, 6], ids=["fewer positions than samples", "as many positions as samples"])
def test_positions_without_an_axis_of_samples(length):
    problem = classifier(seeded(Positions, length), randn(6, length, 4))
    assert_exact_or_loose(problem, exact=["first.weight", "first.bias", "last.weight", "last.bias"])


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "tied"])
@pytest.mark.parametrize("transform", [torch.Tensor.square_, torch.Tensor.abs_])
def test_a_weight_that_is_larger_than_a_block(kind, transform):
    from transformers.pytorch_utils import Conv1D

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.head = nn.Embedding(1100, 700), nn.Linear(700, 1100, bias=False)
            self.head.weight = self.rows.weight

        def forward(self, x):
            return self.head(torch.tanh(self.rows((x[..., :3] * 100).long().abs()))) / 30

    torch.manual_seed(0)
    first = {"linear": lambda: nn.Linear(1100, 700), "Conv1D": lambda: Conv1D(700, 1100), "tied": Tied}[kind]()
    module, x = first if kind == "tied" else nn.Sequential(first, nn.Tanh(), nn.Linear(700, 3)), randn(2, 3, 1100)
    problem = Problem(module, lambda rows: [module(x[rows]).square().sum()], 2)
    engine = problem.engine(transform=transform)
    engine.add(2, problem.whole)
    assert_close(engine, problem.loop(torch.Tensor.abs if transform is torch.Tensor.abs_ else torch.Tensor.square))


class Plus(nn.Module):
    """A norm of Gemma's kind: x̂ · (1 + w)."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class Times(Plus):
    """Not affine in its parameter, although it looks like a norm."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:]) * self.weight.exp()


class GemmaRMSNorm(Times):
    """A name that promises what it does not keep."""


@pytest.mark.parametrize("kind", [Plus, Times, GemmaRMSNorm])
def test_somebodys_own_norm(kind):
    assert_exact(classifier(moved(Small(seeded(kind, 12))), randn(6, 4)))


def test_embedding_with_padding_and_repeated_ids():
    module = nn.Sequential(seeded(nn.Embedding, 7, 5, padding_idx=0), nn.Tanh(), nn.Linear(5, 3))
    ids = randint(7, 4, 6, seed=3)
    ids[:, :2] = torch.tensor([[1, 1]])
    ids[1, 3:] = 0
    problem = Problem(module, lambda rows: [module(ids[rows]).square().sum()], 4)
    assert_exact(problem)
    assert not problem.loop()["0.weight"][0].any()


# ---------------------------------------------------------------------- weights used several times, or elsewhere


class Twice(nn.Module):
    """One layer twice, and one weight in two layers, beside others."""

    def __init__(self):
        super().__init__()
        self.again, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.last(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize("transform", [torch.Tensor.square_, torch.Tensor.abs_])
def test_a_layer_used_twice_and_a_weight_shared_by_two_layers(transform):
    problem = classifier(seeded(Twice), randn(6, 4))
    assert "b.weight" not in problem.parameters
    assert_exact(problem, **({"transform": transform} if transform is torch.Tensor.abs_ else {}))


def test_a_layer_used_twice_or_once_as_the_data_say():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.twice = False

        def forward(self, x):
            x = torch.tanh(self.layer(x))
            return self.last(torch.tanh(self.layer(x)) if self.twice else x)

    module = seeded(Sometimes)
    once, twice = (classifier(module, randn(5, 4, seed=seed)) for seed in range(2))
    engine = once.engine()
    engine.add(5, once.whole)
    expected = once.loop()
    module.twice = True
    engine.add(5, twice.whole)
    for name, sum_ in twice.loop().items():
        expected[name] += sum_
    assert not engine.total["unused.weight"].any()
    assert_close(engine, expected, but=["unused.weight", "unused.bias"])


class Outside(nn.Module):
    """A weight that is used by its layer and, with the same data, outside of it."""

    def __init__(self, inside=True):
        super().__init__()
        self.first, self.used, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.inside = inside

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y = self.used(x) if self.inside else x
        return self.last(y + F.linear(x, self.used.weight.T))


@pytest.mark.parametrize("inside", [True, False], ids=["in its layer too", "only outside"])
def test_a_weight_used_outside_of_its_layer_is_loose(inside):
    problem = classifier(seeded(Outside, inside), randn(6, 4))
    if not inside:
        del problem.parameters["used.bias"]
    assert_exact(problem, loose=["used.weight"])


class Bare(nn.Module):
    """A parameter that belongs to no leaf, and a learnt position for all samples."""

    def __init__(self):
        super().__init__()
        self.scale, self.first, self.last = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, 3)
        self.position = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        return self.last(self.scale * torch.tanh(self.first(x) + self.position))


def test_parameters_of_a_module_with_children_are_loose():
    assert_exact(classifier(seeded(Bare), randn(6, 4)), loose=["scale", "position"])


def test_a_weight_in_the_loss_is_loose():
    module = seeded(mlp)
    x = randn(6, 4)
    problem = Problem(module, lambda rows: [module(x[rows]).square().sum() + len(x[rows]) * module[2].weight.sum()], 6)
    assert_exact(problem, loose=["2.weight"])


def test_parametrised_layers():
    # The weight is made of two others, in a submodule of its own.
    module = seeded(mlp)
    nn.utils.parametrizations.weight_norm(module[0])
    problem = classifier(module, randn(6, 4))
    originals = {n for n in problem.parameters if "parametrizations" in n}
    assert len(originals) == 2
    engine = problem.engine()
    engine.check(6, problem.whole, problem.singles())
    assert originals <= engine.loose <= originals | {"0.bias"}
    loose = set(engine.loose)
    engine = problem.engine()
    engine.add(6, problem.whole)
    assert_close(engine, problem.loop(), but=loose)


class Experts(nn.Module):
    """Somebody's experts: rows of all samples, sorted by the expert that they go to."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        score, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, torch.tanh(expert(x[rows])))
        return self.last(out * score[:, None])


def test_experts_that_see_a_part_of_the_samples_are_loose():
    problem = classifier(seeded(Experts), randn(12, 4))
    names = [f"experts.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    assert_exact(problem, loose=names)
    engine = problem.engine()
    engine.add(12, problem.whole)
    assert engine.loose == set(names)  # noticed without a check too


# ---------------------------------------------------------------------- samples that interact


def test_check_finds_batch_norm_in_training_mode():
    # With statistics of the batch; a sample has three positions, so that it can be normalised alone too.
    module = moved(Small(seeded(nn.BatchNorm1d, 4, track_running_stats=False), (4, 3)))
    problem = classifier(module, randn(6, 4))
    engine = problem.engine()
    engine.check(6, problem.whole, problem.singles())
    assert engine.loose == set(problem.parameters)


def test_check_finds_a_contrastive_loss():
    module, x = seeded(mlp), randn(6, 4)

    def losses(rows):
        z = F.normalize(module(x[rows]), dim=-1)
        return [F.cross_entropy(5 * z @ z.T, torch.arange(len(z)), reduction="sum") + z[:, 0].sum()]

    problem = Problem(module, losses, 6)
    engine = problem.engine()
    engine.check(6, problem.whole, problem.singles())
    assert engine.loose == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_check_finds_samples_that_meet_in_one_layer_alone():
    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.a(x)) + 0 * self.last(self.b(x)) + self.b(x.mean(0, keepdim=True)).sum()

    problem = classifier(seeded(Meeting), randn(6, 4))
    engine = problem.engine()
    engine.check(6, problem.whole, problem.singles())
    assert engine.loose >= {"b.weight"}


def test_check_finds_a_mean_where_a_sum_is_due():
    module, x, y = seeded(mlp), randn(6, 4), randint(3, 6, seed=5)
    problem = Problem(module, lambda rows: [F.cross_entropy(module(x[rows]), y[rows])], 6)
    engine = problem.engine()
    engine.check(6, problem.whole, problem.singles())
    assert engine.loose == set(problem.parameters)


def test_check_finds_layers_in_which_samples_do_not_come_first():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.turned, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = torch.tanh(self.a(x)).transpose(0, 1)
            return self.last(torch.tanh(self.turned(x)).transpose(0, 1).mean(1))

    # As many positions as samples: shapes alone do not tell.
    for positions in (3, 6):
        assert_exact(classifier(seeded(Turned), randn(6, positions, 4)), loose=["turned.weight", "turned.bias"])


# ---------------------------------------------------------------------- several losses


def test_several_losses_share_a_graph():
    module, x = seeded(mlp), randn(5, 4)

    def losses(rows):
        logits = module(x[rows])
        return [logits[:, c].tanh().sum() for c in range(3)]

    assert_exact(Problem(module, losses, 5))


def test_several_losses_may_come_from_a_generator():
    module, x = seeded(Twice), randn(5, 4)

    def losses(rows):
        log_p = module(x[rows]).log_softmax(-1)
        for c in range(3):
            yield (log_p[:, c].detach().exp().sqrt() * log_p[:, c]).sum()

    problem = Problem(module, losses, 5)
    assert_exact(problem)
    # Weighted so, they are the exact expectation over labels: the definition one sample at a time.
    expected = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in problem.parameters.items()}
    for i in range(5):
        for weight, loss in expected_label_losses(module(x[i : i + 1])):
            for name, gradient in zip(
                expected, torch.autograd.grad(loss, list(problem.parameters.values()), retain_graph=True), strict=True
            ):
                expected[name] += weight * gradient.double().square()
    engine = problem.engine()
    engine.add(5, problem.whole)
    assert_close(engine, expected)


def test_a_sample_without_loss_adds_nothing():
    module, x = seeded(mlp), randn(5, 4)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    assert_exact(Problem(module, lambda rows: [(weight[rows, None] * module(x[rows])).pow(2).sum()], 5))


# ---------------------------------------------------------------------- language models


VOCABULARY, LENGTH = 13, 7
MASKED = (0, 2, 5, 1)  # labels at the start of each sequence without loss
PADDED = (0, 3, 0, 2)  # positions at the end of each sequence without tokens


def lm(kind, tie=True, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tie,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if kind in ("qwen3", "gemma2"):
        sizes["head_dim"] = 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | settings))
    return moved(model) if kind != "mixtral" else model


def lm_batch(padded):
    ids = randint(VOCABULARY, len(MASKED), LENGTH, seed=4)
    mask = torch.ones_like(ids)
    for row, (count, padding) in enumerate(zip(MASKED, PADDED, strict=True)):
        if padded and padding:
            mask[row, LENGTH - padding :] = 0
            ids[row, LENGTH - padding :] = 0
        del count
    labels = ids.masked_fill(mask == 0, -100)
    for row, count in enumerate(MASKED):
        labels[row, :count] = -100
    return ids, mask, labels


def lm_problem(model, padded=True, context=contextlib.nullcontext):
    ids, mask, labels = lm_batch(padded)

    def losses(rows):
        kwargs = {"attention_mask": mask[rows]} if padded else {}
        with context():
            logits = model(input_ids=ids[rows], **kwargs).logits[:, :-1]
        targets = labels[rows, 1:].flatten()
        return [F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")]

    return Problem(model, losses, len(ids))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "of one length"])
@pytest.mark.parametrize(
    ("kind", "tie"),
    [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False), ("qwen3", True), ("gemma2", True)],
)
def test_language_models(kind, tie, padded):
    assert_exact(lm_problem(lm(kind, tie), padded))


def test_a_padded_batch_is_its_samples_without_padding():
    problem = lm_problem(lm("llama"))
    ids, mask, labels = lm_batch(padded=True)

    def losses(rows):
        length = int(mask[rows].sum())
        logits = problem.module(input_ids=ids[rows, :length]).logits[:, :-1]
        return [F.cross_entropy(logits[0], labels[rows, 1:length][0], ignore_index=-100, reduction="sum")]

    engine = problem.engine()
    engine.add(problem.samples, problem.whole)
    assert_close(engine, Problem(problem.module, losses, problem.samples).loop())


def test_a_sequence_without_any_loss_adds_nothing():
    problem = lm_problem(lm("llama"))
    ids, mask, labels = lm_batch(padded=True)
    labels[1] = -100

    def losses(rows):
        logits = problem.module(input_ids=ids[rows], attention_mask=mask[rows]).logits[:, :-1]
        return [F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), reduction="sum")]

    assert_exact(Problem(problem.module, losses, problem.samples))


def test_tied_embeddings_are_added_up_before_they_are_squared():
    tied, untied = lm_problem(lm("llama", True)), lm_problem(lm("llama", False))
    assert "lm_head.weight" not in tied.parameters
    untied.module.load_state_dict(tied.module.state_dict() | {"lm_head.weight": tied.module.lm_head.weight})
    apart = untied.loop()
    squares = apart["model.embed_tokens.weight"] + apart["lm_head.weight"]
    engine = tied.engine()
    engine.add(tied.samples, tied.whole)
    total = engine.total["model.embed_tokens.weight"]
    assert relative_error(total, tied.loop()["model.embed_tokens.weight"]) < 1e-5
    assert relative_error(total, squares) > 0.01


def test_mixture_of_experts_has_loose_experts_and_all_else_exact():
    problem = lm_problem(lm("mixtral", num_local_experts=4))
    engine = problem.engine()
    engine.check(problem.samples, problem.whole, problem.singles())
    experts = {n for n in problem.parameters if ".experts." in n}
    assert len(experts) == 4
    assert experts <= engine.loose <= {n for n in problem.parameters if ".mlp." in n}
    loose = set(engine.loose)
    engine = problem.engine()
    engine.add(problem.samples, problem.whole)
    assert_close(engine, problem.loop(), but=loose)


def test_gradient_checkpointing_of_a_language_model():
    model = lm("llama")
    plain = lm_problem(model)
    expected = plain.loop()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    problem = lm_problem(model)
    model.train()  # transformers checkpoints in training mode alone; this model has no dropout
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    engine = problem.engine()
    engine.add(problem.samples, problem.whole)
    assert len(runs) == 2  # forward, and again on the way back
    assert not engine.loose
    assert_close(engine, expected)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = (
            nn.Linear(4, 6),
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)),
            nn.Linear(6, 3),
        )
        self.runs = 0

    def run(self, x):
        self.runs += 1
        return torch.tanh(self.block(x))

    def forward(self, x):
        x = checkpoint(self.run, self.first(x), use_reentrant=False)
        return self.last(checkpoint(self.run, x, use_reentrant=False))


def test_a_checkpointed_block_that_is_used_twice():
    module = moved(seeded(Checkpointed))
    x, y = randn(6, 4), randint(3, 6, seed=5)
    problem = Problem(module, lambda rows: [F.cross_entropy(module(x[rows]), y[rows], reduction="sum")], 6)
    engine = problem.engine()
    module.runs = 0
    engine.add(6, problem.whole)
    assert module.runs == 4  # twice forward, and both again on the way back
    assert not engine.loose
    assert_close(engine, problem.loop())


def test_bf16_autocast():
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    problem = lm_problem(lm("llama"), context=autocast)
    engine = problem.engine()
    engine.check(problem.samples, problem.whole, problem.singles())
    assert not engine.loose
    engine = problem.engine()
    engine.add(problem.samples, problem.whole)
    assert_close(engine, problem.loop(), tolerance=0.03)


def test_bf16_weights():
    module, x = seeded(mlp).bfloat16(), randn(6, 4).bfloat16()
    problem = Problem(module, lambda rows: [module(x[rows]).float().pow(3).sum()], 6)
    engine = problem.engine()
    engine.check(6, problem.whole, problem.singles())
    assert not engine.loose
    engine = problem.engine()
    engine.add(6, problem.whole)
    assert_close(engine, problem.loop(), tolerance=0.02)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora(kind):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_fc"]
    torch.manual_seed(0)
    model = get_peft_model(
        lm(kind), LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    problem = lm_problem(model)
    assert len(problem.parameters) == 8
    assert all("lora_" in name for name in problem.parameters)
    assert_exact(problem)


@pytest.mark.parametrize("transform", [{}, {"transform": torch.Tensor.abs_}], ids=["squares", "absolute values"])
@pytest.mark.parametrize(("kind", "tie"), [("llama", True), ("llama", False), ("gemma", True)])
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens"], "use_rslora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 3, 5, 7]},
    ],
    ids=["LoRA", "LoRA alone", "tokens"],
)
def test_adapters_on_embeddings(adapter, kind, tie, transform):
    """Padding is the embedding's token 0; Gemma multiplies embeddings by a factor."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    more = {"head_dim": 8} if kind == "gemma" else {"pad_token_id": 0}
    model = get_peft_model(lm(kind, tie=tie, **more), LoraConfig(r=3, lora_alpha=7, **adapter))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    problem = lm_problem(model)
    assert any("embed_tokens" in name for name in problem.parameters)
    assert_exact(problem, **transform)


# ---------------------------------------------------------------------- no trace


def forwards(module):
    return {name: (layer.__dict__.get("forward"), type(layer).forward) for name, layer in module.named_modules()}


def hooks(module):
    kinds = [name for name in vars(module) if name.endswith("_hooks")]
    return {(name, kind): len(getattr(layer, kind)) for name, layer in module.named_modules() for kind in kinds}


def trace(module):
    state = {f"grad {n}": None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    state |= {f"needs {n}": p.requires_grad for n, p in module.named_parameters()}
    state |= {f"value {n}": v.clone() for n, v in module.state_dict().items()}
    state |= {f"mode {n}": m.training for n, m in module.named_modules()}
    state |= {f"forward {n}": v for n, v in forwards(module).items()} | {
        f"hook {n}": v for n, v in hooks(module).items()
    }
    state |= {f"identity {n}": id(p) for n, p in module.named_parameters()}
    return state | {"random": torch.get_rng_state(), "grad mode": torch.is_grad_enabled()}


def assert_no_trace(before, after):
    assert before.keys() == after.keys()
    differing = [
        k
        for k, v in before.items()
        if not (
            torch.equal(v, after[k])
            if torch.is_tensor(v) and torch.is_tensor(after[k])
            else v is after[k] or v == after[k]
        )
    ]
    assert not differing


@pytest.mark.parametrize("had_gradient", [True, False])
@pytest.mark.parametrize("use", ["add", "check"])
def test_it_leaves_no_trace(use, had_gradient):
    problem = lm_problem(lm("llama"))
    problem.module.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    problem.module.model.norm.forward = problem.module.model.norm.forward  # somebody's patch of an instance
    del problem.parameters["model.layers.0.self_attn.q_proj.weight"]
    for parameter in problem.module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if had_gradient else None
    before = trace(problem.module)
    engine = problem.engine()
    if use == "add":
        engine.add(problem.samples, problem.whole)
    else:
        engine.check(problem.samples, problem.whole, problem.singles())
    assert_no_trace(before, trace(problem.module))
    problem.whole()[0].backward()  # and the module still trains
    assert problem.module.model.norm.weight.grad is not None


@pytest.mark.parametrize(
    "where", ["before the forward pass", "in the forward pass", "after it", "in the backward pass"]
)
def test_after_an_exception_all_is_as_before_and_the_engine_still_works(where):
    class Breaking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("broken")

    module = seeded(Twice)
    problem = classifier(module, randn(6, 4))
    before = trace(module)
    engine = problem.engine()

    def losses():
        if where == "before the forward pass":
            raise RuntimeError("broken")
        if where == "in the forward pass":
            module(torch.zeros(6, 5))
        out = module(randn(6, 4))
        if where == "after it":
            raise RuntimeError("broken")
        return [Breaking.apply(out).sum()]

    with pytest.raises(RuntimeError, match=r"broken|shapes"):
        engine.add(6, losses)
    assert_no_trace(before, trace(module))
    engine = problem.engine()
    engine.add(6, problem.whole)
    assert_close(engine, problem.loop())
