"""What the tests of distillation share: a spy on every step, and the gradient that plain torch gives it."""

from __future__ import annotations

import copy

import lightning as L
import torch
from regularized import TASKS, Sequences, fit
from torch.nn import functional as F


class Recorder(L.Callback):
    """Each step's batch, the module's state before it, and the gradient that came of it."""

    def __init__(self):
        self.starts, self.steps, self.ends = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.starts.append(copy.deepcopy(pl_module.state_dict()))
        self.steps.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch, self.state = copy.deepcopy(batch), copy.deepcopy(pl_module.state_dict())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.steps[-1].append((self.batch, self.state, gradient))

    def on_train_end(self, trainer, pl_module):
        self.ends.append(copy.deepcopy(pl_module.state_dict()))


def divergence(teacher, student, temperature=2.0, top_k=None):
    """``T² · mean KL(teacher ‖ student)`` of logits ``[positions, classes]``."""
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    if top_k is not None:
        best = p.topk(top_k, -1).indices
        rest = 1 - log_q.exp().gather(-1, best).sum(-1, keepdim=True)
        log_q = torch.cat([log_q.gather(-1, best), rest.log()], -1)
        p = p.gather(-1, best)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()


def loaded(module, state):
    other = copy.deepcopy(module)
    other.load_state_dict(state)
    return other


class Reference:
    """What a step's gradient must be: the module's own loss plus the distillation term, by autograd."""

    def __init__(self, module, own, logits, strength=1.0, **settings):
        self.module, self.own, self.logits = module, own, logits
        self.strength, self.settings = strength, settings

    def gradient(self, batch, state, teacher, mask=None, training=True):
        student = loaded(self.module, state).train(training)
        loss = self.own(student, batch)
        if teacher is not None:
            with torch.no_grad():
                z_t = self.logits(loaded(self.module, teacher).eval(), batch)
            z_s = self.logits(student, batch)
            if mask is not None:
                z_t, z_s = z_t[mask], z_s[mask]
            if len(z_t):
                loss = loss + self.strength * divergence(z_t, z_s, **self.settings)
        theta = {n: p for n, p in student.named_parameters() if p.requires_grad}
        return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def assert_gradients(steps, reference, teacher, mask=None, error=1e-4):
    """All gradients of a task's steps, to a relative error of their whole length."""
    assert steps
    for number, (batch, state, actual) in enumerate(steps):
        expected = reference.gradient(batch, state, teacher, mask(batch) if mask else None)
        assert actual.keys() == expected.keys()
        length = sum(e.square().sum() for e in expected.values()) ** 0.5
        for n, e in expected.items():
            off = (actual[n] - e).norm() / length
            assert off <= error, f"step {number}, {n}: off by {off:.1e}"


def own_loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def classifier_reference(module, **settings):
    return Reference(module, own_loss, lambda m, b: m(b[0]), **settings)


def classifier_run(root, method, module=None, tasks=TASKS, **settings):
    recorder = Recorder()
    module = fit(root, [method, recorder], module, tasks, **settings)
    module.trainer = None
    return module, recorder


def lm_logits(module, batch):
    """Logits of the positions that bear loss, one below the other."""
    keep = {k: v for k, v in batch.items() if k != "labels"}
    model = module.lm if hasattr(module, "lm") else module.model
    logits = model(**keep).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100]


def lm_own(module, batch):
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(lm_logits(module, batch), targets[targets != -100])


def lm_reference(module, **settings):
    return Reference(module, lm_own, lm_logits, **settings)


LM_TASKS = {"a": Sequences(1, [0, 1, 3, 5, 2, 4, 0, 6]), "b": Sequences(2, [3, 0, 2, 5, 1, 4, 6, 0])}


def lm_run(root, methods, module, tasks=LM_TASKS, **settings):
    recorder = Recorder()
    fit(root, [*methods, recorder], module, tasks, **{"batch_size": 4, "max_epochs": 2} | settings)
    module.trainer = None
    return module, recorder
