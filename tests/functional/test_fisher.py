"""Fisher diagonal against closed forms, enumeration and naive loops."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lightning_cl.functional import expected_label_losses, fisher_diagonal, sampled_label_loss, squared_gradients
from lightning_cl.functional.ewc import add_squared_gradients_


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def small_mlp(seed=0, inputs=4, hidden=5, classes=3):
    parameters = {
        "w1": randn(inputs, hidden, seed=seed),
        "b1": randn(hidden, seed=seed + 1),
        "w2": randn(hidden, classes, seed=seed + 2),
    }
    return {name: tensor.requires_grad_() for name, tensor in parameters.items()}


def mlp_logits(parameters, x):
    return torch.tanh(x @ parameters["w1"] + parameters["b1"]) @ parameters["w2"]


def drawn_labels(logits, generator):
    # d(-log p_y)/d logits is softmax − one_hot(y): the smallest entry is the label that was drawn.
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(sampled_label_loss(logits, generator), logits)
    one_hot = logits.float().softmax(-1) - gradient.float()
    return one_hot.argmax(-1)


def chi_square(counts, expected):
    return ((counts - expected).square() / expected).sum().item()


# closed forms


def test_exact_fisher_of_logistic_regression_is_p_times_one_minus_p_times_x_squared():
    x = randn(16, 5, seed=1)
    w = randn(5, seed=2).requires_grad_()
    samples = ((expected_label_losses(torch.stack([torch.zeros(()), row @ w])[None]), 1) for row in x)
    total, count = fisher_diagonal(samples, {"w": w})
    p = torch.sigmoid(x @ w.detach())
    assert count == 16
    torch.testing.assert_close(total["w"] / count, ((p * (1 - p))[:, None] * x.square()).mean(0))


def test_exact_fisher_of_softmax_regression():
    x = randn(9, 4, seed=3)
    w = randn(3, 4, seed=4).requires_grad_()
    total, _ = fisher_diagonal(((expected_label_losses((w @ row)[None]), 1) for row in x), {"w": w})
    p = (x @ w.detach().T).softmax(-1)
    torch.testing.assert_close(total["w"], torch.einsum("nc,nd->cd", p * (1 - p), x.square()))


def test_fisher_of_a_linear_gaussian_model_is_x_squared_over_variance():
    x, w, deviation = randn(5, seed=5), randn(5, seed=6).requires_grad_(), 0.7
    prediction = w @ x
    # Three Gauss-Hermite nodes integrate the (quadratic in y) squared score over y ~ N(prediction, σ²) exactly.
    nodes = [(2 / 3, 0.0), (1 / 6, 3**0.5), (1 / 6, -(3**0.5))]
    losses = [
        (weight, (prediction.detach() + deviation * z - prediction).square() / (2 * deviation**2))
        for weight, z in nodes
    ]
    torch.testing.assert_close(squared_gradients(losses, {"w": w})["w"], x.square() / deviation**2)


def test_exact_fisher_of_a_sequence_equals_enumeration_of_all_label_sequences():
    # The brute force squares the *sum* over positions; that its cross terms vanish is what is being checked.
    parameters, x = small_mlp(), randn(1, 3, 4, seed=7)
    exact = squared_gradients(expected_label_losses(mlp_logits(parameters, x)), parameters)
    log_p = mlp_logits(parameters, x).log_softmax(-1)[0]
    expected = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for labels in itertools.product(range(3), repeat=3):
        score = log_p[torch.arange(3), torch.tensor(labels)].sum()
        gradients = torch.autograd.grad(score, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += score.exp().detach() * gradient.square()
    torch.testing.assert_close(exact, expected)


def test_label_probabilities_sum_to_the_number_of_positions():
    terms = list(expected_label_losses(randn(2, 3, 5, seed=8)))
    assert len(terms) == 2 * 3 * 5
    assert sum(weight for weight, _ in terms) == pytest.approx(2 * 3, rel=1e-5)
    assert all(weight == pytest.approx(torch.exp(-loss).item(), rel=1e-4) for weight, loss in terms)


def test_a_masked_class_has_no_part_in_the_exact_fisher():
    # Probability 0 times an infinite loss must not become NaN.
    w, x = randn(3, 4, seed=9).requires_grad_(), randn(4, seed=10)
    masked = torch.cat([w @ x, torch.tensor([float("-inf")])])[None]
    torch.testing.assert_close(
        squared_gradients(expected_label_losses(masked), {"w": w}),
        squared_gradients(expected_label_losses((w @ x)[None]), {"w": w}),
    )


def test_logits_of_one_position_need_no_batch_axis():
    logits = randn(5, seed=9)  # [..., classes] with no axis before the classes
    with_axis, without = list(expected_label_losses(logits[None])), list(expected_label_losses(logits))
    assert [loss.item() for _, loss in without] == [loss.item() for _, loss in with_axis]
    assert sampled_label_loss(logits, rng(1)).item() == sampled_label_loss(logits[None], rng(1)).item()


# per-sample gradients


def test_fisher_diagonal_equals_a_loop_of_backward_calls():
    parameters, x = small_mlp(seed=10), randn(12, 4, seed=11)
    labels = torch.randint(3, (12,), generator=rng(12))
    samples = (
        ([(1.0, F.cross_entropy(mlp_logits(parameters, row), label))], 1) for row, label in zip(x, labels, strict=True)
    )
    total, count = fisher_diagonal(samples, parameters)
    expected = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for row, label in zip(x, labels, strict=True):
        F.cross_entropy(mlp_logits(parameters, row), label).backward()
        for name, parameter in parameters.items():
            expected[name] += parameter.grad.square()
            parameter.grad = None
    assert count == 12
    torch.testing.assert_close(total, expected)


def test_squared_batch_mean_is_too_small_by_the_batch_size():
    parameters, generator, batch = small_mlp(seed=20), rng(21), 32
    x = randn(40, batch, 4, seed=22)
    batched, per_sample = 0.0, 0.0
    for rows in x:
        mean_loss = sampled_label_loss(mlp_logits(parameters, rows), generator) / batch
        batched += sum(f.sum().item() for f in squared_gradients([(1.0, mean_loss)], parameters).values()) / len(x)
    for row in x.flatten(0, 1).unsqueeze(1):
        loss = sampled_label_loss(mlp_logits(parameters, row), generator)
        per_sample += sum(f.sum().item() for f in squared_gradients([(1.0, loss)], parameters).values())
    per_sample /= len(x) * batch
    assert batched / per_sample == pytest.approx(1 / batch, rel=0.3)


def test_sequence_fisher_is_the_squared_sum_over_tokens_divided_by_the_number_of_tokens():
    parameters = small_mlp(seed=30)
    sequences = [(randn(n, 4, seed=n), torch.randint(3, (n,), generator=rng(n))) for n in (3, 7)]
    samples = (([(1.0, F.cross_entropy(mlp_logits(parameters, x), y, reduction="sum"))], len(y)) for x, y in sequences)
    total, count = fisher_diagonal(samples, parameters)
    squared_sum, sum_of_squares = 0, 0
    for x, y in sequences:
        per_token = [
            torch.autograd.grad(F.cross_entropy(mlp_logits(parameters, a), b), parameters["w1"])[0]
            for a, b in zip(x, y, strict=True)
        ]
        squared_sum += torch.stack(per_token).sum(0).square() / 10
        sum_of_squares += torch.stack(per_token).square().sum(0) / 10
    assert count == 10
    torch.testing.assert_close(total["w1"] / count, squared_sum)
    assert not torch.allclose(total["w1"] / count, sum_of_squares, rtol=0.1)


# sampling


@pytest.mark.parametrize("shape", [(1, 4), (1, 5, 4)], ids=["classifier", "language model"])
def test_mean_of_sampled_squares_converges_to_the_exact_expectation(shape):
    parameters, x, generator, draws = small_mlp(seed=40), randn(*shape, seed=41), rng(42), 3000
    logits = mlp_logits(parameters, x)
    exact = squared_gradients(expected_label_losses(mlp_logits(parameters, x)), parameters)
    inputs = list(parameters.values())
    squares = torch.stack(
        [
            torch.cat([g.square().flatten() for g in torch.autograd.grad(loss, inputs, retain_graph=True)])
            for loss in (sampled_label_loss(logits, generator) for _ in range(draws))
        ]
    ).double()
    standard_error = squares.std(0) / draws**0.5
    error = squares.mean(0) - torch.cat([f.flatten() for f in exact.values()])
    # 4.5 standard errors for each of some 40 correlated entries; the trace is known to a few percent.
    assert (error.abs() <= 4.5 * standard_error + 1e-7).all()
    assert squares.sum(1).mean().item() == pytest.approx(sum(f.sum().item() for f in exact.values()), rel=0.1)


def test_drawn_labels_follow_the_softmax():
    scores, draws = torch.tensor([2.0, -3.0, 0.5, 0.0, 1.0, -1.0]), 20_000
    labels = drawn_labels(scores.expand(draws, 6), rng(50))
    expected = scores.double().softmax(-1) * draws
    assert chi_square(torch.bincount(labels, minlength=6), expected) < 20.5  # 99.9 % of chi-square, 5 degrees


def test_labels_drawn_from_bf16_logits_follow_the_softmax():
    # A cumulative distribution kept in bf16 has far fewer than 500 steps: most classes would never be drawn.
    scores, draws = torch.zeros(500, dtype=torch.bfloat16), 10_000
    labels = drawn_labels(scores.expand(draws, 500), rng(58))
    counts = torch.bincount(labels, minlength=500)
    assert chi_square(counts, torch.full((500,), draws / 500)) < 602  # 99.9 % with 499 degrees of freedom


def test_labels_of_neighbouring_positions_are_independent():
    scores, draws = torch.tensor([[0.5, 0.0, -1.0], [-1.0, 1.0, 0.0]]), 10_000
    labels = drawn_labels(scores.expand(draws, 2, 3), rng(51))
    p = scores.double().softmax(-1)
    counts = torch.bincount(labels[:, 0] * 3 + labels[:, 1], minlength=9)
    assert chi_square(counts, draws * torch.outer(p[0], p[1]).flatten()) < 26.1  # 99.9 % with 8 degrees of freedom


def test_a_masked_class_is_never_drawn():
    # Padded vocabularies carry −inf at either end; one such draw would make the loss infinite.
    scores = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf"), -1.0, float("-inf")])
    assert torch.isfinite(sampled_label_loss(scores.expand(50_000, 6), rng(52)))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24], ids=["smallest", "largest"])
def test_the_extreme_uniform_numbers_draw_a_possible_class(monkeypatch, uniform):
    # Once in 2^24 draws: the first class must not win with probability 0, and rounding must not run over the end.
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full(a[0] if isinstance(a[0], tuple) else a, uniform))
    scores = torch.cat([torch.full((3,), float("-inf")), randn(1000, seed=53), torch.full((3,), float("-inf"))])
    assert torch.isfinite(sampled_label_loss(scores.expand(4, -1)))


def test_sampled_loss_is_the_sum_over_positions_of_minus_log_p():
    logits, seed = randn(2, 5, 7, seed=54), 55
    labels = drawn_labels(logits, rng(seed))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(sampled_label_loss(logits, rng(seed)), expected)


def test_the_same_seed_draws_the_same_labels():
    logits = randn(200, 7, seed=56)
    assert torch.equal(drawn_labels(logits, rng(1)), drawn_labels(logits, rng(1)))
    assert not torch.equal(drawn_labels(logits, rng(1)), drawn_labels(logits, rng(2)))


def test_a_generator_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    sampled_label_loss(randn(20, 5, seed=57), rng(3))
    assert torch.equal(torch.get_rng_state(), before)


# bookkeeping


@pytest.mark.parametrize("had_gradient", [True, False])
def test_grad_is_untouched(had_gradient):
    w = randn(3, seed=60).requires_grad_()
    w.grad = torch.full((3,), 7.0) if had_gradient else None
    fisher_diagonal([([(1.0, w.square().sum())], 1)], {"w": w})
    assert (w.grad is None) if not had_gradient else torch.equal(w.grad, torch.full((3,), 7.0))


def test_unused_parameter_gets_zeros_of_its_shape():
    w, unused = randn(3, seed=61).requires_grad_(), randn(2, 2, seed=62).requires_grad_()
    fisher = squared_gradients([(1.0, w.sum()), (1.0, w.square().sum())], {"w": w, "unused": unused})
    assert torch.equal(fisher["unused"], torch.zeros(2, 2))


def test_losses_may_share_a_graph():
    parameters, x = small_mlp(seed=70), randn(1, 4, seed=71)
    shared = squared_gradients(list(expected_label_losses(mlp_logits(parameters, x))), parameters)
    apart = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for label in range(3):
        loss = F.cross_entropy(mlp_logits(parameters, x), torch.tensor([label]))  # a graph of its own
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            apart[name] += torch.exp(-loss).detach() * gradient.square()
    torch.testing.assert_close(shared, apart)


def test_weight_multiplies_the_square():
    # So a loss scale s is undone by the weight 1 / s².
    w = randn(4, seed=72).requires_grad_()
    plain = squared_gradients([(1.0, w.pow(3).sum())], {"w": w})
    scaled = squared_gradients([(1 / 64.0**2, 64.0 * w.pow(3).sum())], {"w": w})
    torch.testing.assert_close(scaled, plain)


def test_squares_are_added_to_what_is_there():
    w = randn(4, seed=73).requires_grad_()
    total = {"w": torch.ones(4)}
    add_squared_gradients_(total, [(2.0, w.pow(3).sum())], {"w": w})
    torch.testing.assert_close(total["w"], 1 + 2 * (3 * w.detach().square()).square())


def test_squares_of_bf16_gradients_are_summed_in_fp32():
    # 1 + 2^-9 rounds to 1 in bf16: a sum kept in bf16 would lose every one of the small squares.
    w = torch.ones(1, dtype=torch.bfloat16).requires_grad_()
    losses = [(1.0, w.sum())] + [(2.0**-9, w.sum()) for _ in range(512)]
    fisher = squared_gradients(losses, {"w": w})["w"]
    assert fisher.dtype == torch.float32
    assert fisher.item() == pytest.approx(2.0, rel=1e-5)
