"""The router: known Gaussians, any order, several parts, unknown prompts."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl.functional import routing_limit
from lightning_cl.functional.prompt_means import prompt_beginnings, prompt_means
from lightning_cl.functional.routing import TaskRouter, random_projection

WIDTH = 12


def gaussians(seed=0, tasks=3, count=400, width=WIDTH, spread=2.0):
    """Prompts of each task, with one covariance, and the true means and covariance."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(width, width, generator=g, dtype=torch.float64) / math.sqrt(width)
    means = torch.randn(tasks, width, generator=g, dtype=torch.float64) * spread
    draws = torch.randn(tasks, count, width, generator=g, dtype=torch.float64)
    return (means[:, None] + draws @ root.T).float(), means, root @ root.T


def fitted(prompts, **settings):
    router = TaskRouter(prompts.shape[-1], **settings)
    for task, rows in enumerate(prompts):
        router.update(rows, task)
    return router


def same(a, b, **tolerance):
    for name, value in a.state().items():
        torch.testing.assert_close(value, b.state()[name], **tolerance)


# ---------------------------------------------------------------------- the sums


def test_mean_and_covariance_are_those_of_the_prompts():
    prompts, _, _ = gaussians(count=50)
    router = fitted(prompts)
    torch.testing.assert_close(router.means, prompts.double().mean(1))
    centred = (prompts.double() - prompts.double().mean(1, keepdim=True)).flatten(0, 1)
    pooled = centred.T @ centred / (3 * 50 - 3)
    expected = pooled + 0.1 * pooled.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(router.covariance(), expected)
    x = prompts[:, 7] + 0.3
    d = x.double()[:, None] - prompts.double().mean(1)
    torch.testing.assert_close(router.distances(x), torch.einsum("ptd,de,pte->pt", d, expected.inverse(), d))


def test_known_gaussians_are_recovered():
    prompts, means, covariance = gaussians(count=4000)
    router = fitted(prompts, shrinkage=1e-9)
    torch.testing.assert_close(router.means, means, atol=0.1, rtol=0)
    torch.testing.assert_close(router.covariance(), covariance, atol=0.1, rtol=0)


def test_it_is_as_good_as_the_best_rule_there_is():
    """Bayes' rule with the true means and covariance; the plain nearest mean is worse."""
    prompts, means, covariance = gaussians(seed=3, spread=0.35, count=600)
    router = fitted(prompts[:, :300], shrinkage=1e-3)
    new, truth = prompts[:, 300:].flatten(0, 1), torch.arange(3).repeat_interleave(300)
    d = new.double()[:, None] - means
    best = torch.einsum("ptd,de,pte->pt", d, covariance.inverse(), d).argmin(1)
    plain = d.square().sum(-1).argmin(1)
    ours = router.route(new, reject=False)
    accuracy = [float((choice == truth).double().mean()) for choice in (ours, best, plain)]
    assert accuracy[0] > accuracy[1] - 0.02
    assert accuracy[0] > accuracy[2] + 0.05


@pytest.mark.parametrize("width", [WIDTH, 1100])
def test_in_two_halves_and_in_any_order_it_is_the_same(width):
    prompts, _, _ = gaussians(count=40, width=width)
    at_once = fitted(prompts, keep=16)
    halves = TaskRouter(width, keep=16)
    for task in (2, 0, 1):
        halves.update(prompts[task, 20:].flip(0), task)
    for task in (1, 2, 0):
        halves.update(prompts[task, :20], task)
    same(at_once, halves)
    torch.testing.assert_close(at_once.limits(), halves.limits())
    assert torch.equal(at_once.state()["samples"], halves.state()["samples"])


def test_the_sums_of_two_processes_are_added_up():
    prompts, _, _ = gaussians(count=40)
    first, second = TaskRouter(WIDTH, keep=16), TaskRouter(WIDTH, keep=16)
    for task in range(3):
        first.update(prompts[task, :25], task)
        second.update(prompts[task, 25:], task)
    a, b = first.state(), second.state()
    first.merge(b)
    second.merge(a)
    same(first, second)
    same(first, fitted(prompts, keep=16))


