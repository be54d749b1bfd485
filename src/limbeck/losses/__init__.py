"""Pure tensor functions from logits to one loss per row: (student, teacher) -> [n].

No mask, shift or reduction happens here; the loop does that once for all of them.
"""

from limbeck.losses.decoupled import decoupled_kd
from limbeck.losses.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from limbeck.losses.interpolated import taid
from limbeck.losses.labels import cross_entropy
from limbeck.losses.order import ranking
from limbeck.losses.policy import top_k_reverse_kl
from limbeck.losses.powers import alpha_beta
from limbeck.losses.regression import logit_mse
from limbeck.losses.sparse import sparse_kl
from limbeck.losses.transport import sinkhorn, sorted_l1

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "cross_entropy",
    "decoupled_kd",
    "forward_kl",
    "jensen_shannon",
    "logit_mse",
    "ranking",
    "reverse_kl",
    "sinkhorn",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sorted_l1",
    "sparse_kl",
    "taid",
    "top_k_reverse_kl",
    "total_variation",
]
