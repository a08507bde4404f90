"""LoRA adapters that are summed and kept apart: the sum, the penalty, the projection, resume, folding."""

from __future__ import annotations

import pytest
import torch
from adapting import base_model, logits
from distilling import Recorder, divergence
from lightning.pytorch.callbacks import ModelCheckpoint
from summing import NAMES, Adapted, EachStep, assert_equal, data, run, state
from toys import trainer

from lightning_cl import EWC, InfLoRA, LwF, OrthogonalLoRA, Replay, TaskMatrix
from lightning_cl.callbacks.architecture.summed_adapters import adapted_layers, down_projections
from lightning_cl.models.adapter_factors import adapter_factors
from lightning_cl.models.adapters import adapter_of, adapter_parameters, allocate_adapter, list_adapters, train_adapter
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


def by_hand(module, tasks):
    """The base with all products added to its weights."""
    model = base_model()
    with torch.no_grad():
        for task in tasks:
            for factors in adapter_factors(module.model, adapter_of(module, task)):
                weight = model.get_submodule(factors.path.removeprefix("base_model.model.")).weight
                weight += factors.scale * factors.second @ factors.first
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_it_computes_with_the_sum_of_all_and_trains_the_newest(tmp_path):
    trains = EachStep(lambda module: {n for n, p in module.named_parameters() if p.requires_grad})
    kept = EachStep(
        lambda module: {n: p.clone() for t in list_adapters(module) for n, p in adapter_parameters(module, t).items()}
    )
    module, (method, *_) = run(tmp_path, OrthogonalLoRA(), more=[trains, kept])
    assert list_adapters(module) == NAMES
    torch.testing.assert_close(logits(module.model), logits(by_hand(module, NAMES)), atol=2e-4, rtol=1e-4)
    for number, name in enumerate(NAMES):
        assert all(seen == set(adapter_parameters(module, name)) for seen in trains.seen[3 * number : 3 * number + 3])
        end = kept.seen[3 * number + 2]
        for path, parameter in adapter_parameters(module, name).items():
            assert torch.equal(parameter, end[path])
            assert not torch.equal(kept.seen[3 * number][path], end[path])
    history = method.report()["tasks"]
    assert history["a"]["parameters"] == sum(p.numel() for p in adapter_parameters(module, "a").values())
    assert history["a"]["overlap"] is None
    assert 0 < history["c"]["overlap"] < 1


@pytest.mark.parametrize("batches", [{}, {"batch_size": 2, "accumulate_grad_batches": 2}])
def test_hard_leaves_no_overlap_after_any_step(tmp_path, batches):
    """cos² between any two rows, with AdamW and weight decay."""

    def overlap(module):
        *earlier, newest = (down_projections(module, task) for task in list_adapters(module))
        unit = torch.nn.functional.normalize
        return [(unit(downs[n]) @ unit(newest[n]).T).abs().max().item() for downs in earlier for n in newest]

    steps = EachStep(overlap)
    _, (method, *_) = run(tmp_path, OrthogonalLoRA(hard=True), more=[steps], **batches)
    assert max(max(seen, default=0) for seen in steps.seen) <= 1e-6
    assert method.report()["tasks"]["c"]["overlap"] <= 1e-6


def reference_loss(module, normalize):
    """The penalty as the papers write it, by autograd."""
    *earlier, newest = (down_projections(module, task) for task in list_adapters(module))
    terms = []
    for path, down in newest.items():
        rows = torch.cat([downs[path].detach() for downs in earlier])
        if normalize:
            q = torch.linalg.qr(rows.T).Q
            terms.append(((down @ q).square().sum(1) / down.square().sum(1)).mean())
        else:
            terms.append((rows @ down.T).abs().sum())
    return torch.stack(terms).mean() if normalize else torch.stack(terms).sum()


class Penalised(Adapted):
    """Adds the penalty to the loss itself."""

    penalty = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if len(list_adapters(self)) > 1:
            loss = loss + self.penalty(self)
        return loss


@pytest.mark.parametrize(("normalize", "strength"), [(True, 0.7), (False, 0.02)])
def test_the_penalty_is_that_of_autograd_under_any_accumulation(tmp_path, normalize, strength):
    expected = Penalised(optimizer=sgd)
    expected.penalty = lambda module: strength * reference_loss(module, normalize)
    run(tmp_path / "autograd", OrthogonalLoRA(0.0, seed=1), expected)
    plain, _ = run(tmp_path / "none", OrthogonalLoRA(0.0, seed=1), Adapted(optimizer=sgd))
    for i, batches in enumerate(({}, {"batch_size": 2, "accumulate_grad_batches": 2})):
        method = OrthogonalLoRA(strength, normalize=normalize, seed=1)
        module, _ = run(tmp_path / str(i), method, Adapted(optimizer=sgd), **batches)
        differs = False
        for name in NAMES:
            for path, parameter in adapter_parameters(module, name).items():
                torch.testing.assert_close(parameter, dict(expected.named_parameters())[path], rtol=1e-3, atol=2e-5)
                differs |= not torch.allclose(parameter, dict(plain.named_parameters())[path], atol=1e-3)
        assert differs


