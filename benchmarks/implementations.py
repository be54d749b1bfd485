"""The same loss by everyone: mean KL(teacher || student), or Jensen-Shannon at beta 0.5, of rows.

Each implementation takes student hidden state [n, ds], student head [v, ds], teacher hidden state
[n, dt], teacher head [v, dt] and gives the mean over rows as a scalar with gradients to the
student's two. Peers are called as their own trainers call them, with their defaults.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

DIVERGENCES = ("forward_kl", "jensen_shannon")

PEERS_BETA = {"forward_kl": 0.0, "jensen_shannon": 0.5}
"""How TRL and Liger call these two: one family, with its limit at 0."""

CHUNKS = 8
"""Into how many chunks torchtune cuts the rows of its logits."""


@dataclass(frozen=True)
class Implementation:
    """How to make the loss, and how much memory it needs.

    Attributes:
        title: in the table.
        make: divergence -> loss; raises ImportError where a package is missing.
        tensors: how many [n, v] tensors of float32 it holds at its peak, by dtype; measured at
            2,048 x 32,000, and only used to leave out what would not fit.
        constant_bytes: what it needs besides.
    """

    title: str
    make: Callable[[str], Loss]
    tensors: Mapping[str, float]
    constant_bytes: float = 0.0


def log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, as one does who knows of low precision."""
    return F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)


def divergence_sum(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over rows, from logits, in the plainest way."""
    logq, logp = log_probabilities(student, teacher)
    if divergence == "forward_kl":
        return F.kl_div(logq, logp, reduction="sum", log_target=True)
    logm = torch.logaddexp(logq, logp) - math.log(2)
    to_teacher = F.kl_div(logm, logp, reduction="sum", log_target=True)
    return (to_teacher + F.kl_div(logm, logq, reduction="sum", log_target=True)) / 2


def naive(divergence: str) -> Loss:
    """`F.kl_div` on full logits."""

    def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = y @ teacher_head.T
        return divergence_sum(divergence, x @ head.T, teacher) / len(x)

    return loss


def compiled(divergence: str) -> Loss:
    """The naive one under `torch.compile`, projections included."""
    return torch.compile(naive(divergence))


def chunked(divergence: str) -> Loss:
    """torchtune's idea: the projections whole, the loss over chunks of their rows."""

    def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
        student = (x @ head.T).chunk(CHUNKS)
        with torch.no_grad():
            teacher = (y @ teacher_head.T).chunk(CHUNKS)
        sums = [divergence_sum(divergence, s, t) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(sums).sum() / len(x)

    return loss


def trl_dense(divergence: str) -> Loss:
    """What TRL's GKDTrainer computes from full logits, in the dtype of the logits."""
    from trl.experimental.gkd import GKDTrainer

    beta = PEERS_BETA[divergence]

    def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = y @ teacher_head.T
        return GKDTrainer.generalized_jsd_loss(x @ head.T, teacher, beta=beta)

    return loss


def trl_tiled(divergence: str) -> Loss:
    """What TRL's DistillationTrainer computes; it is private, and gives the entropy as well."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    beta = PEERS_BETA[divergence]

    def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
        mask = torch.ones(1, len(x), dtype=torch.long, device=x.device)
        value, _, _ = _chunked_divergence_loss(x[None], y[None], head, teacher_head, mask, beta)
        return value

    return loss


def liger(chunk_rows: int | None) -> Callable[[str], Loss]:
    """Liger's fused linear Jensen-Shannon family, its cross-entropy off; compiled, its default."""

    def make(divergence: str) -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        size = {} if chunk_rows is None else {"chunk_size": chunk_rows}
        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEERS_BETA[divergence], **size
        )

        def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
            labels = torch.zeros(len(x), dtype=torch.long, device=x.device)  # no row is ignored
            return module(x, head, y, teacher_head, labels)

        return loss

    return make


def liger_triton(divergence: str) -> Loss:
    """Liger's Triton kernel of the same family, which wants a GPU."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=PEERS_BETA[divergence])

    def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
        return module(x, head, y, teacher_head, None)

    return loss


def limbeck(implementation: str) -> Callable[[str], Loss]:
    """Ours, as the training loop calls it; `train.logits` says which implementation."""

    def make(divergence: str) -> Loss:
        from limbeck.losses.fused import fused_linear_divergence

        def loss(x: Tensor, head: Tensor, y: Tensor, teacher_head: Tensor) -> Tensor:
            return fused_linear_divergence(
                *(x, head, y, teacher_head),
                divergence=divergence,
                row_weight=torch.full((len(x),), 1 / len(x), device=x.device),
                implementation=implementation,
            )

        return loss

    return make


IMPLEMENTATIONS: dict[str, Implementation] = {
    "naive": Implementation(
        "naive `F.kl_div` on full logits", naive, {"float32": 7.0, "bfloat16": 6.0}
    ),
    "compiled": Implementation(
        "the same under `torch.compile`", compiled, {"float32": 2.0, "bfloat16": 1.1}
    ),
    "trl": Implementation("TRL GKD loss (dense)", trl_dense, {"float32": 9.0, "bfloat16": 4.5}),
    "trl-tiled": Implementation(
        "TRL tiled (DistillationTrainer)", trl_tiled, {"float32": 0.0, "bfloat16": 0.0}, 7e9
    ),
    "chunked": Implementation(
        "chunked over logits (torchtune's idea)", chunked, {"float32": 5.1, "bfloat16": 4.0}
    ),
    "liger": Implementation(
        "Liger, default chunk", liger(None), {"float32": 0.0, "bfloat16": 0.0}, 6e9
    ),
    "liger-256": Implementation(
        "Liger, 256-row chunks", liger(256), {"float32": 0.0, "bfloat16": 0.0}, 3e9
    ),
    "liger-triton": Implementation(
        "Liger, Triton kernel", liger_triton, {"float32": 0.0, "bfloat16": 0.0}, 6e9
    ),
    "limbeck": Implementation(
        "**limbeck**", limbeck("auto"), {"float32": 0.0, "bfloat16": 0.0}, 2e9
    ),
    "limbeck-chunked": Implementation(
        "**limbeck**, `logits: chunked`",
        limbeck("chunked"),
        {"float32": 0.0, "bfloat16": 0.0},
        2e9,
    ),
    "limbeck-compiled": Implementation(
        "**limbeck**, `logits: compiled`",
        limbeck("compiled"),
        {"float32": 0.0, "bfloat16": 0.0},
        2e9,
    ),
}
