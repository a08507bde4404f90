"""The mathematics of continual learning in plain torch.

Nothing in this folder imports Lightning: these functions can be used in any loop, and they are what the tests hold
against closed forms and independent references.
"""

from lightning_cl.functional.distillation import kl_divergence
from lightning_cl.functional.fisher import (
    expected_label_losses,
    fisher_diagonal,
    sampled_label_loss,
    squared_gradients,
)
from lightning_cl.functional.path_integral import path_importance, path_integral_step_
from lightning_cl.functional.penalty import (
    add_penalty_gradient_,
    merge_quadratics,
    normalize_importance,
    proximal_step_,
    quadratic_penalty,
    zero_non_finite_,
)
from lightning_cl.functional.retention import (
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
)
from lightning_cl.functional.sample_gradients import SampleGradients

__all__ = [
    "SampleGradients",
    "add_penalty_gradient_",
    "average_score",
    "backward_transfer",
    "expected_label_losses",
    "fisher_diagonal",
    "forgetting",
    "forward_transfer",
    "kl_divergence",
    "merge_quadratics",
    "normalize_importance",
    "path_importance",
    "path_integral_step_",
    "proximal_step_",
    "quadratic_penalty",
    "sampled_label_loss",
    "squared_gradients",
    "zero_non_finite_",
]
