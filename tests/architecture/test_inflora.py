"""Adapters whose inputs lie outside of what earlier tasks gave their layers to read."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from summing import NAMES, Adapted, EachStep, Rows, assert_equal, data, run, state
from toys import trainer

from lightning_cl import InfLoRA, TaskMatrix
from lightning_cl.callbacks.architecture.summed_adapters import adapted_layers, down_projections
from lightning_cl.models.adapters import adapter_of, list_adapters
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


def moments_by_hand(module, dataset):
    """``Σ x xᵀ`` of the inputs of each layer with adapters, one sample at a time, without the library."""
    totals, handles = {}, []
    for path, layer in adapted_layers(module).items():

        def look(layer, args, path=path):
            x = torch.nn.functional.normalize(args[0].double(), dim=-1).flatten(0, 1)
            totals[path] = totals.get(path, 0) + x.T @ x

        handles.append(layer.register_forward_pre_hook(look))
    module.eval()
    with torch.no_grad():
        for sample in dataset:
            module.model(**{name: value[None] for name, value in sample.items()})
    for handle in handles:
        handle.remove()
    module.train()
    return totals


def leading(moment, count):
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :count]


def test_the_first_adapter_reads_the_leading_directions_of_its_task_and_stays(tmp_path):
    """The rows are those of the inputs before training; only the up projections train."""
    fresh = Adapted()
    steps = EachStep(lambda module: {n: p.detach().clone() for n, p in down_projections(module, "a").items()})
    module, _ = run(tmp_path, InfLoRA(scale=0.5), names=["a"], more=[steps], max_epochs=3)
    assert len(steps.seen) == 9
    for path, moment in moments_by_hand(fresh, Rows(0)).items():
        rows = down_projections(module, "a")[path].double()
        expected = leading(moment, 4)
        torch.testing.assert_close(rows.T @ rows, 0.25 * expected @ expected.T, atol=1e-4, rtol=0)
        assert all(torch.equal(seen[path].double(), rows) for seen in steps.seen)
        assert adapted_layers(module)[path].lora_B[adapter_of(module, "a")].weight.abs().max() > 0
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters() if "lora_B" in n}


def test_protected_inputs_get_nothing_of_later_adapters(tmp_path):
    seen = EachStep(lambda module: method.inputs.state()["bases"])
    method = InfLoRA(0.8)
    module, _ = run(tmp_path, method, more=[seen], max_epochs=3)
    history = method.report()["tasks"]
    assert history["a"]["directions"] < history["second task"]["directions"] <= history["c"]["of"]
    layers = adapted_layers(module)
    for number, name in enumerate(NAMES[1:], 1):
        bases = seen.seen[9 * number]
        for path, layer in layers.items():
            basis = bases[method.inputs.leaders[path]]
            adapter = adapter_of(module, name)
            up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            assert up.abs().max() > 0
            assert (up @ (down @ basis)).abs().max() < 1e-6
        assert history[name]["protected_share"] < 1e-10
    # What is protected after a task holds the share of the energy that the task's inputs have with its adapter.
    one, (again, *_) = run(tmp_path / "one", InfLoRA(0.8), names=["a"], max_epochs=3)
    for path, moment in moments_by_hand(one, Rows(0)).items():
        basis = again.inputs.of(path).double()
        assert (basis * (moment @ basis)).sum() >= 0.8 * moment.trace() * (1 - 1e-5)
        assert (basis[:, :-1] * (moment @ basis[:, :-1])).sum() < 0.8 * moment.trace()


def test_the_threshold_rises_task_by_task_and_then_stays(tmp_path):
    """As in the authors' code, ``(lame − lamb) · t / T + lamb``; each basis is the smallest with that share."""
    assert [InfLoRA(0.6, rises_to=1.0, over_tasks=2).threshold_of(i) for i in range(4)] == [0.6, 0.8, 1.0, 1.0]
    assert InfLoRA(0.6).threshold_of(7) == 0.6
    module, (method, *_) = run(tmp_path, InfLoRA(0.5, rises_to=0.9, over_tasks=2), names=NAMES[:2], max_epochs=3)
    history = method.report()["tasks"]
    assert [history[name]["threshold"] for name in NAMES[:2]] == [0.5, 0.7]
    fewest = []
    for path, moment in moments_by_hand(module, Rows(1)).items():
        basis = method.inputs.of(path).double()
        held = (basis * (moment @ basis)).sum(0).cumsum(0) / moment.trace()
        assert held[-1] >= 0.7 - 1e-5
        fewest.append(held[-2] < 0.7)
    assert any(fewest)  # others had as much before the task


def test_layers_that_read_the_same_input_share_a_basis(tmp_path):
    module, (method, *_) = run(tmp_path, InfLoRA(), names=["a"])
    assert {path.rpartition(".")[2] for path in method.inputs.bases} == {"q_proj", "up_proj"}
    downs = down_projections(module, "a")
    for path, down in downs.items():
        if path.endswith("v_proj"):
            assert torch.equal(down, downs[path.replace("v_proj", "q_proj")])


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def again(root, ckpt_path=None, names=NAMES[:2]):
        saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        return run(root, InfLoRA(0.7), Adapted(dropout=0.1), names, [saver], ckpt_path)

    whole, (method, matrix, _) = again(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 4
    for number, path in enumerate(checkpoints):
        module, (same, others, _) = again(tmp_path / f"again-{number}", path)
        assert_equal(state(whole), state(module), path)
        assert_equal(method.inputs.bases, same.inputs.bases, path)
        assert torch.equal(matrix.matrix, others.matrix), path
    boundaries = sorted((tmp_path / "whole").rglob("tasks/*.ckpt"), key=lambda path: path.name)
    boundaries = [path for path in boundaries if "trained" not in path.name]
    for row, path in enumerate(boundaries, 1):
        run_ = trainer(tmp_path / "evaluate", [InfLoRA(0.7), TaskMatrix()])
        found = evaluate_tasks(run_, Adapted(), data(NAMES[:2]), ckpt_path=path)
        assert [found[name]["val_loss"] for name in NAMES[:2]] == matrix.matrix[row].tolist(), path
    longer, _ = again(tmp_path / "longer", names=NAMES)
    added, _ = again(tmp_path / "added", boundaries[-1], NAMES)
    assert list_adapters(added) == NAMES
    assert_equal(state(longer), state(added))


def test_what_is_refused(tmp_path):
    with pytest.raises(Exception, match="3 tasks of rank 12 are more than the 32 inputs"):
        run(tmp_path / "full", InfLoRA(rank=12))
    for settings, words in (
        ({"threshold": 0}, "threshold=0"),
        ({"batches": 0}, "batches=0"),
        ({"rises_to": 0.5}, "rises_to=0.5: expected a share from threshold=0.95"),
        ({"rises_to": 1.5}, "rises_to=1.5"),
        ({"scale": 0}, "scale=0"),
    ):
        with pytest.raises(ValueError, match=words):
            InfLoRA(**settings)