def test_a_new_task_moves_no_earlier_mean():
    prompts, _, _ = gaussians()
    router = fitted(prompts[:2])
    before = router.means
    router.update(prompts[2] * 5, 2)
    assert torch.equal(router.means[:2], before)


def test_the_state_is_tensors_and_loads_again(tmp_path):
    prompts, _, _ = gaussians(count=30)
    router = fitted(prompts)
    torch.save(router.state(), tmp_path / "router.pt")
    other = fitted(prompts.flip(0))
    other.load_state(torch.load(tmp_path / "router.pt", weights_only=True))
    same(router, other, atol=0, rtol=0)
    assert torch.equal(router.distances(prompts[0]), other.distances(prompts[0]))


# ---------------------------------------------------------------------- none of them


def test_the_state_of_an_earlier_version_gives_one_limit_for_all_lengths():
    router = fitted(gaussians(count=30)[0])
    old = router.state()
    old["samples"] = old["samples"][:, :WIDTH]
    other = fitted(gaussians(seed=5, count=30)[0])
    other.load_state(old)
    same(other, router, rtol=1e-6, atol=1e-6)


def test_the_limit_leaves_each_prompt_out_of_the_fit():
    """In closed form what fitting again without the prompt gives, but for the shrinkage, which hardly moves."""
    prompts, _, _ = gaussians(count=20)
    router = fitted(prompts, quantile=1.0)
    slow = []
    for i in range(20):
        rest = TaskRouter(WIDTH)
        for task in range(3):
            rest.update(torch.cat([prompts[0, :i], prompts[0, i + 1 :]]) if task == 0 else prompts[task], task)
        slow.append(rest.distances(prompts[0, i : i + 1])[0, 0])
    torch.testing.assert_close(router.limits()[0], torch.stack(slow).max(), rtol=0.05, atol=0)
    inside = router.distances(prompts[0])[:, 0].max()
    assert inside < 0.9 * router.limits()[0]


@pytest.mark.parametrize(("width", "count"), [(12, 400), (96, 120)])
def test_new_prompts_of_its_tasks_are_kept_and_others_are_not(width, count):
    prompts, _, _ = gaussians(seed=5, count=2 * count, width=width)
    router = fitted(prompts[:, :count])
    new = prompts[:, count:].flatten(0, 1)
    assert float((router.route(new) == -1).double().mean()) < 0.04
    assert bool((router.route(new + 20) == -1).all())
    assert bool((router.route(new + 20, reject=False) >= 0).all())


