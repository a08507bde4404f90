"""Layers that keep their outputs for earlier inputs: in a Trainer, with AdamW and weight decay."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import VOCABULARY, peft_model
from lightning.pytorch.callbacks import ModelCheckpoint
from regularized import Ends, SomebodysLM, adamw, fit, seeded, weights
from torch.utils.data import DataLoader, TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import EWC, InputFreeze, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.data.text.collator import TokenCollator
from lightning_cl.passes.input_moments import find_shared_inputs, input_moments, real_positions
from lightning_cl.passes.task_samples import TaskSamples

pytestmark = pytest.mark.filterwarnings("ignore")


def flat(seed, samples=7, rank=3):
    """Inputs that span only a few of the eight directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, rank, generator=generator) @ torch.randn(rank, 8, generator=generator)
    return TensorDataset(x, torch.arange(samples) % 3)


class Keeps(L.Callback):
    """What the network gives for the first task's inputs, whenever a task starts and ends."""

    def __init__(self, dataset):
        self.x, self.outputs = dataset.tensors[0], []

    def look(self, pl_module):
        with torch.no_grad():
            self.outputs.append(pl_module(self.x).clone())

    def on_train_start(self, trainer, pl_module):
        self.look(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.look(pl_module)


def test_where_earlier_inputs_are_all_protected_the_network_computes_the_same_for_them(tmp_path):
    """Each layer's inputs stay, so each layer's outputs do; without the method they move by far."""
    tasks = {"a": flat(1), "b": flat(2), "c": classification(3, 16)}
    moves = []
    for name, methods in (("plain", []), ("kept", [InputFreeze(1.0)])):
        keeps, ends = Keeps(tasks["a"]), Ends()
        fit(tmp_path / name, [*methods, keeps, ends], module=seeded(optimizer=adamw), tasks=tasks, max_epochs=40)
        moves.append((keeps.outputs[3] - keeps.outputs[1]).abs().max().item())
        assert not torch.allclose(ends.starts[1]["net.0.weight"], ends.weights[1]["net.0.weight"], atol=1e-3)
    assert moves[0] > 0.1
    assert moves[1] < 2e-5
    (method,) = methods
    history = method.report()["tasks"]
    assert [history[t]["layers"] for t in "abc"] == [0, 2, 2]
    assert history["a"]["directions_after"] == 3 + 7  # the rank of the inputs, and one for each sample's hidden state
    assert history["b"]["directions"] == 10
    assert history["c"]["directions"] == 6 + 14
    assert all(0 < history[t]["protected_share"] < 1e-6 for t in "bc")


def test_the_basis_holds_the_share_of_the_energy_and_the_weight_is_kept_for_it(tmp_path):
    ends, method = Ends(), InputFreeze(0.8, normalize=False)
    tasks = {"a": classification(1), "b": classification(2)}
    fit(tmp_path, [method, ends], module=seeded(optimizer=adamw), tasks=tasks)
    x = tasks["a"].tensors[0].double()
    values, vectors = torch.linalg.eigh(x.T @ x)
    count = int((values.flip(0).cumsum(0) < 0.8 * values.sum()).sum()) + 1
    basis = method.bases["net.0"].double()
    span = vectors.flip(1)[:, :count]
    torch.testing.assert_close(basis[:, :count] @ basis[:, :count].T, span @ span.T, atol=1e-5, rtol=0)
    change = (ends.weights[1]["net.0.weight"] - ends.starts[1]["net.0.weight"]).double()
    assert (change @ span).abs().max() < 2e-6
    assert change.abs().max() > 1e-2
    both = torch.cat([x, tasks["b"].tensors[0].double()])
    assert (both[len(x) :] @ basis).square().sum() >= 0.8 * both[len(x) :].square().sum() * (1 - 1e-6)
    for name in ("net.0.bias", "net.4.bias"):  # a bias moves outputs for every input
        assert torch.equal(ends.starts[1][name], ends.weights[1][name])
        assert not torch.equal(ends.starts[0][name], ends.weights[0][name])


def test_biases_are_frozen_in_any_case_and_the_module_is_given_back(tmp_path):
    class Normed(Classifier):
        def __init__(self):
            super().__init__(optimizer=adamw)
            self.net[1] = torch.nn.LayerNorm(16)

    for others in ("frozen", "trained"):
        ends = Ends()
        module = fit(tmp_path / others, [InputFreeze(0.5, others=others), ends], module=seeded(Normed))
        start, end = ends.starts[1], ends.weights[1]
        assert torch.equal(start["net.1.bias"], end["net.1.bias"]) == (others == "frozen")
        assert all(torch.equal(start[n], end[n]) for n in ("net.0.bias", "net.4.bias"))
        assert all(p.requires_grad for p in module.parameters())


def test_one_task_is_plain_training_bit_for_bit(tmp_path):
    tasks = {"a": classification(1)}
    plain = weights(fit(tmp_path / "plain", [], module=seeded(dropout=0.2), tasks=tasks))
    method = InputFreeze(0.9)
    kept = weights(fit(tmp_path / "kept", [method], module=seeded(dropout=0.2), tasks=tasks))
    assert all(torch.equal(p, kept[n]) for n, p in plain.items())
    assert method.bases


def test_general_data_is_protected_from_the_first_task_on(tmp_path):
    general, ends = flat(5), Ends()
    keeps = Keeps(general)
    method = InputFreeze(1.0, general=general)
    fit(tmp_path, [method, keeps, ends], module=seeded(optimizer=adamw), tasks={"a": classification(1)})
    assert (keeps.outputs[1] - keeps.outputs[0]).abs().max() < 2e-5
    assert not torch.allclose(ends.starts[0]["net.4.weight"], ends.weights[0]["net.4.weight"], atol=1e-3)
    assert method.report()["tasks"]["a"]["directions"] == 3 + 7


def test_accumulated_batches_are_one_batch(tmp_path):
    whole = fit(tmp_path / "1x8", [InputFreeze(0.8)], module=seeded(optimizer=adamw), batch_size=8)
    settings = {"batch_size": 4, "accumulate_grad_batches": 2}
    parts = fit(tmp_path / "2x4", [InputFreeze(0.8)], module=seeded(optimizer=adamw), **settings)
    for name, parameter in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], parameter, rtol=1e-3, atol=2e-5)


