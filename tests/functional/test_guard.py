"""The guard's statistics: closed forms, error rates of simulated streams, and what a budget allows."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl.functional.guard import (
    LEAST_ALLOWED,
    allowed_rise,
    confidence_width,
    kept_share,
    look_error,
    paired_rise,
)


@pytest.mark.parametrize(("n", "alpha"), [(8, 0.01), (24, 0.001)])
def test_at_the_bound_the_mixed_likelihood_ratio_is_one_over_alpha(n, alpha):
    """Integrates over the standardised mean, which is normal with variance ρ², and the spread, with density 1 / σ."""
    first = 16
    log = -2 * math.log(alpha)
    rho = (log + math.log(log) + 1) / first
    rest = torch.linspace(-1, 1, n, dtype=torch.float64)
    x = rest / rest.std() + confidence_width(n, alpha, first)  # in units of their standard deviation
    log_sigma = torch.linspace(-4, 5, 1801, dtype=torch.float64)
    delta = torch.linspace(-9, 9, 3601, dtype=torch.float64) * rho**0.5
    sigma = log_sigma.exp()
    squares, total = x.square().sum(), x.sum()

    def likelihood(d):
        """Of the data for standardised means `d` and each σ, but for a constant."""
        away = squares / sigma**2 - 2 * d[:, None] * total / sigma + n * d[:, None] ** 2
        return (-0.5 * away - n * log_sigma).exp().sum(1)

    prior = (-0.5 * delta.square() / rho).exp()
    mixed = (prior / prior.sum() * likelihood(delta)).sum()
    assert float(mixed / likelihood(torch.zeros(1, dtype=torch.float64))) == pytest.approx(1 / alpha, rel=1e-3)


def test_for_many_samples_the_bound_is_the_normal_mixture_with_a_known_variance():
    n, alpha, first = 200_000, 0.01, 64
    log = -2 * math.log(alpha)
    inside = n * (log + math.log(log) + 1) / first + 1
    known = math.sqrt(2 * inside / (n * (inside - 1)) * math.log(math.sqrt(inside) / alpha))
    assert confidence_width(n, alpha, first) == pytest.approx(known, rel=1e-3)


def test_too_few_samples_are_never_sure():
    assert confidence_width(2, 1e-6, 2) == math.inf
    rise = paired_rise(torch.tensor([1.0, 1.1]), torch.zeros(2), 0.0, 1e-6)
    assert rise.decision == "uncertain"


def test_errors_of_all_looks_and_tasks_add_up_to_alpha():
    total = sum(3 * look_error(0.05, look, 3) for look in range(1, 100_000))
    assert total == pytest.approx(0.05, rel=1e-4)


def simulate(shift, looks=12, runs=1500, n=64, noise=0.006, heavy=False, tasks=1, seed=1):
    """Looks at one set of sequences again and again, with paired noise that is partly the same at every look."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    lasting, found = draw(runs, n), torch.zeros(runs, looks, dtype=torch.bool)
    for look in range(1, looks + 1):
        new = draw(runs, n)
        d = shift + noise * (lasting + (new**3 / 15**0.5 if heavy else new)) / 2**0.5
        width = confidence_width(n, look_error(0.05, look, tasks), n)
        found[:, look - 1] = d.mean(1) - width * d.std(1) > 0
    return found


@pytest.mark.parametrize("heavy", [False, True])
def test_false_alarms_under_the_null_and_power_at_a_planted_rise(heavy):
    assert simulate(0.0, heavy=heavy).any(1).double().mean() <= 0.05
    # Few sequences, many looks at five tasks.
    few = torch.stack([simulate(0.0, looks=40, runs=400, n=8, tasks=5, seed=seed).any(1) for seed in range(5)]).any(0)
    assert few.double().mean() <= 0.05
    planted = simulate(0.05, looks=2, heavy=heavy)
    assert planted.all(1).double().mean() >= 0.99  # both looks: with patience 2, too
    assert simulate(0.05, looks=2, n=16, noise=0.03, heavy=heavy)[:, 1].double().mean() >= 0.5


def test_looking_at_more_sequences_until_it_is_clear_keeps_the_error_rate():
    """An optional stop after 16, 32, … 1,024 sequences, which a bound for one n would break."""
    generator = torch.Generator().manual_seed(2)
    d = torch.randn(2000, 1024, generator=generator, dtype=torch.float64)
    wrong, naive = torch.zeros(2000, dtype=torch.bool), torch.zeros(2000, dtype=torch.bool)
    for n in (16, 32, 64, 128, 256, 512, 1024):
        mean, sd = d[:, :n].mean(1), d[:, :n].std(1)
        wrong |= mean.abs() > confidence_width(n, 0.05, 16) * sd
        naive |= mean.abs() > 1.96 * sd / n**0.5
    assert wrong.double().mean() <= 0.05 < naive.double().mean()


def test_decisions_and_numbers():
    reference = torch.linspace(1.0, 3.0, 32, dtype=torch.float64)
    noise = 0.01 * torch.sin(torch.arange(32.0, dtype=torch.float64))
    rise = paired_rise(reference + 0.2 + noise, reference, 0.05, 0.05)
    assert rise.decision == "breach"
    assert rise.mean == pytest.approx(0.2 + float(noise.mean()))
    assert rise.error == pytest.approx(float(noise.std()) / 32**0.5)
    assert rise.excess == pytest.approx(rise.mean - 0.05)
    assert rise.margin > 3 * rise.error
    assert paired_rise(reference - 0.1 + noise, reference, 0.05, 0.05).decision == "safe"
    assert paired_rise(reference + 0.05 + noise, reference, 0.05, 0.05).decision == "uncertain"
    spoilt = reference.clone()
    spoilt[3] = math.nan
    assert paired_rise(spoilt, reference, 9.0, 0.05)[:2] == (math.inf, 0.0)
    assert paired_rise(spoilt, reference, 9.0, 0.05).decision == "breach"
    with pytest.raises(ValueError, match=r"\[32\] and \[31\]"):
        paired_rise(reference, reference[1:], 0.0, 0.05)


def test_a_share_of_what_training_gave_is_paired_with_the_rise():
    learnt = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = learnt + torch.linspace(0.5, 1.5, 64, dtype=torch.float64)  # training gave 1 on average
    now = learnt + 0.1 * (before - learnt)  # each sequence lost a tenth of its own gain
    assert kept_share(now, learnt, before) == pytest.approx(0.9)
    for budget, decision in ((0.91, "breach"), (0.89, "safe")):
        rise = paired_rise(now, learnt, allowed_rise("retained", budget, learnt, before), 0.05)
        assert rise.decision == decision, rise
    assert allowed_rise("nats", 0.3, learnt) == 0.3
    assert allowed_rise("retained", 0.9, learnt, learnt + 0.001) == LEAST_ALLOWED  # it gave next to nothing
    watched = allowed_rise("retained", 0.9, learnt)
    assert torch.allclose(watched, 0.1 * learnt)
    assert math.isnan(kept_share(now, learnt, learnt))
