"""The benchmark of published results: what a seed draws, what strengths are chosen on, and the state of Adam."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import known_results

sys.path.pop(0)


def _pictures(number, seed):
    """Images whose pixels are their own positions plus a thousandth of the image's number, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number)[torch.randperm(number, generator=generator)] % 10
    return torch.arange(784.0) + torch.arange(number)[:, None] / 1000, labels


def _numbers(context):
    """The numbers of a context's images."""
    images, _ = context.tensors()
    return [round(1000 * (row.min().item() % 1)) for row in images]


def test_a_seed_draws_the_classes_that_meet_and_test_images_follow():
    found = {}
    for seed in (2, 3):
        places = []
        for images, labels in (_pictures(200, 0), _pictures(100, 1)):
            of_class = {}
            for number, context in enumerate(known_results.contexts("split", 5, images, labels, seed)):
                for image, label in zip(_numbers(context), context.tensors()[1].tolist(), strict=True):
                    of_class.setdefault(labels[image].item(), set()).add((number, label))
            places.append(of_class)
        assert places[0] == places[1]
        drawn = [place for (place,) in (places[0][label] for label in range(10))]
        assert sorted(drawn) == [(number, label) for number in range(5) for label in (0, 1)]
        found[seed] = drawn
    assert found[2] != found[3]


def test_a_seed_draws_the_order_of_pixels_and_test_images_follow():
    orders = {}
    for seed in (2, 3):
        parts = [known_results.contexts("permuted", 3, *_pictures(*data), seed) for data in ((20, 0), (10, 1))]
        for train, test in zip(*parts, strict=True):
            order = train[0][0].long()
            assert torch.equal(order, test[0][0].long())
            assert torch.equal(order.sort().values, torch.arange(784))
            assert torch.equal(train.tensors()[0][5], train[5][0])
            orders[tuple(order.tolist())] = seed
    assert len(orders) == 6


@pytest.mark.parametrize("kind", ["split", "permuted"])
def test_strengths_are_chosen_on_images_that_were_not_trained_on(kind):
    data = _pictures(400, 0)
    parts = {part: known_results.contexts(kind, 5, *data, 1, part) for part in ("all", "train", "held out")}
    for whole, train, held_out in zip(*parts.values(), strict=True):
        assert set(_numbers(train)) | set(_numbers(held_out)) == set(_numbers(whole))
        assert not set(_numbers(train)) & set(_numbers(held_out))
        assert len(held_out) == len(whole) // 10


def _write_idx(folder, kind, number):
    images, labels = _pictures(number, 0)
    for part, header, values in (
        ("images-idx3-ubyte", 16, images.int() % 256),
        ("labels-idx1-ubyte", 8, labels),
    ):
        content = bytes(header) + values.numpy().astype(np.uint8).tobytes()
        (folder / f"{kind}-{part}").write_bytes(content)


def test_a_search_reads_no_test_images_and_repeats_no_run(tmp_path, monkeypatch, capsys):
    _write_idx(tmp_path, "train", 100)  # there are no test images
    out = tmp_path / "out.jsonl"
    sizes = ["contexts=2", "iterations=2", "hidden=8", "batch_size=8", "search_contexts=2"]
    given = [f"folder={tmp_path}", f"out={out}", *sizes, "only=none;SI", "search=true"]
    monkeypatch.setattr(sys, "argv", ["known_results.py", *given])
    known_results.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    base = known_results.read_settings(given).methods.SI.strength.split
    assert [line["arguments"]["strength"] / base for line in lines] == pytest.approx([0.1, 1, 10])
    assert {(line["method"], line["seed"]) for line in lines} == {("SI", 1)}
    monkeypatch.setattr(known_results, "run", lambda *given: pytest.fail("a run was repeated"))
    known_results.main()
    assert capsys.readouterr().out.count("SI") == 6
    monkeypatch.setattr(sys, "argv", ["known_results.py", *given[:-1]])
    with pytest.raises(FileNotFoundError, match="t10k"):
        known_results.main()


@pytest.mark.parametrize(("reset", "steps"), [(False, 6), (True, 3)])
def test_adam_keeps_its_state_from_context_to_context(monkeypatch, reset, steps):
    modules, seen = [], []
    step = known_results.MLP.training_step
    monkeypatch.setattr(
        known_results.MLP, "training_step", lambda *given: seen.append(len(given[1][0])) or step(*given)
    )
    monkeypatch.setattr(
        known_results, "MLP", lambda *given, made=known_results.MLP: modules.append(made(*given)) or modules[-1]
    )
    given = ["hidden=8", "batch_size=8", "iterations=3", f"reset_optimizer={reset}"]
    data = known_results.contexts("split", 2, *_pictures(240, 0), 2)
    result = known_results.run(known_results.read_settings(given), {}, 2, data, data)
    (module,) = modules
    assert seen == [8] * 6
    assert {int(state["step"]) for state in module.adam.state.values()} == {steps}
    assert result["accuracy"] == pytest.approx(sum(known_results.accuracy(module, one) for one in data) / 2)


def test_every_method_of_the_configuration_trains_and_is_idle_at_strength_0(monkeypatch):
    modules = []
    monkeypatch.setattr(
        known_results, "MLP", lambda *given, made=known_results.MLP: modules.append(made(*given)) or modules[-1]
    )
    settings = known_results.read_settings(["hidden=8", "batch_size=8", "iterations=3", "protocol=split"])
    data = known_results.contexts("split", 2, *_pictures(120, 0), 2)
    weights = {}
    for name, method in known_results.OmegaConf.to_container(settings.methods).items():
        arguments = known_results.of_protocol(method, "split")
        idle = {"DER++": {"alpha": 0.0}}.get(name, {"strength": 0.0} if "strength" in arguments else None)
        for changed in ({}, *([idle] if idle else [])):
            known_results.run(settings, arguments | changed, 2, data, data)
            flat = torch.cat([p.detach().flatten() for p in modules[-1].parameters()])
            weights[name, bool(changed)] = flat
            assert flat.isfinite().all()
    for (name, idle), flat in weights.items():
        if idle:
            assert torch.equal(flat, weights["replay" if name == "DER++" else "none", False]), name
        elif name not in ("none", "A-GEM"):  # no gradients are at odds here
            assert not torch.equal(flat, weights["none", False]), name