def test_a_proximal_penalty_pulls_outside_of_the_protected_directions(tmp_path):
    ends, method = Ends(), InputFreeze(0.6, normalize=False)
    fit(tmp_path, [method, EWC(50.0, samples=8, apply="proximal"), ends], module=seeded(optimizer=adamw))
    x = classification(1).tensors[0].double()
    first = torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
    change = (ends.weights[1]["net.0.weight"] - ends.starts[1]["net.0.weight"]).double()
    assert (change @ first).abs().max() < 2e-6 < change.abs().max()


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def run(root, ckpt_path=None, names="ab"):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        saver = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [InputFreeze(0.5, general=flat(9)), TaskMatrix(), saver]
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
        assert all(torch.equal(basis, others[0].bases[n]) for n, basis in callbacks[0].bases.items()), path
    longer, _ = run(tmp_path / "longer", names="abc")
    last = max(checkpoints, key=lambda path: path.stat().st_mtime)
    added, _ = run(tmp_path / "added", last, names="abc")
    assert all(torch.equal(longer[n], added[n]) for n in longer), last


# ---------------------------------------------------------------------- what is measured


class Texts(torch.utils.data.Dataset):
    """Token samples of different lengths."""

    def __init__(self, lengths=(5, 9, 3, 7)):
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "loss_mask": torch.ones(len(self.ids[i]), dtype=torch.bool)}


def blocks(samples):
    return TokenCollator(0)([samples[:2], samples[2:]])


@pytest.mark.parametrize("collate", [TokenCollator(0), blocks], ids=["padded", "packed"])
def test_padding_is_left_out_and_every_token_counts_once(tmp_path, collate):
    torch.manual_seed(0)
    module = SomebodysLM(vocab_size=VOCABULARY)
    layers = {n: p for n, p in module.named_modules() if n.endswith("_proj")}
    widths = {n: p.in_features for n, p in layers.items()}
    measured = []
    run = trainer(tmp_path, max_epochs=1)
    run.strategy.connect(module)
    for size, join in ((1, TokenCollator(0)), (4, collate)):
        loader = DataLoader(Texts(), size, collate_fn=join)
        samples = TaskSamples(run, 99, 0, "", loader=loader)
        measured.append(input_moments(run, module, layers, widths, samples, normalize=False))
        shared = find_shared_inputs(run, module, layers, samples.one() if join is not blocks else next(iter(loader)))
    for name in layers:
        torch.testing.assert_close(measured[1][name], measured[0][name], rtol=1e-3, atol=1e-3, msg=name)
    for name, leader in shared.items():
        place = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name.rpartition(".")[2])
        assert leader == (f"{name.rpartition('.')[0]}.{place}" if place else name)


def test_positions_of_a_packed_batch():
    samples = [Texts()[i] for i in range(4)]
    assert real_positions(blocks(samples)).sum(1).tolist() == [14, 10]
    full = TokenCollator(0)([[samples[0]]])
    assert real_positions(full).all()
    assert real_positions((torch.zeros(2, 3), torch.zeros(2))) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"threshold": 1.1}, "threshold=1.1"),
        ({"batches": 0}, "batches=0"),
        ({"normalize": 1}, "normalize=1"),
    ],
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        InputFreeze(**settings)
    with pytest.raises(TypeError, match="general: expected a path"):
        InputFreeze(general=3)


def test_low_rank_adapters_are_refused(tmp_path):
    module = SomebodysLM()
    module.model = peft_model()
    with pytest.raises(Exception, match="use InfLoRA, or full tuning"):
        fit(tmp_path, [InputFreeze()], module=module)
    with pytest.raises(Exception, match=r"InputFreeze\(general=.*text needs a tokenizer"):
        fit(tmp_path, [InputFreeze(general=["A text."])])
