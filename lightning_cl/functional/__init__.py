"""The mathematics of continual learning in plain torch.

Nothing in this folder imports Lightning: these functions can be used in any loop. The tests compare them with
closed forms and independent references.
"""

from lightning_cl.functional.agem import Projection, project_
from lightning_cl.functional.derpp import dark_loss, top_logits
from lightning_cl.functional.ewc import (
    expected_label_losses,
    fisher_diagonal,
    sampled_label_loss,
    squared_gradients,
)
from lightning_cl.functional.inflora import design_down_projection
from lightning_cl.functional.input_space import add_second_moment_, grow_basis, project_inputs_, protected_outputs
from lightning_cl.functional.interpolate import averaging_steps, interpolate
from lightning_cl.functional.low_rank import low_rank_product, low_rank_sum, mean_of_products, to_low_rank
from lightning_cl.functional.lwf import kl_divergence
from lightning_cl.functional.merge import accumulate, merge, task_vector
from lightning_cl.functional.orthogonal_lora import (
    down_overlap,
    earlier_basis,
    orthogonality_gradient,
    orthogonality_penalty,
    overlap_gradient,
    overlap_penalty,
    project_down_,
)
from lightning_cl.functional.penalty import (
    add_penalty_gradient_,
    merge_quadratics,
    normalize_importance,
    proximal_step_,
    quadratic_penalty,
    zero_non_finite_,
)
from lightning_cl.functional.product_penalty import (
    add_product_penalty_gradient_,
    product_penalty,
    product_penalty_gradients,
)
from lightning_cl.functional.progressive import fold_gated_adapters, lateral_sum
from lightning_cl.functional.retention import (
    average_over_rows,
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    kept_shares,
    largest_drop,
    mean_when_learnt,
    share_kept,
    with_worst,
    worst_task,
)
from lightning_cl.functional.sample_gradients import SampleGradients
from lightning_cl.functional.selection import herding, k_center
from lightning_cl.functional.si import path_importance, path_integral_step_, relative_damping
from lightning_cl.functional.subspace import (
    PrincipalSubspace,
    orthonormal_basis,
    principal_subspace,
    project_weights_,
    protected_share,
    protected_square,
    remove_span_,
    subspace_overlap,
)

__all__ = [
    "PrincipalSubspace",
    "Projection",
    "SampleGradients",
    "accumulate",
    "add_penalty_gradient_",
    "add_product_penalty_gradient_",
    "add_second_moment_",
    "average_over_rows",
    "average_score",
    "averaging_steps",
    "backward_transfer",
    "dark_loss",
    "design_down_projection",
    "down_overlap",
    "earlier_basis",
    "expected_label_losses",
    "fisher_diagonal",
    "fold_gated_adapters",
    "forgetting",
    "forward_transfer",
    "grow_basis",
    "herding",
    "interpolate",
    "intransigence",
    "k_center",
    "kept_shares",
    "kl_divergence",
    "largest_drop",
    "lateral_sum",
    "low_rank_product",
    "low_rank_sum",
    "mean_of_products",
    "mean_when_learnt",
    "merge",
    "merge_quadratics",
    "normalize_importance",
    "orthogonality_gradient",
    "orthogonality_penalty",
    "orthonormal_basis",
    "overlap_gradient",
    "overlap_penalty",
    "path_importance",
    "path_integral_step_",
    "principal_subspace",
    "product_penalty",
    "product_penalty_gradients",
    "project_",
    "project_down_",
    "project_inputs_",
    "project_weights_",
    "protected_outputs",
    "protected_share",
    "protected_square",
    "proximal_step_",
    "quadratic_penalty",
    "relative_damping",
    "remove_span_",
    "sampled_label_loss",
    "share_kept",
    "squared_gradients",
    "subspace_overlap",
    "task_vector",
    "to_low_rank",
    "top_logits",
    "with_worst",
    "worst_task",
    "zero_non_finite_",
]
