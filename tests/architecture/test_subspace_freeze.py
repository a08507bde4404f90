"""Weights that stay where they are in their leading directions: in a Trainer, with AdamW and weight decay."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from adapting import IDS, VOCABULARY, logits, peft_model
from lightning.pytorch.callbacks import ModelCheckpoint
from regularized import Ends, SomebodysLM, adamw, fit, seeded, weights
from torch.utils.data import Dataset
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, Interpolate, SubspaceFreeze, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ("net.0", "net.4")


def leading(weight, share):
    """Bases of the leading directions on both sides, by numpy in fp64."""
    u, _, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    k = int(share * min(weight.shape))
    return torch.from_numpy(u[:, :k]), torch.from_numpy(vt[:k].T)


def drift(before, after, share):
    """How far the protected part has moved, and the rest."""
    change, (u, v) = (after - before).double(), leading(before, share)
    return max((u.T @ change).abs().max(), (change @ v).abs().max()).item(), change.abs().max().item()


class EveryStep(L.Callback):
    """The weights after each step, as the method leaves them."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(weights(pl_module))


@pytest.mark.parametrize("others", ["frozen", "trained"])
def test_the_protected_part_does_not_move_in_any_step(tmp_path, others):
    ends, steps, method = Ends(), EveryStep(), SubspaceFreeze(0.5, others=others)
    fit(tmp_path, [method, ends, steps], module=seeded(optimizer=adamw), max_epochs=10)
    per_task = len(steps.steps) // 2
    assert per_task >= 60
    for i, after in enumerate(steps.steps):
        for name in LAYERS:
            before = ends.starts[i // per_task][f"{name}.weight"]
            assert drift(before, after[f"{name}.weight"], 0.5)[0] < 2e-6
    for task in (0, 1):
        start, end = ends.starts[task], ends.weights[task]
        assert all(drift(start[f"{n}.weight"], end[f"{n}.weight"], 0.5)[1] > 1e-2 for n in LAYERS)
        moved = [not torch.equal(start[f"{n}.bias"], end[f"{n}.bias"]) for n in LAYERS]
        assert moved == [others == "trained"] * 2
    tasks = method.report()["tasks"]
    assert [tasks[t]["directions"] for t in "ab"] == [4 + 1] * 2
    assert tasks["a"]["bytes"] == 4 * (4 * (8 + 16 + 1) + 1 * (16 + 3 + 1))
    assert all(0 < tasks[t]["protected_share"] < 1e-6 for t in "ab")


def test_outputs_for_protected_inputs_stay(tmp_path):
    module = seeded(optimizer=adamw)
    start = module.net[0].weight.detach().clone()
    fit(tmp_path, [SubspaceFreeze(0.5)], module=module, tasks={"a": classification(1)})
    v = leading(start, 0.5)[1].float()
    torch.testing.assert_close(module.net[0].weight @ v, start @ v, atol=2e-6, rtol=0)


def test_a_share_of_zero_is_plain_training_bit_for_bit(tmp_path):
    plain = weights(fit(tmp_path / "plain", [], module=seeded(optimizer=adamw)))
    zero = weights(fit(tmp_path / "zero", [SubspaceFreeze(0.0, others="trained")], module=seeded(optimizer=adamw)))
    assert all(torch.equal(p, zero[n]) for n, p in plain.items())
    frozen = seeded(optimizer=adamw)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    kept = weights(fit(tmp_path / "by-hand", [], module=frozen))
    module = fit(tmp_path / "frozen", [SubspaceFreeze(0.0)], module=seeded(optimizer=adamw))
    assert all(torch.equal(p, kept[n]) for n, p in weights(module).items())
    assert all(p.requires_grad for p in module.parameters())  # as it was before the sequence


def test_a_share_of_one_freezes_and_shares_can_differ_by_task(tmp_path):
    ends = Ends()
    method = SubspaceFreeze([0.5, 1.0])
    fit(
        tmp_path,
        [method, ends],
        module=seeded(optimizer=adamw),
        tasks={n: classification(i) for i, n in enumerate("abc")},
    )
    assert [drift(ends.starts[0][f"{n}.weight"], ends.weights[0][f"{n}.weight"], 0.5)[1] > 1e-3 for n in LAYERS] == [
        True
    ] * 2
    for task in (1, 2):
        for n in LAYERS[1:]:  # as many directions as outputs: nothing is left
            torch.testing.assert_close(
                ends.weights[task][f"{n}.weight"], ends.starts[task][f"{n}.weight"], atol=2e-6, rtol=0
            )
    assert [e["share"] for e in method.history.values()] == [0.5, 1.0, 1.0]


def test_projecting_less_often_ends_within_bounds_too(tmp_path):
    ends, often = Ends(), SubspaceFreeze(0.5, every=4)
    module = fit(
        tmp_path, [often, ends], module=seeded(optimizer=adamw), tasks={"a": classification(1, 56)}, max_epochs=1
    )
    for name in LAYERS:
        unprojected = drift(ends.starts[0][f"{name}.weight"], ends.weights[0][f"{name}.weight"], 0.5)[0]
        assert unprojected > 1e-4  # seven steps: three since the last projection
        assert drift(ends.starts[0][f"{name}.weight"], weights(module)[f"{name}.weight"], 0.5)[0] < 2e-6
    assert 0 < often.history["a"]["protected_share"] < 1e-6


def test_accumulated_batches_are_one_batch(tmp_path):
    whole = fit(tmp_path / "1x8", [SubspaceFreeze(0.5)], module=seeded(optimizer=adamw), batch_size=8)
    parts = fit(
        tmp_path / "2x4", [SubspaceFreeze(0.5)], module=seeded(optimizer=adamw), batch_size=4, accumulate_grad_batches=2
    )
    for name, parameter in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("others", [lambda: [EWC(50.0, samples=8, apply="proximal")], lambda: [SI(1.0)]])
def test_penalties_pull_outside_of_the_protected_part_whatever_the_order(tmp_path, others):
    found = []
    for order in (1, -1):
        ends = Ends()
        module = fit(
            tmp_path / str(order), [*[*others(), SubspaceFreeze(0.5)][::order], ends], module=seeded(optimizer=adamw)
        )
        for task in (0, 1):
            for n in LAYERS:
                assert drift(ends.starts[task][f"{n}.weight"], ends.weights[task][f"{n}.weight"], 0.5)[0] < 2e-6
        found.append(weights(module))
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items())


