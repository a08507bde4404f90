"""Importance in 16 bits or in the machine's memory: the same training, exact anchors, half of the bytes."""

from __future__ import annotations

import pytest
import torch
from regularized import (
    TASKS,
    AtStep,
    Ends,
    Growing,
    adamw,
    assert_each,
    assert_same,
    fit,
    logits_of,
    plain_fit,
    seeded,
    weights,
)

from lightning_cl import EWC, KFACEWC, L2SP, MAS, SI, RWalk

METHODS = {
    "MAS": lambda **s: MAS(1.0, outputs=logits_of, **s),
    "EWC": lambda **s: EWC(1.0, outputs=logits_of, **s),
    "separate EWC": lambda **s: EWC(1.0, outputs=logits_of, mode="separate", **s),
    "RWalk": lambda **s: RWalk(1.0, every=3, **s),
    "SI": lambda **s: SI(1.0, **s),
}
ON_CPU = METHODS | {
    "L2SP": lambda **s: L2SP(3.0, **s),
    "KFACEWC": lambda **s: KFACEWC(0.1, outputs=logits_of, **s),
}
both_modes = pytest.mark.parametrize("apply", ["gradient", "proximal"])
pytestmark = pytest.mark.filterwarnings("ignore")


def run(root, make, apply, **settings):
    method, ends = make(apply=apply, **settings), Ends()
    module = fit(root, [method, ends], seeded(optimizer=adamw))
    return method, module, ends


@both_modes
@pytest.mark.parametrize("name", METHODS)
def test_importance_in_bf16_trains_the_same_up_to_rounding(tmp_path, name, apply):
    full, module, ends = run(tmp_path / "1", METHODS[name], apply)
    half, other, other_ends = run(tmp_path / "2", METHODS[name], apply, state_dtype="bfloat16")
    # The first task is free: its importance is the same but for the rounding, of 2^-9.
    assert_same(other_ends.weights[0], ends.weights[0], rtol=0, atol=0)
    assert_same(weights(other), weights(module), rtol=0, atol=2e-3)
    assert {v.dtype for v in half.importance.values()} == {torch.bfloat16}
    assert {v.dtype for v in full.importance.values()} == {torch.float32}
    if name != "separate EWC":
        assert_same(half.anchor, other_ends.weights[1], rtol=0, atol=0)  # exact, in the parameters' own type
    assert {v.dtype for v in half.anchor.values()} == {torch.float32}
    way = max((ends.weights[1][n] - ends.weights[0][n]).abs().max().item() for n in ends.weights[0])
    assert way > 1e-2  # and there was something to hold


@pytest.mark.parametrize("name", METHODS)
def test_bf16_is_a_rounding_of_the_importance(tmp_path, name):
    kept = []
    for state_dtype in ("float32", "bfloat16"):
        method = METHODS[name](state_dtype=state_dtype)
        fit(tmp_path, [method], tasks={"a": TASKS["a"]})
        kept.append({n: v.float() for n, v in method.importance.items()})
    assert_same(kept[1], {n: v.bfloat16().float() for n, v in kept[0].items()}, rtol=2**-8, atol=0)
    assert any((kept[1][n] != kept[0][n]).any() for n in kept[0])


def test_importance_of_many_tasks_adds_up_in_bf16_too(tmp_path):
    # What rounding does to a sum grows with the number of tasks, and is small for six.
    method, exact = (SI(0.0, state_dtype=dtype, normalize=True) for dtype in ("bfloat16", "float32"))
    tasks = {f"t{i}": TASKS["a"] for i in range(6)}
    fit(tmp_path, [method, exact], tasks=tasks, max_epochs=1)
    assert_each({n: v.float() for n, v in method.importance.items()}, exact.importance, 0.02)


@pytest.mark.parametrize(("name", "bytes_"), [("MAS", 6), ("EWC", 6), ("RWalk", 14), ("SI", 6)])
def test_bf16_saves_two_bytes_per_parameter(tmp_path, name, bytes_):
    # What is kept from task to task: importance and anchor, and RWalk's F and s.
    for state_dtype, expected in (("float32", bytes_ + 2), ("bfloat16", bytes_)):
        method, module, _ = run(tmp_path, METHODS[name], "gradient", state_dtype=state_dtype)
        count = sum(p.numel() for p in module.parameters())
        assert method.state_bytes() == expected * count


@both_modes
@pytest.mark.parametrize("name", ON_CPU)
def test_state_on_the_cpu_trains_the_same_bit_for_bit(tmp_path, name, apply):
    there, module, _ = run(tmp_path / "1", ON_CPU[name], apply)
    here, other, ends = run(tmp_path / "2", ON_CPU[name], apply, state_device="cpu")
    assert_same(weights(other), weights(module), rtol=0, atol=0)
    assert_same(dict(here.importance), dict(there.importance), rtol=0, atol=0)
    assert_same(here.anchor, there.anchor, rtol=0, atol=0)
    if name != "separate EWC":
        assert_same(here.anchor, ends.weights[1], rtol=0, atol=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            one.add_(torch.randn_like(one))
            two.copy_(one)
    assert here.penalty(other) == pytest.approx(there.penalty(module), rel=1e-6)
    assert here.penalty(other) > 0


@both_modes
def test_both_at_once(tmp_path, apply):
    _, module, _ = run(tmp_path / "1", METHODS["MAS"], apply, state_dtype="bfloat16")
    both, other, _ = run(tmp_path / "2", METHODS["MAS"], apply, state_dtype="bfloat16", state_device="cpu")
    assert_same(weights(other), weights(module), rtol=0, atol=0)
    assert {(v.dtype, v.device.type) for v in both.importance.values()} == {(torch.bfloat16, "cpu")}


def test_the_anchor_of_bf16_weights_is_exact_and_has_their_type(tmp_path):
    method, module = MAS(1.0, outputs=lambda m, b: m(b[0].bfloat16())), seeded().bfloat16()
    module.forward = lambda x: module.net(x.bfloat16())
    fit(tmp_path, [method], module)
    assert_same(method.anchor, weights(module), rtol=0, atol=0)
    assert {v.dtype for v in method.anchor.values()} == {torch.bfloat16}
    assert {v.dtype for v in method.importance.values()} == {torch.float32}


@pytest.mark.parametrize("settings", [{"state_device": "cpu"}, {"state_dtype": "bfloat16"}], ids=str)
def test_a_grown_head_grows_its_state(tmp_path, settings):
    method, module = MAS(1.0, outputs=logits_of, **settings), seeded(Growing)
    plain_fit(tmp_path, [method], module, 1)
    before = method.importance["net.4.weight"].clone()
    module.widen_head()
    seen = {}
    look = AtStep(lambda m: seen.update(head=method.importance["net.4.weight"].clone()), task=0)
    plain_fit(tmp_path, [method, look], module, 2)
    assert torch.equal(seen["head"][:3], before)
    assert not seen["head"][3:].any()


@pytest.mark.parametrize("setting", [{"state_dtype": "float16"}, {"state_device": "cuda"}])
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MAS(**setting)
