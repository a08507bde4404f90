"""Merging of task vectors against short references in numpy, closed forms, and what must not matter."""

import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_cl.functional import accumulate, merge, task_vector
from lightning_cl.functional.merge import METHODS, combine, dare, generator_of, magmax, ties, trim

SHAPES = {"weight": (5, 3), "bias": (4,), "scale": ()}


def normal(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in SHAPES.items()}


def whole_numbers(seed, shape=(5, 3)):
    """Small integers: equal magnitudes, zeros, and sums of exactly 0 are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).double()


def ties_by_hand(vectors, density):
    """One entry after the other, with sorting by magnitude and index."""
    trimmed = []
    for vector in vectors:
        flat = vector.numpy().ravel()
        keep = max(1, math.floor(density * flat.size + 0.5))
        order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))[:keep]
        trimmed.append([flat[i] if i in order else 0.0 for i in range(flat.size)])
    result = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [x for x in entries if x * sign > 0]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(result).reshape(vectors[0].shape)


def magmax_by_hand(vectors):
    flat = [vector.numpy().ravel() for vector in vectors]
    return np.array([max(entries, key=lambda x: (abs(x), x)) for entries in zip(*flat, strict=True)])


# task vectors, mean, arithmetic


def test_a_task_vector_leads_from_start_to_end():
    start, end = normal(0), normal(1)
    vector = task_vector(start, end)
    for name in SHAPES:
        torch.testing.assert_close(vector[name], end[name] - start[name], rtol=0, atol=0)


def test_a_task_vector_keeps_what_sixteen_bits_would_lose():
    """1.0078125 − 0.000030518 in bf16 has 8 digits; the difference of 16-bit numbers in fp32 is exact."""
    start, end = (torch.tensor([x], dtype=torch.bfloat16) for x in (2**-15, 1.0078125))
    (found,) = task_vector({"w": start}, {"w": end}).values()
    assert found.dtype == torch.float32
    assert found.item() == 1.0078125 - 2**-15


def test_frozen_weights_of_the_start_are_no_part():
    start = normal(2)
    assert list(task_vector(start, {"bias": start["bias"] + 1})) == ["bias"]


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_of_one_task_is_that_task(method):
    start, end = normal(3), normal(4)
    merged = merge(start, [task_vector(start, end)], method, density=1.0)
    torch.testing.assert_close(merged, end, rtol=1e-12, atol=1e-12)


def test_mean_and_arithmetic_are_their_formulas():
    base, vectors = normal(5), [normal(6), normal(7), normal(8)]
    for name in SHAPES:
        total = sum(vector[name].numpy() for vector in vectors)
        np.testing.assert_allclose(merge(base, vectors)[name], base[name].numpy() + total / 3)
        np.testing.assert_allclose(merge(base, vectors, scale=0.7)[name], base[name].numpy() + 0.7 * total / 3)
        np.testing.assert_allclose(merge(base, vectors, "arithmetic", 0.4)[name], base[name].numpy() + 0.4 * total)


def test_the_mean_of_sequential_tasks_is_the_mean_of_their_ends():
    base = normal(9)
    ends = [normal(10), normal(11)]
    merged = merge(base, [task_vector(base, end) for end in ends])
    torch.testing.assert_close(merged, {n: (ends[0][n] + ends[1][n]) / 2 for n in SHAPES})


# TIES


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_ties_is_the_algorithm_of_the_paper(tasks, density):
    for seed in range(20):
        vectors = [whole_numbers(100 * seed + task) for task in range(tasks)]
        np.testing.assert_array_equal(ties(vectors, density).numpy(), ties_by_hand(vectors, density))


@pytest.mark.parametrize(
    ("density", "kept"), [(0.001, 1), (1 / 30, 1), (0.1, 2), (0.2, 3), (0.5, 8), (0.29, 4), (0.99, 15), (1.0, 15)]
)
def test_the_density_of_fifteen_entries_is_rounded_to_the_nearest_and_at_least_one(density, kept):
    vector = torch.arange(1.0, 16.0).reshape(5, 3)
    trimmed = trim(vector, density)
    assert (trimmed != 0).sum() == kept
    assert torch.equal(trimmed[trimmed != 0], vector.flatten()[15 - kept :])


def test_of_equal_magnitudes_the_first_stay():
    assert trim(torch.tensor([1.0, -1.0, 1.0, -2.0, 1.0]), 0.6).tolist() == [1.0, -1.0, 0.0, -2.0, 0.0]


def test_a_sum_of_zero_elects_the_positive_sign():
    vectors = [torch.tensor([2.0, -1.0, 0.0]), torch.tensor([-2.0, 1.0, 0.0])]
    assert ties(vectors, 1.0).tolist() == [2.0, 1.0, 0.0]


def test_ties_with_equal_signs_and_full_density_is_the_mean():
    vectors = [normal(seed)["weight"].abs() for seed in range(4)]
    torch.testing.assert_close(ties(vectors, 1.0), combine(vectors, "mean"))


def test_ties_is_that_of_peft_where_both_keep_the_same_number():
    peft = pytest.importorskip("peft.utils.merge_utils")
    for seed in range(5):
        vectors = [normal(10 * seed + task, torch.float32)["weight"] for task in range(3)]
        for density in (0.2, 0.6):  # 3 and 9 of 15 entries
            expected = peft.ties(vectors, torch.ones(3), density)
            torch.testing.assert_close(ties(vectors, density), expected)


# DARE


def test_dare_keeps_an_entry_enlarged_or_drops_it():
    vector = normal(12)["weight"]
    found = dare(vector, 0.25, generator_of(0, 0, "w"))
    stays = found != 0
    torch.testing.assert_close(found[stays], 4 * vector[stays], rtol=1e-12, atol=0)
    assert 0 < stays.sum() < stays.numel()


def test_dares_expectation_is_the_vector_and_its_variance_the_bernoullis():
    """With 4,000 draws the mean is within 5 standard errors, √((1 − p) / p / 4000) · |τ|."""
    vector, p, draws = normal(13)["weight"], 0.3, 4000
    generator = torch.Generator().manual_seed(1)
    found = torch.stack([dare(vector, p, generator) for _ in range(draws)])
    error = math.sqrt((1 - p) / p / draws) * vector.abs()
    assert ((found.mean(0) - vector).abs() < 5 * error).all()
    torch.testing.assert_close(found.var(0), (1 - p) / p * vector.square(), rtol=0.2, atol=0)


def test_dare_at_full_density_keeps_every_bit_and_draws_nothing():
    vector = normal(14, torch.float32)["weight"]
    generator = torch.Generator().manual_seed(2)
    before = generator.get_state()
    assert torch.equal(dare(vector, 1.0, generator), vector)
    assert torch.equal(generator.get_state(), before)


def test_dare_draws_by_seed_task_and_name():
    vectors = [{"a": torch.ones(1000), "b": torch.ones(1000)}] * 2
    base = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    merged = merge(base, vectors, "dare", seed=3)
    again = merge(base, vectors, "dare", seed=3)
    torch.testing.assert_close(merged, again, rtol=0, atol=0)
    assert set(merged["a"].tolist()) == {0.0, 1.0, 2.0}  # the two tasks drop different entries
    assert not torch.equal(merged["a"], merged["b"])
    assert not torch.equal(merged["a"], merge(base, vectors, "dare", seed=4)["a"])


def test_dare_leaves_the_random_state_of_others_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    merge(normal(15), [normal(16)], "dare")
    assert torch.equal(torch.get_rng_state(), before)


# MagMax


def test_magmax_takes_the_largest_magnitude():
    for seed in range(20):
        vectors = [whole_numbers(100 * seed + task) for task in range(4)]
        np.testing.assert_array_equal(magmax(vectors).numpy().ravel(), magmax_by_hand(vectors))


def test_magmax_does_not_see_the_order_of_tasks():
    vectors = [whole_numbers(task) for task in range(3)]
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        assert torch.equal(magmax([vectors[i] for i in order]), magmax(vectors))


# what holds for all


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_names_does_not_matter(method):
    base, vectors = normal(17), [normal(18), normal(19)]
    turned = [dict(reversed(vector.items())) for vector in vectors]
    expected = merge(base, vectors, method, seed=5)
    for found in (merge(base, turned, method, seed=5), merge(dict(reversed(base.items())), vectors, method, seed=5)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    alone = merge(base, [{"bias": vector["bias"]} for vector in vectors], method, seed=5)
    torch.testing.assert_close(alone, {"bias": expected["bias"]}, rtol=0, atol=0)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dare"])
def test_the_order_of_tasks_does_not_matter(method):
    base, vectors = normal(20), [normal(21), normal(22), normal(23)]
    torch.testing.assert_close(merge(base, vectors, method), merge(base, vectors[::-1], method), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are(method):
    base, vectors = normal(24, torch.float32), [normal(25, torch.float32), normal(26, torch.float32)]
    before = [{n: t.clone() for n, t in tensors.items()} for tensors in (base, *vectors)]
    merge(base, vectors[:1], method, scale=0.5)
    merge(base, vectors, method, scale=0.5)
    accumulate(accumulate(None, vectors[0], "mean"), vectors[1], "mean")
    torch.testing.assert_close([base, *vectors], before, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bit_weights_are_merged_in_fp32_and_rounded_once(method):
    """64 vectors of 2⁻¹²: a sum in bf16 would be right, one onto a weight of 1 in bf16 would stay 1."""
    base = {"w": torch.ones(5, 3, dtype=torch.bfloat16)}
    vectors = [{"w": torch.full((5, 3), 2**-12, dtype=torch.bfloat16)}] * 64
    scale = {"arithmetic": 1.0, "dare": 32.0}.get(method, 64.0)
    exact = 1 + scale * combine([v["w"].double() for v in vectors], method, 0.5, 0, "w")
    if method not in ("ties", "dare"):
        assert (exact == 1 + 2**-6).all()
    (found,) = merge(base, vectors, method, scale).values()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_magnitudes_are_compared_in_the_precision_of_the_vectors():
    """Task vectors of bf16 weights are fp32: 1 and 1 + 2⁻¹⁰ are the same number in bf16."""
    vectors = [{"w": torch.tensor([1 + 2**-10])}, {"w": torch.tensor([-1.0])}]
    assert merge({"w": torch.zeros(1, dtype=torch.bfloat16)}, vectors, "magmax")["w"].item() == 1.0
    assert merge({"w": torch.zeros(1, dtype=torch.bfloat16)}, vectors, "ties")["w"].item() == 1.0


def test_vectors_may_be_read_one_tensor_at_a_time():
    """A mapping that opens files: each tensor is asked for once."""

    class Lazy(dict):
        asked = 0

        def __getitem__(self, name):
            Lazy.asked += 1
            return super().__getitem__(name)

    base, vectors = normal(27), [Lazy(normal(28)), Lazy(normal(29))]
    merge(base, vectors, "ties")
    assert Lazy.asked == 2 * len(SHAPES)


# the running merge


@pytest.mark.parametrize("method", ["mean", "arithmetic", "magmax"])
def test_the_running_merge_is_the_merge_of_all(method):
    base, vectors = normal(30), [normal(31), normal(32), normal(33)]
    total = None
    for count, vector in enumerate(vectors, start=1):
        total = accumulate(total, vector, method)
        as_one = ("magmax", 0.5) if method == "magmax" else ("arithmetic", 0.5 / (count if method == "mean" else 1))
        expected = merge(base, vectors[:count], method, scale=0.5)
        torch.testing.assert_close(merge(base, [total], *as_one), expected, rtol=1e-12, atol=1e-12)


def test_the_running_merge_is_kept_in_fp32():
    total = None
    for _ in range(300):  # in bf16 the sum would stop at 256
        total = accumulate(total, {"w": torch.ones(1, dtype=torch.bfloat16)}, "mean")
    assert total["w"].dtype == torch.float32
    assert total["w"].item() == 300


def test_the_running_merge_does_not_follow_the_first_vector():
    vector = normal(34)
    total = accumulate(None, vector, "magmax")
    vector["bias"] += 1
    assert not torch.equal(total["bias"], vector["bias"])


# refusals


def test_arguments_out_of_range_are_refused():
    base, vectors = normal(35), [normal(36)]
    with pytest.raises(ValueError, match="method: 'sum', expected one of mean, arithmetic, ties, dare, magmax"):
        merge(base, vectors, "sum")
    for density in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"density: .*expected a number above 0 and up to 1"):
            merge(base, vectors, "ties", density=density)
    with pytest.raises(ValueError, match="scale: inf, expected a finite number"):
        merge(base, vectors, scale=math.inf)
    with pytest.raises(ValueError, match="task_vectors: empty, expected at least one"):
        merge(base, [])
    with pytest.raises(ValueError, match="method: 'ties' has no running form"):
        accumulate(None, vectors[0], "ties")


def test_names_that_differ_are_refused():
    base, vector = normal(37), normal(38)
    less = {"bias": vector["bias"]}
    with pytest.raises(ValueError, match=r"task_vectors\[1\]: 'scale' is not in all task vectors"):
        merge(base, [vector, less])
    with pytest.raises(ValueError, match="base: no tensor 'weight', expected all names"):
        merge({"bias": base["bias"]}, [vector])
    with pytest.raises(ValueError, match="start: no tensor 'weight'"):
        task_vector(less, vector)
    with pytest.raises(ValueError, match="vector: no tensor 'scale'"):
        accumulate(vector, less, "mean")


def test_a_vocabulary_of_another_size_is_refused():
    base, vector = {"embed": torch.zeros(10, 2)}, {"embed": torch.zeros(12, 2)}
    with pytest.raises(
        ValueError, match=r"task_vectors\[0\]\[embed\]: shape \[12, 2\], expected \[10, 2\] as in `base`"
    ):
        merge(base, [vector])
    with pytest.raises(ValueError, match=r"end\[embed\]: shape"):
        task_vector(base, vector)
    with pytest.raises(ValueError, match=r"vector\[embed\]: shape"):
        accumulate(base, vector, "magmax")


def test_whole_numbers_are_refused():
    """The weights of quantised layers, and counters."""
    packed = {"w": torch.zeros(2, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"end\[w\]: type torch\.uint8, expected floating-point numbers"):
        task_vector(packed, packed)


def test_ties_refuses_nan_by_its_own_name():
    with pytest.raises(ValueError, match="NaN"):
        merge({"w": torch.zeros(2)}, [{"w": torch.tensor([math.nan, 1.0])}], "ties")


# parts of parameters


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_merged_entry_by_entry_or_refused(mesh):
    """To choose the largest, or to draw, a process would have to see the whole."""
    whole = [{"weight": normal(seed)["weight"]} for seed in range(40, 43)]
    sharded = [{"weight": distribute_tensor(tensors["weight"], mesh, [Shard(0)])} for tensors in whole]
    for method in ("mean", "arithmetic", "magmax"):
        found = merge(sharded[0], sharded[1:], method)["weight"].full_tensor()
        torch.testing.assert_close(found, merge(whole[0], whole[1:], method)["weight"], rtol=0, atol=0)
    for method in ("ties", "dare"):
        with pytest.raises(ValueError, match="a sharded tensor, expected a whole one"):
            merge(sharded[0], sharded[1:], method)