def test_interpolation_keeps_the_protected_part(tmp_path):
    ends = Ends()
    module = fit(tmp_path, [Interpolate(0.5, during=0.5), SubspaceFreeze(0.5), ends], tasks={"a": classification(1)})
    for n in LAYERS:
        assert drift(ends.starts[0][f"{n}.weight"], weights(module)[f"{n}.weight"], 0.5)[0] < 2e-6


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def run(root, ckpt_path=None, names="ab"):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        saver = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [SubspaceFreeze([0.3, 0.5], targets=["net.0"], every=2), TaskMatrix(), saver]
        data = TaskDataModule({name: classification(i, 24) for i, name in enumerate(names)}, batch_size=8)
        fit_tasks(trainer(root, callbacks, max_epochs=1), module, data, ckpt_path)
        return weights(module), callbacks

    whole, callbacks = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 6
    for number, path in enumerate(checkpoints):
        again, others = run(tmp_path / f"again-{number}", path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert torch.equal(callbacks[1].matrix, others[1].matrix), path
    longer, _ = run(tmp_path / "longer", names="abc")
    last = max(checkpoints, key=lambda path: path.stat().st_mtime)
    added, _ = run(tmp_path / "added", last, names="abc")
    assert all(torch.equal(longer[n], added[n]) for n in longer), last


# ---------------------------------------------------------------------- language models


class Tokens(Dataset):
    def __init__(self, seed, count=8):
        self.ids = torch.randint(0, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.ids[i]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_language_model_the_layers_but_not_the_head(tmp_path, kind):
    """GPT-2 stores its weights as [in, out], and has biases everywhere."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2} if kind == "gpt2" else {}
    torch.manual_seed(0)
    module = SomebodysLM(kind=kind, tie=False, vocab_size=VOCABULARY, **sizes)
    start = weights(module)
    method = SubspaceFreeze(0.25)
    fit(tmp_path, [method], module=module, tasks={"a": Tokens(1)}, batch_size=4)
    end = weights(module)
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    expected = {n for n in start if n.endswith("weight") and any(w in n for w in ("_proj", "c_attn", "c_fc"))}
    assert moved == expected
    assert method.history["a"]["layers"] == len(expected)
    for name in expected:
        transpose = (lambda x: x.T) if kind == "gpt2" else (lambda x: x)
        assert drift(transpose(start[name]), transpose(end[name]), 0.25)[0] < 2e-6


class Adapted(SomebodysLM):
    def __init__(self, **lora):
        L.LightningModule.__init__(self)
        self.lr, self.optimizer, self.model = 1e-2, torch.optim.AdamW, peft_model(**lora)


def test_a_lora_is_kept_out_of_the_frozen_weights_directions(tmp_path):
    torch.manual_seed(0)
    module = Adapted()
    start = logits(module.model)
    method = SubspaceFreeze(0.5)
    fit(tmp_path, [method], module=module, tasks={"a": Tokens(1), "b": Tokens(2)}, batch_size=4)
    assert not torch.allclose(logits(module.model, IDS), start, atol=1e-3)
    for layer in (part for part in module.model.modules() if hasattr(part, "base_layer")):
        delta = layer.get_delta_weight("default").detach().double()
        u, v = leading(layer.base_layer.weight.detach(), 0.5)
        assert delta.abs().max() > 1e-3
        assert max((u.T @ delta).abs().max(), (delta @ v).abs().max()) < 1e-6
    assert method.history["b"]["protected_share"] < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.5}, "share=1.5"),
        ({"share": []}, r"share=\[\]"),
        ({"share": [0.5, -1]}, r"share\[1\]=-1"),
        ({"targets": "q_proj"}, "targets='q_proj'"),
        ({"others": "free"}, "others='free'"),
        ({"every": 0}, "every=0"),
    ],
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        SubspaceFreeze(**settings)


@pytest.mark.parametrize(
    ("method", "module", "words"),
    [
        (SubspaceFreeze(0.2), Classifier, r"net.4: share: 0.2 of 3 directions is less than one"),
        (SubspaceFreeze(targets=["q_proj"]), Classifier, "no linear layer called 'q_proj'"),
        (SubspaceFreeze([0.3, 0.5]), Adapted, "expected one share"),
        (SubspaceFreeze(0.5), lambda: Adapted(use_dora=True), "expected plain LoRA"),
    ],
)
def test_modules_that_do_not_fit_are_refused_before_training(tmp_path, method, module, words):
    with pytest.raises(Exception, match=words):
        fit(tmp_path, [method], module=module())


def test_two_methods_that_decide_what_trains_are_refused(tmp_path):
    with pytest.raises(Exception, match="both want the trainable parameters"):
        fit(tmp_path, [SubspaceFreeze(0.5), SubspaceFreeze(0.4)])