def test_the_limits_follow_the_covariance():
    """Tasks that vary in other directions halve the pooled covariance of the first: so its distances double."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 500, 40, generator=g)
    rows[0, :, 20:] *= 0.01
    rows[1, :, :20] *= 0.01
    rows[1] += 5
    router = TaskRouter(40)
    router.update(rows[0, :250], 0)
    alone = router.limits()[0]
    router.update(rows[1, :250], 1)
    assert router.limits()[0] > 1.6 * alone
    kept = router.route(rows[0, 250:]) == 0
    assert float(kept.double().mean()) > 0.95


def test_the_sample_of_a_task_is_an_even_draw():
    rows = torch.arange(2000.0)[:, None].repeat(1, 2)
    router = TaskRouter(2, keep=400)
    router.update(rows, 0)
    kept = router.state()["samples"][:, 0]
    assert len(kept.unique()) == 400
    # The mean of 400 of 2000 numbers: a standard deviation of 577 / 20 · √0.8 = 26.
    assert abs(float(kept.mean()) - 999.5) < 3 * 26


# ---------------------------------------------------------------------- prompts of other lengths


def texts(tasks=3, count=1600, length=64, seed=0):
    """Token vectors ``[tasks, count, length, width]``: of a task, of a document, of a token."""
    g = torch.Generator().manual_seed(seed)
    task = torch.randn(tasks, 1, 1, WIDTH, generator=g) * 0.6
    document = torch.randn(tasks, count, 1, WIDTH, generator=g) * 0.1
    return task + document + torch.randn(tasks, count, length, WIDTH, generator=g)


def fitted_to_texts(vectors, **settings):
    router = TaskRouter(WIDTH, **settings)
    mask = torch.ones(vectors.shape[1:3])
    for task, some in enumerate(vectors):
        router.update(prompt_means(some, mask), task, mask.sum(1), prompt_beginnings(some, mask))
    return router


def test_short_prompts_are_not_strange_and_long_ones_are_not_alike():
    """Fitted on prompts of 64 tokens, of each length about one own prompt of a hundred is sent to the base."""
    vectors = texts()
    router = fitted_to_texts(vectors[:, :800])
    blind = TaskRouter(WIDTH)
    for task, some in enumerate(vectors[:, :800]):
        blind.update(some.mean(1), task)
    new, foreign = vectors[:, 800:].flatten(0, 1), texts(1, 400, seed=9)[0]
    for n in (1, 3, 8, 20, 64):
        lengths = torch.full((len(new),), n)
        x = new[:, :n].mean(1)
        lost = float((router.route(x, lengths=lengths) == -1).double().mean())
        assert lost < 0.03, n
        if n <= 8:
            assert float((blind.route(x) == -1).double().mean()) > 0.9
    # At 64 tokens nearly all of another task is told, as by a router that knows no other length.
    x = foreign.mean(1)
    for found in (router.route(x, lengths=torch.full((400,), 64)), blind.route(x)):
        assert float((found == -1).double().mean()) > 0.95
    assert torch.equal(router.route(x, lengths=torch.full((400,), 99)), router.route(x))


def test_limits_of_beginnings_are_those_of_a_fit_without_the_prompt(monkeypatch):
    """Of one length only: the greatest of the distances that fitting again without each prompt gives."""
    vectors = texts(count=20)
    router = TaskRouter(WIDTH, quantile=1.0)
    whole, part = vectors.mean(2), vectors[:, :, :5].mean(2)
    for task in range(3):
        router.update(whole[task], task, torch.full((20,), 999), (part[task], torch.full((20,), 5)))
    slow = []
    for i in range(20):
        rest = TaskRouter(WIDTH)
        for task in range(3):
            rest.update(whole[task][torch.arange(20) != i] if task == 0 else whole[task], task)
        slow.append(rest.distances(part[0, i : i + 1])[0, 0])
    monkeypatch.setattr(routing_limit, "_NEAREST", 20)
    limit = router.limits(torch.tensor([5]))[0, 0]
    torch.testing.assert_close(limit, torch.stack(slow).max(), rtol=0.05, atol=0)
    assert router.distances(part[0])[:, 0].max() < 0.97 * limit


def test_beginnings_are_means_of_powers_of_two_whatever_the_order():
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(700, 12, 4, generator=g), torch.ones(700, 12)
    mask[:, :2] = 0  # on the left
    means, lengths = prompt_beginnings(x, mask, tokens=9)
    counts = torch.bincount(lengths)
    assert counts.nonzero().flatten().tolist() == [1, 2, 4, 8]
    assert int(counts[[1, 2, 4, 8]].min()) > 130  # of 175, with a standard deviation of 11
    for i in range(0, 700, 70):
        torch.testing.assert_close(means[i], x[i, 2 : 2 + int(lengths[i])].mean(0))
    again = prompt_beginnings(x.flip(0), mask, tokens=9)
    assert torch.equal(again[1].flip(0), lengths)
    one, length = prompt_beginnings(x[:1, :1], torch.ones(1, 1))
    assert torch.equal(one, x[:1, 0])
    assert length.tolist() == [1]


def test_limits_are_computed_once_until_something_changes(monkeypatch):
    router = fitted_to_texts(texts(count=40))
    first = router.limits(torch.tensor([4, 64]))
    calls = []
    monkeypatch.setattr(TaskRouter, "_limit", lambda self, task: calls.append(task))
    assert torch.equal(router.limits(torch.tensor([4, 64])), first)
    assert calls == []
    monkeypatch.undo()
    router.update(torch.ones(5, WIDTH), 0)
    assert not torch.equal(router.limits(torch.tensor([4, 64])), first)


# ---------------------------------------------------------------------- features


def test_padding_does_not_count_on_either_side():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 4, generator=g)
    nan = torch.full((1, 2, 4), math.nan)
    left, right = torch.cat([nan, x], 1), torch.cat([x, nan], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    expected = x.mean(1)
    torch.testing.assert_close(prompt_means(left, mask), expected)
    torch.testing.assert_close(prompt_means(right, mask.flip(1).bool()), expected)
    torch.testing.assert_close(prompt_means(left.bfloat16(), mask, tokens=2), x[:, :2].bfloat16().float().mean(1))


def test_the_projection_nearly_keeps_distances_and_is_seeded():
    before = torch.random.get_rng_state()
    p = random_projection(4096)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert p.shape == (4096, 512)
    assert torch.equal(p, random_projection(4096))
    assert not torch.equal(p, random_projection(4096, seed=1))
    x = torch.randn(50, 4096, generator=torch.Generator().manual_seed(1)).double()
    ratio = (x @ p).norm(dim=1) / x.norm(dim=1)
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15


def test_wide_features_are_projected():
    prompts, _, _ = gaussians(width=1500, count=60)
    router = fitted(prompts[:, :40])
    assert router.state()["moment"].shape == (512, 512)
    assert router.route(prompts[:, 40:].flatten(0, 1), reject=False).tolist() == [0] * 20 + [1] * 20 + [2] * 20


# ---------------------------------------------------------------------- few prompts and mistakes


def test_single_prompts_give_plain_distances():
    router = TaskRouter(2)
    router.update(torch.tensor([[1.0, 0.0]]), 0)
    router.update(torch.tensor([[0.0, 2.0]]), 2)
    assert router.distances(torch.tensor([[0.0, 0.0]])).tolist() == [[1.0, math.inf, 4.0]]
    assert router.route(torch.tensor([[0.0, 0.0]])).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskRouter(0), "width=0"),
        (lambda: TaskRouter(4, shrinkage=0.0), "shrinkage=0.0"),
        (lambda: TaskRouter(4, quantile=1.5), "quantile=1.5"),
        (lambda: TaskRouter(4, keep=0), "keep=0"),
        (lambda: TaskRouter(4).route(torch.zeros(1, 4)), "fitted on no prompt"),
        (lambda: TaskRouter(4).update(torch.zeros(1, 5), 0), r"shape \[1, 5\]: expected \[prompts, 4\]"),
        (lambda: TaskRouter(4).update(torch.full((1, 4), math.nan), 0), "not finite"),
        (lambda: TaskRouter(4).update(torch.zeros(1, 4), -1), "task=-1"),
        (
            lambda: TaskRouter(4).update(torch.zeros(2, 4), 0, torch.ones(3)),
            r"lengths of shape \[3\], beginnings of shapes",
        ),
        (
            lambda: TaskRouter(4).route(torch.zeros(1, 4), lengths=torch.ones(2)),
            r"lengths of shape \[2\]: expected",
        ),
        (lambda: TaskRouter(4).merge(TaskRouter(5).state()), "5 dimensions, this router 4"),
        (lambda: prompt_means(torch.zeros(2, 3, 4), torch.ones(2, 4)), "mask of shape"),
        (lambda: prompt_means(torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])), r"rows \[1\] have no token"),
        (lambda: prompt_means(torch.zeros(2, 3, 4), torch.ones(2, 3), tokens=0), "tokens=0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
