"""EWC against per-sample loops of plain autograd, on a classifier and on language models."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from toys import TINY_LLAMA, Classifier, classification, trainer
from transformers import AutoConfig, LlamaForCausalLM

from lightning_cl import EWC, CausalLM, TaskDataModule, TrainedBPE, fit_tasks


class Ends(L.Callback):
    """Keeps the weights at the end of each task, and the data set that it was trained on."""

    def __init__(self):
        self.weights, self.datasets = [], []

    def on_train_end(self, trainer, pl_module):
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.datasets.append(trainer.train_dataloader.dataset)


def logits_of(module, batch):
    return module(batch[0])


def fit(root, ewc, tasks, module=None, **settings):
    torch.manual_seed(0)
    module = module if module is not None else Classifier()
    ends = Ends()
    run = trainer(root, [ewc, ends], max_epochs=2, **settings)
    fit_tasks(run, module, TaskDataModule(tasks, batch_size=8, seed=0))
    return module, ends


def squared(loss, parameters):
    return [g.square() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]


def classifier_fisher(weights, dataset, exact=False):
    """Mean over samples of squared gradients, in float64, one sample at a time."""
    module = Classifier().double()
    module.load_state_dict(weights)
    names, parameters = zip(*module.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in dataset:
        log_p = module(x[None].double()).log_softmax(-1)[0]
        terms = [(p, c) for c, p in enumerate(log_p.exp().tolist())] if exact else [(1.0, int(y))]
        for weight, label in terms:
            for t, square in zip(total, squared(log_p[label], parameters), strict=True):
                t += weight * square
    return {name: (t / len(dataset)).float() for name, t in zip(names, total, strict=True)}


def assert_same(actual, expected, rtol=1e-5, atol=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---------------------------------------------------------------------- estimators


def test_empirical_is_the_mean_of_squared_per_sample_gradients(tmp_path):
    ewc, data = EWC(estimator="empirical", normalize=False), classification(1)
    _, ends = fit(tmp_path, ewc, {"a": data})
    assert_same(ewc.importance, classifier_fisher(ends.weights[0], data), atol=1e-8)


def test_anchor_is_a_copy_of_the_weights_at_the_end(tmp_path):
    ewc = EWC(estimator="empirical")
    module, ends = fit(tmp_path, ewc, {"a": classification(1)})
    with torch.no_grad():
        module.net[0].weight.add_(1.0)  # a view of the live weights would follow
    assert_same(ewc.anchor, ends.weights[0], rtol=0, atol=0)


def test_normalized_has_mean_one_and_the_same_proportions(tmp_path):
    ewc, data = EWC(estimator="empirical", normalize=True), classification(1)
    _, ends = fit(tmp_path, ewc, {"a": data})
    fisher = classifier_fisher(ends.weights[0], data)
    mean = torch.cat([f.flatten() for f in fisher.values()]).mean()
    assert torch.cat([f.flatten() for f in ewc.importance.values()]).mean().item() == pytest.approx(1.0, rel=1e-5)
    assert_same(ewc.importance, {name: f / mean for name, f in fisher.items()}, rtol=1e-4, atol=1e-6)


def test_exact_is_the_expectation_over_labels(tmp_path):
    ewc, data = EWC(estimator="exact", normalize=False, outputs=logits_of), classification(1)
    _, ends = fit(tmp_path, ewc, {"a": data})
    assert_same(ewc.importance, classifier_fisher(ends.weights[0], data, exact=True), atol=1e-8)


def test_mean_of_sampled_labels_approaches_exact(tmp_path):
    # Few different inputs, each drawn for many times: what differs from `exact` is the draws alone.
    data = classification(1, samples=4)
    repeated = torch.utils.data.ConcatDataset([data] * 500)
    ewc = EWC(estimator="sample", normalize=False, samples=2000, outputs=logits_of)
    _, ends = fit(tmp_path, ewc, {"a": repeated}, limit_train_batches=2)
    exact = classifier_fisher(ends.weights[0], data, exact=True)
    drawn = torch.cat([ewc.importance[name].flatten() for name in exact])
    exact = torch.cat([f.flatten() for f in exact.values()])
    assert (drawn.sum() / exact.sum()).item() == pytest.approx(1.0, abs=0.05)
    assert ((drawn - exact).norm() / exact.norm()).item() < 0.06


def test_samples_limits_the_pass(tmp_path):
    data = classification(1)
    calls = []
    ewc = EWC(estimator="exact", samples=5, outputs=lambda m, b: (calls.append(len(b[0])), m(b[0]))[1])
    fit(tmp_path, ewc, {"a": data})
    # One sample before the task; behind it three in both ways, then all five at once.
    assert calls == [1, 3, 1, 1, 1, 5]


def test_sampling_without_logits_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"(?s)outputs=.*empirical"):
        fit(tmp_path, EWC(estimator="sample"), {"a": classification(1)})


def test_auto_falls_back_to_empirical_and_says_so(tmp_path):
    ewc, data = EWC(estimator="auto", normalize=False), classification(1)
    _, ends = fit(tmp_path, ewc, {"a": data})
    assert ewc.report()["importance"][0]["estimator"] == "empirical"
    assert_same(ewc.importance, classifier_fisher(ends.weights[0], data), atol=1e-8)


def test_auto_is_exact_where_classes_times_positions_are_few(tmp_path):
    ewc, data = EWC(estimator="auto", normalize=False, outputs=logits_of, batch_size=5), classification(1)
    _, ends = fit(tmp_path, ewc, {"a": data})
    assert ewc.report()["importance"][0]["estimator"] == "exact"
    assert_same(ewc.importance, classifier_fisher(ends.weights[0], data, exact=True), atol=1e-8)


@pytest.mark.parametrize(("copies", "estimator"), [(10, "exact"), (11, "sample")])  # of 3 classes; 32 are few
def test_auto_samples_where_they_are_many(tmp_path, copies, estimator):
    ewc = EWC(samples=2, outputs=lambda module, batch: module(batch[0])[:, None].expand(-1, copies, -1))
    fit(tmp_path, ewc, {"a": classification(1)})
    assert ewc.report()["importance"][0]["estimator"] == estimator


# ---------------------------------------------------------------------- several tasks


def test_online_decays_all_that_the_penalty_multiplies(tmp_path):
    ewc = EWC(strength=0.1, estimator="empirical", normalize=False, decay=0.5)
    tasks = {"a": classification(1), "b": classification(2)}
    _, ends = fit(tmp_path, ewc, tasks)
    first, second = (classifier_fisher(w, d) for w, d in zip(ends.weights, tasks.values(), strict=True))
    assert_same(ewc.importance, {n: 0.5 * (0.5 * first[n] + second[n]) for n in first}, atol=1e-8)
    assert_same(ewc.anchor, ends.weights[1], rtol=0, atol=0)


def separate(tmp_path):
    ewc = EWC(strength=0.3, estimator="empirical", normalize=False, mode="separate")
    tasks = {"a": classification(1), "b": classification(2), "c": classification(3)}
    module, ends = fit(tmp_path, ewc, tasks)
    fishers = [classifier_fisher(w, d) for w, d in zip(ends.weights, tasks.values(), strict=True)]
    return ewc, module, ends.weights, fishers


def test_separate_merges_into_one_quadratic(tmp_path):
    ewc, _, weights, fishers = separate(tmp_path)
    total = {n: sum(f[n] for f in fishers) for n in fishers[0]}
    assert_same(ewc.importance, total, atol=1e-8)
    anchor = {n: sum(f[n] * w[n] for f, w in zip(fishers, weights, strict=True)) / total[n] for n in total}
    assert_same(ewc.anchor, anchor, rtol=1e-4, atol=1e-5)


def test_separate_penalty_is_the_sum_over_tasks(tmp_path):
    ewc, module, weights, fishers = separate(tmp_path)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5 * torch.randn_like(p))
    theta = dict(module.named_parameters())
    expected = sum(
        0.15 * (f[n] * (theta[n].detach() - w[n]).square()).sum().item()
        for f, w in zip(fishers, weights, strict=True)
        for n in f
    )
    assert ewc.penalty(module) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------- parameters that come, stay frozen, or go


def test_frozen_parameters_cost_nothing(tmp_path):
    module = Classifier()
    module.net[0].requires_grad_(False)
    ewc = EWC(estimator="empirical")
    fit(tmp_path, ewc, {"a": classification(1)}, module)
    assert set(ewc.importance) == set(ewc.anchor) == {"net.4.weight", "net.4.bias"}
    assert ewc.state_bytes() == 8 * (16 * 3 + 3)


class Growing(Classifier):
    """A classifier that gets more parameters between two tasks."""

    def __init__(self):
        super().__init__()
        self.extra = None

    def forward(self, x):
        return self.net(x) + (self.extra(x) if self.extra is not None else 0)

    def add_extra(self):
        self.extra = nn.Linear(8, 3)

    def widen_head(self):
        old, self.net[4] = self.net[4], nn.Linear(16, 5)
        with torch.no_grad():
            self.net[4].weight[:3], self.net[4].bias[:3] = old.weight, old.bias


class AtFirstStep(L.Callback):
    """Calls a function when training has begun and no weight has changed yet."""

    def __init__(self, function):
        self.function, self.called = function, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.called:
            self.called = True
            self.function(pl_module)


def plain_fit(root, module, callbacks, seed):
    trainer(root, callbacks, max_epochs=1).fit(module, DataLoader(classification(seed), batch_size=8))


def test_a_parameter_that_appears_later_starts_without_importance(tmp_path):
    ewc, module = EWC(strength=10.0, estimator="empirical", normalize=False), Growing()
    plain_fit(tmp_path, module, [ewc], 1)
    module.add_extra()
    seen = {}

    def look(m):
        seen["penalty"] = ewc.penalty(m)
        seen["extra"] = ewc.importance.get("extra.weight", torch.zeros(1)).abs().sum().item()

    probe = AtFirstStep(look)
    plain_fit(tmp_path, module, [ewc, probe], 2)
    assert seen == {"penalty": 0.0, "extra": 0.0}
    assert ewc.importance["extra.weight"].sum() > 0  # from its first task on it has one


def test_a_grown_head_keeps_its_rows_and_new_rows_have_no_importance(tmp_path):
    ewc, module = EWC(strength=10.0, estimator="empirical", normalize=False), Growing()
    plain_fit(tmp_path, module, [ewc], 1)
    before = ewc.importance["net.4.weight"].clone()
    module.widen_head()
    seen = {}

    def look(m):
        seen["penalty"], seen["head"] = ewc.penalty(m), ewc.importance["net.4.weight"].clone()
        seen["gap"] = (m.net[4].weight.detach() - ewc.anchor["net.4.weight"]).abs().max().item()

    probe = AtFirstStep(look)
    plain_fit(tmp_path, module, [ewc, probe], 2)
    torch.testing.assert_close(seen["head"][:3], before, rtol=0, atol=0)
    assert seen["head"].shape == (5, 16)
    assert not seen["head"][3:].any()
    assert seen["penalty"] == seen["gap"] == 0.0  # the new rows are their own anchor
    assert ewc.importance["net.4.weight"].shape == ewc.anchor["net.4.weight"].shape == (5, 16)


def test_a_parameter_that_is_gone_is_an_error(tmp_path):
    ewc, module = EWC(estimator="empirical"), Growing()
    module.add_extra()
    plain_fit(tmp_path, module, [ewc], 1)
    module.extra = None
    with pytest.raises(MisconfigurationException, match=r"extra\."):
        plain_fit(tmp_path, module, [ewc], 2)


def test_zero_importance_warns_and_says_why(tmp_path):
    class Indifferent(Classifier):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

    with pytest.warns(UserWarning, match=r"(?s)importance.*zero.*can do nothing.*gradient"):
        fit(tmp_path, EWC(estimator="empirical"), {"a": classification(1)}, Indifferent())


# ---------------------------------------------------------------------- no trace


class Fragile(L.LightningModule):
    """All that an extra pass could spoil: dropout, batch norm (one frozen in eval mode), metrics, logging."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.drop = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.frozen_bn, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.frozen_bn.eval()
        self.first.bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        random.random()
        np.random.rand()
        out = self.head(self.frozen_bn(self.drop(self.bn(self.first(x)))))
        self.accuracy(out, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"a": 1.0, "b": 2.0})
        return F.cross_entropy(out, y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def traces(module):
    """All state of a module and of the random number generators, as one flat dictionary."""
    state = {f"state {k}": v.clone() for k, v in module.state_dict().items()}
    state |= {f"mode {k}": m.training for k, m in module.named_modules()}
    state |= {f"needs grad {k}": p.requires_grad for k, p in module.named_parameters()}
    state |= {f"grad {k}": None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()}
    state |= {f"metric {k}": v.clone() for k, v in module.accuracy.metric_state.items()}
    state |= {"updates": module.accuracy._update_count, "torch": torch.get_rng_state()}
    numpy_state = np.random.get_state()
    state |= {"python": random.getstate(), "numpy": (numpy_state[1].tolist(), numpy_state[2])}
    return state


def assert_no_difference(left, right):
    assert left.keys() == right.keys()
    differing = [
        k
        for k, v in left.items()
        if not (torch.equal(v, right[k]) if torch.is_tensor(v) and torch.is_tensor(right[k]) else v == right[k])
    ]
    assert not differing


class AroundTaskEnd(L.Callback):
    """Traces just before and just after the methods have measured what they measure at a task's end."""

    def __init__(self):
        self.before, self.after = [], []

    def on_train_end(self, trainer, pl_module):
        # As after a step in the middle of an epoch: the metric is filled, so that a reset would be noticed.
        pl_module.accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
        self.before.append(traces(pl_module))

    def on_fit_end(self, trainer, pl_module):
        self.after.append(traces(pl_module))


def fragile_run(root, callbacks):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    module = Fragile()
    run = trainer(root, callbacks, max_epochs=2)
    fit_tasks(run, module, TaskDataModule({"a": classification(1), "b": classification(2)}, batch_size=8))
    return module


@pytest.mark.parametrize("estimator", ["empirical", "sample"])
def test_the_fisher_pass_leaves_no_trace(tmp_path, estimator):
    around = AroundTaskEnd()
    outputs = None if estimator == "empirical" else lambda m, b: m.head(m.drop(m.bn(m.first(b[0]))))
    fragile_run(tmp_path, [EWC(estimator=estimator, outputs=outputs), around])
    for before, after in zip(around.before, around.after, strict=True):
        assert before["mode bn"]
        assert not before["mode frozen_bn"]
        assert_no_difference(before, after)


def test_strength_zero_is_plain_training_bit_for_bit(tmp_path):
    ewc = EWC(strength=0.0, estimator="empirical")
    watched, plain = fragile_run(tmp_path / "a", [ewc]), fragile_run(tmp_path / "b", [])
    left, right = traces(watched), traces(plain)
    assert_no_difference(left, right)
    assert sum(f.sum() for f in ewc.importance.values()) > 0  # and yet it was measured


# ---------------------------------------------------------------------- language models


VOCABULARY, LENGTH = 11, 7


class SomebodysLM(L.LightningModule):
    """A third-party language model; it knows nothing of this library."""

    def __init__(self, tie=True, lr=1e-2):
        super().__init__()
        self.lr = lr
        self.model = LlamaForCausalLM(llama_config(tie))

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def llama_config(tie=True):
    config = TINY_LLAMA | {"vocab_size": VOCABULARY, "tie_word_embeddings": tie}
    return AutoConfig.for_model(**config)


class Sequences(Dataset):
    """Token sequences of one length; the first `masked[i]` and, if `tail`, the last labels bear no loss."""

    def __init__(self, seed, masked, tail=0, low=0, high=VOCABULARY):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(low, high, (len(masked), LENGTH), generator=generator)
        self.labels = self.ids.clone()
        for row, count in enumerate(masked):
            self.labels[row, :count] = -100
            self.labels[row, LENGTH - tail :] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def lm_fit(root, ewc, data, module=None, **settings):
    torch.manual_seed(0)
    module = module if module is not None else SomebodysLM()
    ends = Ends()
    fit_tasks(trainer(root, [ewc, ends], max_epochs=1, **settings), module, TaskDataModule({"a": data}, batch_size=4))
    return module, ends


def lm_fisher(model, samples, exact=False):
    """``Σ_seq (∇ Σ_t nll)² / loss tokens``, one sequence at a time; without what comes from a tokenizer's batch."""
    model = model.double().eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    total, tokens = [torch.zeros_like(p) for p in parameters], 0
    for ids, labels in samples:
        positions = [t for t in range(len(ids) - 1) if labels[t + 1] != -100]
        if not positions:
            continue
        tokens += len(positions)
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        if exact:
            # Labels of different positions are independent: the cross terms have mean zero.
            terms = [(log_p[t, v].exp().item(), log_p[t, v]) for t in positions for v in range(log_p.shape[-1])]
        else:
            terms = [(1.0, sum(log_p[t, labels[t + 1]] for t in positions))]
        for weight, value in terms:
            for sum_, square in zip(total, squared(value, parameters), strict=True):
                sum_ += weight * square
    return {name: (t / tokens).float() for name, t in zip(names, total, strict=True)}


def reference_lm(module, weights, tie=True):
    del module
    model = LlamaForCausalLM(llama_config(tie))
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    return model


def prefixed(fisher, prefix):
    return {prefix + name: f for name, f in fisher.items()}


def test_lm_empirical_is_per_sequence_over_loss_tokens(tmp_path):
    data = Sequences(1, masked=[0, 1, 3, 5, 2, 4, 0, 6])
    ewc = EWC(estimator="empirical", normalize=False)
    module, ends = lm_fit(tmp_path, ewc, data)
    expected = lm_fisher(reference_lm(module, ends.weights[0]), zip(data.ids, data.labels, strict=True))
    assert_same(ewc.importance, prefixed(expected, "model."), rtol=1e-3, atol=1e-7)


def test_lm_a_sequence_without_loss_tokens_adds_nothing(tmp_path):
    # Hugging Face's mean over no token is NaN; one such sequence must not poison the Fisher of all.
    data = Sequences(1, masked=[0, 2, LENGTH, 3])
    ewc = EWC(estimator="empirical", normalize=False)
    module, ends = lm_fit(tmp_path, ewc, data)
    expected = lm_fisher(reference_lm(module, ends.weights[0]), zip(data.ids, data.labels, strict=True))
    assert_same(ewc.importance, prefixed(expected, "model."), rtol=1e-3, atol=1e-7)


def test_lm_exact_is_the_expectation_over_labels(tmp_path):
    data = Sequences(1, masked=[0, 3, 5, LENGTH])
    ewc = EWC(estimator="exact", normalize=False)
    module, ends = lm_fit(tmp_path, ewc, data)
    expected = lm_fisher(reference_lm(module, ends.weights[0]), zip(data.ids, data.labels, strict=True), exact=True)
    assert_same(ewc.importance, prefixed(expected, "model."), rtol=1e-3, atol=1e-7)


def test_lm_sample_reaches_logits_by_itself_and_approaches_exact(tmp_path):
    data = Sequences(1, masked=[0, 4])
    repeated = torch.utils.data.ConcatDataset([data] * 300)
    ewc = EWC(normalize=False, samples=600)
    module, ends = lm_fit(tmp_path, ewc, repeated, limit_train_batches=2)
    assert ewc.report()["importance"][0]["estimator"] == "sample"
    model = reference_lm(module, ends.weights[0])
    exact = prefixed(lm_fisher(model, zip(data.ids, data.labels, strict=True), exact=True), "model.")
    drawn, exact = (torch.cat([f[n].flatten() for n in exact]) for f in (ewc.importance, exact))
    assert (drawn.sum() / exact.sum()).item() == pytest.approx(1.0, abs=0.1)
    assert ((drawn - exact).norm() / exact.norm()).item() < 0.2


def test_lm_sample_draws_no_label_where_there_is_no_loss(tmp_path):
    # The input embedding of a token gets a gradient only from loss positions at or behind it. Tokens 8 to 10 stand
    # only behind the last loss position, or in a sequence without one.
    data = Sequences(1, masked=[0, 2, LENGTH, 1], tail=3, high=8)
    data.ids[:, LENGTH - 3 :] = torch.tensor([8, 9, 10])
    data.ids[2] = torch.tensor([8, 9, 10, 8, 9, 10, 8])
    data.labels[0, 4:] = data.labels[1, 4:] = data.labels[3, 4:] = -100
    ewc = EWC(estimator="sample", normalize=False)
    lm_fit(tmp_path, ewc, data, SomebodysLM(tie=False))
    rows = ewc.importance["model.model.embed_tokens.weight"].sum(1)
    seen = torch.cat([data.ids[i, :3] for i in (0, 1, 3)]).unique()
    assert (rows[seen] > 0).all()
    assert not rows[8:].any()


def test_lm_tied_embeddings_count_once(tmp_path):
    data = Sequences(1, masked=[0, 1, 3, 5])
    ewc = EWC(estimator="empirical", normalize=False)
    module, ends = lm_fit(tmp_path, ewc, data)
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert "model.lm_head.weight" not in ewc.importance
    # The same weights untied show both gradients; the shared matrix has their sum, squared.
    untied = reference_lm(module, ends.weights[0], tie=False).double().eval()
    shared = (untied.model.embed_tokens.weight, untied.lm_head.weight)
    total, tokens = 0, 0
    for ids, labels in zip(data.ids, data.labels, strict=True):
        logits = untied(input_ids=ids[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        total = total + sum(torch.autograd.grad(loss, shared)).square()
        tokens += int((labels[1:] != -100).sum())
    expected = (total / tokens).float()
    torch.testing.assert_close(ewc.importance["model.model.embed_tokens.weight"], expected, rtol=1e-3, atol=1e-7)


def test_causal_lm_on_texts(tmp_path):
    texts = [f"the {animal} sleeps in the {place}" for animal in ("cat", "dog", "owl") for place in ("barn", "house")]
    tokenizer = TrainedBPE(vocab_size=270, cache_dir=str(tmp_path / "vocabulary"))
    data = TaskDataModule({"a": texts}, tokenizer=tokenizer, max_length=16, batch_size=2)
    torch.manual_seed(0)
    module = CausalLM(TINY_LLAMA, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    ewc, ends = EWC(estimator="empirical", normalize=False), Ends()
    run = trainer(tmp_path, [ewc, ends], max_epochs=1)
    fit_tasks(run, module, data)
    dataset, collate = ends.datasets[0], data.train_loader(data.tasks[0]).collate_fn
    samples = []
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        assert batch["attention_mask"].all()  # alone, no sample is padded
        samples.append((batch["input_ids"][0], batch["labels"][0]))
    model = LlamaForCausalLM(module.lm.config)
    model.load_state_dict(module.lm.state_dict())
    assert_same(ewc.importance, prefixed(lm_fisher(model, samples), "lm."), rtol=1e-3, atol=1e-7)
