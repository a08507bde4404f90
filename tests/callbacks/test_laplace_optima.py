"""Two and three linear-Gaussian tasks: where a Laplace approximation ends is known in closed form.

``y = W x + noise`` of variance one. The loss is quadratic, its curvature is ``A ⊗ I`` with ``A`` the second moment of
the inputs, and so is the Fisher. Inputs are correlated, so that the diagonal is not the whole of it.
"""

from __future__ import annotations

import itertools

import lightning as L
import pytest
import torch
from regularized import fit, weights
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cl import EWC, KFACEWC, L2SP, MAS

IN, OUT = 3, 2
# Residuals at the optimum: uncorrelated, of variance one, and of mean zero with every input.
RESIDUALS = torch.tensor(list(itertools.product((1.0, -1.0), repeat=OUT)))


class LinearGaussian(L.LightningModule):
    """The mean negative log likelihood up to a constant, by gradient descent on all data."""

    def __init__(self, rate=0.4):
        super().__init__()
        self.rate, self.layer = rate, nn.Linear(IN, OUT, bias=False)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return 0.5 * (y - self.layer(x)).square().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Task:
    """Inputs, the best weights, and all that follows from them."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        # Orthogonal columns, stretched and turned: correlated inputs, on which gradient descent is fast.
        columns = torch.linalg.qr(torch.randn(5, IN, generator=generator))[0] * 5**0.5
        turn = torch.linalg.qr(torch.randn(IN, IN, generator=generator))[0]
        self.inputs = columns * torch.tensor([2.0, 1.0, 0.5]).sqrt() @ turn
        self.best = torch.randn(OUT, IN, generator=generator)
        self.moment = (self.inputs.T @ self.inputs / len(self.inputs)).double()

    def data(self):
        x, residual = self.inputs.repeat_interleave(len(RESIDUALS), 0), RESIDUALS.repeat(len(self.inputs), 1)
        return TensorDataset(x, x @ self.best.T + residual)

    def curvature(self):
        """Of the loss, and the Fisher, for the weights row after row."""
        return torch.kron(torch.eye(OUT, dtype=torch.float64), self.moment)


TASKS = [Task(seed) for seed in (1, 2, 3)]


def train(root, method, tasks, epochs=100, rate=0.4):
    module = LinearGaussian(rate)
    fit(root, [method], module, {f"t{i}": t.data() for i, t in enumerate(tasks)}, batch_size=20, max_epochs=epochs)
    return weights(module)["layer.weight"]


def penalised(task, hessian, anchor):
    """The minimum of a task's loss plus ``½ (θ − anchor)ᵀ hessian (θ − anchor)``."""
    right = task.curvature() @ task.best.double().flatten() + hessian @ anchor.double().flatten()
    return torch.linalg.solve(task.curvature() + hessian, right).reshape(OUT, IN).float()


def joint(tasks):
    right = sum(t.best.double() @ t.moment for t in tasks)
    return torch.linalg.solve(sum(t.moment for t in tasks), right, left=False).float()


def test_the_problem_tells_the_optima_apart():
    first, second = TASKS[:2]
    diagonal = penalised(second, first.curvature().diagonal().diag(), first.best)
    optima = [first.best, second.best, joint(TASKS[:2]), diagonal]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(optima, 2))
    torch.testing.assert_close(penalised(second, first.curvature(), first.best), joint(TASKS[:2]))
    for task in TASKS:
        values = torch.linalg.eigvalsh(task.moment)
        torch.testing.assert_close(values, torch.tensor([0.5, 1.0, 2.0], dtype=values.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_ewc_ends_at_the_optimum_of_the_diagonal_laplace_approximation(tmp_path, strength, apply):
    first, second = TASKS[:2]
    method = EWC(strength, estimator="empirical", normalize=False, apply=apply)
    end = train(tmp_path, method, [first, second])
    fisher = first.curvature().diagonal().diag()
    torch.testing.assert_close(end, penalised(second, strength * fisher, first.best), rtol=0, atol=2e-4)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_kfac_ends_at_the_optimum_of_the_whole_laplace_approximation(tmp_path, strength, apply):
    first, second = TASKS[:2]
    method = KFACEWC(strength, estimator="empirical", normalize=False, apply=apply)
    end = train(tmp_path, method, [first, second])
    assert set(method.factors) == {"layer.weight"}
    torch.testing.assert_close(end, penalised(second, strength * first.curvature(), first.best), rtol=0, atol=2e-4)
    if strength == 1.0:
        torch.testing.assert_close(end, joint(TASKS[:2]), rtol=0, atol=2e-4)  # as if trained on both


def nearest_product(terms):
    """Van Loan: the leading singular vectors of ``Σ vec(A) vec(G)ᵀ``."""
    u, s, v = torch.linalg.svd(sum(torch.outer(a.flatten(), g.flatten()) for a, g in terms))
    return torch.kron(s[0] * v[0].reshape(OUT, OUT), u[:, 0].reshape(IN, IN))


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_kfac_of_three_tasks_ends_at_the_optimum_of_the_nearest_product(tmp_path, apply):
    # The second task ends away from its own optimum, so that the residuals there have another moment.
    first, second, third = TASKS
    method = KFACEWC(1.0, estimator="empirical", normalize=False, apply=apply)
    end = train(tmp_path, method, TASKS, epochs=300, rate=0.1)
    middle = joint([first, second])
    gap = (second.best - middle).double()
    residuals = torch.eye(OUT, dtype=torch.float64) + gap @ second.moment @ gap.T
    hessian = nearest_product([(first.moment, torch.eye(OUT, dtype=torch.float64)), (second.moment, residuals)])
    torch.testing.assert_close(end, penalised(third, hessian, middle), rtol=0, atol=5e-4)


def test_kfac_decays_what_it_has_and_what_it_adds(tmp_path):
    first, second = TASKS[:2]
    method = KFACEWC(1.0, estimator="empirical", normalize=False, decay=0.5)
    end = train(tmp_path, method, [first, second])
    torch.testing.assert_close(end, penalised(second, 0.5 * first.curvature(), first.best), rtol=0, atol=2e-4)
    assert method.factors["layer.weight"].trace() < 0.8 * (first.moment + second.moment).trace().item() * OUT


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
def test_mas_ends_at_the_optimum_of_its_quadratic(tmp_path, apply):
    # ∂‖Wx‖²/∂W = 2 (W x) xᵀ for each input.
    first, second = TASKS[:2]
    omega = 2 * torch.einsum("no,ni->noi", first.inputs @ first.best.T, first.inputs).abs().mean(0).double()
    method = MAS(0.2, normalize=False, apply=apply, outputs=lambda m, b: m.layer(b[0]))
    end = train(tmp_path, method, [first, second])
    torch.testing.assert_close(end, penalised(second, 0.2 * omega.flatten().diag(), first.best), rtol=0, atol=2e-4)


@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("anchor", ["previous", "start"])
def test_l2sp_ends_at_the_optimum_of_ridge_regression_towards_its_anchor(tmp_path, anchor, apply):
    first, second = TASKS[:2]
    identity = 0.7 * torch.eye(IN * OUT, dtype=torch.float64)
    end = train(tmp_path, L2SP(0.7, anchor=anchor, apply=apply), [first, second])
    target = first.best if anchor == "previous" else torch.zeros(OUT, IN)
    torch.testing.assert_close(end, penalised(second, identity, target), rtol=0, atol=2e-4)
