"""Which methods go together: refused before training with the reason, or trained and right."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import Sentences, SomebodysAdapter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import fit, seeded, weights
from toys import classification, trainer

from lightning_cl import (
    AGEM,
    EWC,
    L2SP,
    MAS,
    SI,
    Interpolate,
    KLToBase,
    LwF,
    Merge,
    Replay,
    RWalk,
    SubspaceFreeze,
    TaskAdapters,
    TaskDataModule,
    TaskMatrix,
    fit_tasks,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {"a": Sentences(1), "b": Sentences(2)}
ONE = {"a": classification(1)}


def fit_adapters(root, callbacks):
    L.seed_everything(0, verbose=False)
    module = SomebodysAdapter()
    fit_tasks(trainer(root, callbacks, max_epochs=1), module, TaskDataModule(TASKS, batch_size=4))
    return module


@pytest.mark.parametrize("other", [EWC, SI, MAS, RWalk, L2SP, LwF, Replay, AGEM], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("order", [1, -1])
def test_what_adapters_per_task_leave_nothing_of_is_refused_with_the_reason(tmp_path, other, order):
    with pytest.raises(MisconfigurationException, match=rf"{other.__name__} with TaskAdapters: .*Leave one"):
        fit_adapters(tmp_path, [TaskAdapters(), other()][::order])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("methods", "thing"),
    [
        (lambda: [TaskAdapters(), SubspaceFreeze()], "want the trainable parameters"),
        (lambda: [TaskAdapters(), TaskAdapters()], "want the trainable parameters"),
        (lambda: [TaskAdapters(), Merge()], "each decide with which weights"),
        (lambda: [Replay(10), Merge(tasks="independent")], "Replay with Merge: "),
    ],
)
def test_two_owners_are_refused(tmp_path, methods, thing):
    with pytest.raises(MisconfigurationException, match=thing):
        fit_adapters(tmp_path, methods())


def test_adapters_per_task_without_an_adapter_say_what_is_needed(tmp_path):
    with pytest.raises((MisconfigurationException, ValueError), match=r"CausalLM\(lora="):
        fit(tmp_path, [TaskAdapters()])


def test_replay_and_interpolation_in_any_order_give_the_same_bits(tmp_path):
    found = []
    for name, order in (("one", 1), ("other", -1)):
        matrix = TaskMatrix()
        module = fit(tmp_path / name, [*[Replay(20, 0.25), Interpolate(0.5), EWC(0.1, samples=8)][::order], matrix])
        found.append((weights(module), matrix.matrix))
    assert all(torch.equal(found[0][0][n], found[1][0][n]) for n in found[0][0])
    assert torch.equal(found[0][1], found[1][1])


def test_replay_and_interpolation_each_do_their_part(tmp_path):
    """The interpolated run is, task by task, halfway along the run with replay that starts from the same weights."""
    alone = fit(tmp_path / "alone", [Replay(20, 0.25)], tasks=ONE)
    both = fit(tmp_path / "both", [Replay(20, 0.25), Interpolate(0.5)], tasks=ONE)
    start = weights(seeded())
    for name, end in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], torch.lerp(start[name], end, 0.5))


def test_adapters_per_task_with_interpolation_and_a_probe(tmp_path):
    matrix, probe = TaskMatrix(), KLToBase(samples=4)
    fit_adapters(tmp_path, [Interpolate(0.5), TaskAdapters(), matrix, probe])
    rows = matrix.matrix
    assert rows[1, 0] == rows[2, 0]  # the first task's adapter rests
    assert rows[2, 1] < rows[0, 1]
    assert set(probe.kl) == {"a", "b"}


@pytest.mark.parametrize("penalty", [lambda: EWC(5.0, samples=8, apply="proximal"), lambda: SI(1.0)])
def test_a_penalty_next_to_a_frozen_subspace_leaves_it_unmoved(tmp_path, penalty):
    from lightning_cl.functional import principal_subspace

    found = []
    for order in (1, -1):
        module = seeded()
        start = module.net[0].weight.detach().clone()
        fit(tmp_path / str(order), [penalty(), SubspaceFreeze(0.5)][::order], module=module, tasks=ONE)
        space = principal_subspace(start, 0.5)
        moved = module.net[0].weight.detach() - start
        assert moved.abs().max() > 1e-3
        assert (space.left.T @ moved).abs().max() < 1e-6
        assert (moved @ space.right).abs().max() < 1e-6
        found.append(weights(module))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
