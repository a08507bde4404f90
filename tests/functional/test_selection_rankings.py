"""Rankings against the papers' own words, brute force, and what must not change them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_cl.functional.selection import herding, k_center


def points(samples: int, width: int, seed: int) -> torch.Tensor:
    """Points around a few centres, far from the origin: means and directions both matter."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(3, width, generator=generator) + 1
    which = torch.randint(3, (samples,), generator=generator)
    return centres[which] + torch.randn(samples, width, generator=generator)


def icarl(features: torch.Tensor, count: int) -> list[int]:
    """Algorithm 4 of iCaRL as it is printed, in double precision; a sample is taken once."""
    phi = features.double().numpy()
    phi = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    mean = phi.mean(0)
    chosen: list[int] = []
    for k in range(1, count + 1):
        others = [x for x in range(len(phi)) if x not in chosen]
        already = phi[chosen].sum(0)
        chosen.append(min(others, key=lambda x: np.linalg.norm(mean - (phi[x] + already) / k)))
    return chosen


def cover(features: torch.Tensor, chosen) -> float:
    """The distance from the centres of the sample that is farthest from its nearest."""
    return float(torch.cdist(features.double(), features[list(chosen)].double()).min(1).values.max())


# herding


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("samples", "width"), [(12, 3), (40, 16), (9, 64)])
def test_herding_is_algorithm_4_of_icarl(samples, width, seed):
    features = points(samples, width, seed)
    assert herding(features, samples) == icarl(features, samples)


def test_the_mean_of_a_herd_nears_the_mean_faster_than_that_of_random_choices():
    # As 1/k instead of 1/√k (Welling 2009).
    features = points(400, 8, 1)
    unit = torch.nn.functional.normalize(features, dim=1)

    def distance(chosen):
        return float((unit[chosen].mean(0) - unit.mean(0)).norm())

    generator = torch.Generator().manual_seed(0)
    for k in (10, 40, 100):
        random = [distance(torch.randperm(400, generator=generator)[:k]) for _ in range(50)]
        assert distance(herding(features, k)) < min(min(random), 2 / k)


def test_length_of_features_does_not_matter_to_herding():
    features = points(20, 6, 2)
    scaled = features * torch.rand(20, 1, generator=torch.Generator().manual_seed(0)).add(0.5)
    assert herding(scaled, 20) == herding(features, 20)


def test_all_samples_of_a_herd_have_the_mean_of_all():
    assert sorted(herding(points(15, 4, 3), 15)) == list(range(15))


# k-centre


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_greedy_centres_are_at_most_twice_as_far_as_the_best_ones(seed, count):
    features = points(9, 2, seed)
    best = min(cover(features, chosen) for chosen in itertools.combinations(range(9), count))
    assert best - 1e-6 <= cover(features, k_center(features, count)) <= 2 * best + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_each_centre_is_the_farthest_from_those_before_it(seed):
    features = points(30, 5, seed)
    distances = torch.cdist(features.double(), features.double())
    chosen = k_center(features, 30)
    assert chosen[0] == int((features.double() - features.double().mean(0)).norm(dim=1).argmin())
    for k in range(1, 30):
        nearest = distances[:, chosen[:k]].min(1).values
        assert math.isclose(float(nearest[chosen[k]]), float(nearest.max()), rel_tol=1e-5)


def test_far_clusters_all_get_a_centre_however_small_they_are():
    features = torch.cat([torch.randn(200, 3), torch.randn(2, 3) + 100, torch.randn(1, 3) - 100])
    chosen = k_center(features, 3)
    assert {place < 200 for place in chosen} == {True, False}
    assert {*chosen} & {200, 201}
    assert 202 in chosen


@pytest.mark.parametrize("seed", range(3))
def test_moving_and_turning_all_points_does_not_change_the_centres(seed):
    features = points(25, 4, seed)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
    assert k_center(2 * features @ turn + 5, 10) == k_center(features, 10)


# both


@pytest.mark.parametrize("ranking", [herding, k_center])
@pytest.mark.parametrize("seed", range(3))
def test_every_beginning_of_a_ranking_is_the_ranking_of_that_length(ranking, seed):
    features = points(24, 5, seed)
    whole = ranking(features, 24)
    for count in range(25):
        assert ranking(features, count) == whole[:count]


@pytest.mark.parametrize("ranking", [herding, k_center])
def test_order_of_the_samples_does_not_matter(ranking):
    features = points(20, 5, 7)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert [int(order[place]) for place in ranking(features[order], 20)] == ranking(features, 20)


@pytest.mark.parametrize("ranking", [herding, k_center])
@pytest.mark.parametrize(
    "features",
    [
        torch.ones(6, 3),
        torch.zeros(6, 3),
        torch.eye(3).repeat(2, 1),
        torch.full((6, 3), 1e-30),
        torch.tensor([[math.nan] * 3, *[[1.0, 2.0, 3.0]] * 5]),
    ],
    ids=["equal", "zero", "twice", "tiny", "not a number"],
)
def test_each_sample_is_ranked_once_whatever_it_is(ranking, features):
    assert sorted(ranking(features, 6)) == list(range(6))
    assert sorted(ranking(features, 100)) == list(range(6))


@pytest.mark.parametrize("ranking", [herding, k_center])
def test_nothing_is_chosen_from_nothing(ranking):
    assert ranking(torch.empty(0, 4), 3) == []
    assert ranking(torch.ones(4, 4), 0) == []


@pytest.mark.parametrize("ranking", [herding, k_center])
def test_half_precision_features_are_ranked_in_single_precision(ranking):
    features = points(30, 8, 4).bfloat16()
    assert ranking(features, 30) == ranking(features.float(), 30)
    before = features.clone()
    ranking(features, 30)
    assert torch.equal(features, before)