def test_one_task_without_a_penalty_is_lora_bit_for_bit(tmp_path):
    lora = Adapted(dropout=0.1)
    allocate_adapter(lora, "a", seed=5)
    train_adapter(lora, "a")
    run(tmp_path / "lora", None, lora, names=["a"])
    for method in (OrthogonalLoRA(0.0, seed=5), OrthogonalLoRA(0.5, hard=True, seed=5)):
        module, _ = run(tmp_path / str(method.hard), method, Adapted(dropout=0.1), names=["a"])
        assert_equal(state(lora), state(module))


def test_folding_gives_one_adapter_that_computes_the_same(tmp_path):
    summed, _ = run(tmp_path / "sum", OrthogonalLoRA(), Adapted(use_rslora=True))
    folded, _ = run(tmp_path / "fold", OrthogonalLoRA(fold=True), Adapted(use_rslora=True))
    assert list(folded.model.peft_config) == ["default"]
    assert {len(f.first) for f in adapter_factors(folded.model, "default")} == {3 * 4}
    torch.testing.assert_close(logits(folded.model), logits(summed.model), atol=2e-4, rtol=1e-4)


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    settings = {"hard": True}

    def again(root, ckpt_path=None, names=NAMES[:2], **more):
        saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        return run(root, OrthogonalLoRA(**settings), Adapted(dropout=0.1), names, [saver], ckpt_path)

    whole, (_, matrix, _) = again(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 4
    for number, path in enumerate(checkpoints):
        module, (_, others, _) = again(tmp_path / f"again-{number}", path)
        assert_equal(state(whole), state(module), path)
        assert torch.equal(matrix.matrix, others.matrix), path
    boundaries = sorted((tmp_path / "whole").rglob("tasks/*.ckpt"), key=lambda path: path.name)
    boundaries = [path for path in boundaries if "trained" not in path.name]
    for row, path in enumerate(boundaries, 1):
        run_ = trainer(tmp_path / "evaluate", [OrthogonalLoRA(**settings), TaskMatrix()])
        found = evaluate_tasks(run_, Adapted(), data(NAMES[:2]), ckpt_path=path)
        losses = [found[name]["val_loss"] for name in NAMES[:2]]
        assert losses == matrix.matrix[row].tolist(), path
    longer, _ = again(tmp_path / "longer", names=NAMES)
    added, _ = again(tmp_path / "added", boundaries[-1], NAMES)
    assert_equal(state(longer), state(added))


def plain_logits(module, tasks, ids):
    """The logits of the base with ``s · Σ B A`` added to its weights, without peft; a graph leads to the factors."""
    added = {}
    for path, layer in adapted_layers(module.model).items():
        names = [adapter_of(module, task) for task in tasks]
        products = [layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in names]
        added[path.removeprefix("base_model.model.") + ".weight"] = sum(products, layer.base_layer.weight.detach())
    return torch.func.functional_call(base_model(), added, kwargs={"input_ids": ids}).logits


@pytest.mark.parametrize("kind", [lambda: OrthogonalLoRA(0.0), lambda: InfLoRA(0.7)], ids=["OrthogonalLoRA", "InfLoRA"])
@pytest.mark.parametrize("settings", [{}, {"teacher": "base", "strength": 0.5}])
def test_the_teacher_is_the_base_with_all_earlier_adapters(tmp_path, kind, settings):
    """Each step's gradient is that of the loss and the divergence, with all weights put together by hand."""
    recorder, lwf = Recorder(), LwF(**settings)
    module, _ = run(tmp_path, kind(), more=[lwf, recorder])
    past = () if lwf.teacher_is == "base" else NAMES[:2]
    for batch, state_then, gradient in recorder.steps[-1]:
        module.load_state_dict(state_then)
        module.zero_grad()
        student = plain_logits(module, NAMES, batch["input_ids"])[:, :-1].flatten(0, 1)
        with torch.no_grad():
            teacher = plain_logits(module, past, batch["input_ids"])[:, :-1].flatten(0, 1)
        own = torch.nn.functional.cross_entropy(student, batch["labels"][:, 1:].flatten())
        (own + lwf.strength * divergence(teacher, student)).backward()
        expected = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        assert gradient.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert divergence(teacher, student) > 1e-4  # in the last step


def test_what_composes_and_what_is_refused(tmp_path):
    run(tmp_path / "replay", OrthogonalLoRA(), more=[Replay(8, 0.25)], names=NAMES[:2])
    with pytest.warns(UserWarning, match="EWC with OrthogonalLoRA: each task trains an adapter of its own"):
        run(tmp_path / "ewc", OrthogonalLoRA(), more=[EWC(1.0, samples=4)], names=NAMES[:2])
    with pytest.raises(Exception, match="3 tasks of rank 12 are more than the 32 inputs"):
        run(tmp_path / "full", OrthogonalLoRA(rank=12))
    with pytest.raises(ValueError, match="use_dora"):
        run(tmp_path / "dora", OrthogonalLoRA(), Adapted(use_dora=True))
    with pytest.raises(ValueError, match="strength=-1"):
        OrthogonalLoRA(-1)
    with pytest.raises(ValueError, match="hard=1"):
        OrthogonalLoRA(hard=1)
