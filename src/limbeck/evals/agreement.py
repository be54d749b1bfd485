"""How closely the student follows its teacher on held-out text, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck import losses
from limbeck.align.spans import pair
from limbeck.core.errors import DataError
from limbeck.core.registry import register
from limbeck.core.types import Sample, Spans
from limbeck.evals.reading import (
    BATCH_TOKENS,
    Logits,
    as_student,
    batches,
    chunks,
    evaluating,
    read_logits,
    tell_once,
)
from limbeck.evals.score import Score, ratio_interval, share_interval


@register("eval", "agreement")
@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Mean KL(teacher || student) and the share of equal most likely tokens, over learnt rows.

    Every learnt row counts one, whatever its sample's weight. The teacher reads what is privileged,
    the student does not, as in training. Where the two models' logits have different widths (a
    vocabulary padded for speed), only the columns that both have are compared. Both scores are
    absent where the tokenizers differ, a model does not give logits, or nothing is held out.

    Attributes:
        batch_tokens: tokens, with padding, of one forward pass.
    """

    name: ClassVar[str] = "agreement"
    needs_teacher: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("kl_nats", "top1")

    batch_tokens: Annotated[int, Field(gt=0)] = BATCH_TOKENS

    def check(self) -> None:
        """It reads nothing but the held-out samples."""

    def measure(self, model: Any, teacher: Any, holdout: Sequence[Sample]) -> dict[str, Score]:
        """`kl_nats` (nats a row) and `top1` (share), both over n rows.

        Raises:
            DataError: the held-out samples have no learnt token.
        """
        if not holdout:
            tell_once("agreement is not measured: no samples are held out; see `source.holdout`")
            return {}
        if model.vocabulary != teacher.vocabulary:
            tell_once(
                f"agreement is not measured: {model.name} and {teacher.name} have different "
                "tokenizers; bits_per_byte of `perplexity` compares such models"
            )
            return {}
        for reader in (model, teacher):
            if "logits" not in reader.offers:
                tell_once(f"agreement is not measured: {reader.name} does not give logits")
                return {}
        kl, same, rows = self._sums(model, teacher, holdout)
        n = int(sum(rows))
        if n == 0:
            raise DataError(
                "agreement: the held-out samples have no learnt token; give rows with a "
                "completion, or raise `max_length` where all of it is cut off"
            )
        mean, kl_interval = ratio_interval(kl, rows)
        if kl_interval is not None:  # KL cannot be negative, whatever a symmetric interval says
            kl_interval = (max(0.0, kl_interval[0]), kl_interval[1])
        share, share_range = share_interval(same, rows)
        return {
            "kl_nats": Score(
                value=mean, n=n, interval95=kl_interval, better="lower", unit="nats/token"
            ),
            "top1": Score(value=share, n=n, interval95=share_range, better="higher", unit="share"),
        }

    @torch.no_grad()
    def _sums(
        self, model: Any, teacher: Any, holdout: Sequence[Sample]
    ) -> tuple[list[float], list[float], list[float]]:
        """Each sample's summed KL, equal top tokens and number of rows."""
        left = [model.encode(as_student(sample)) for sample in holdout]
        right = [teacher.encode(sample) for sample in holdout]
        lengths = [
            max(len(own.ids), len(other.ids)) if own.rows and other.rows else 0
            for own, other in zip(left, right, strict=True)
        ]
        kl = torch.zeros(len(holdout), dtype=torch.float64)
        same, rows = torch.zeros_like(kl), torch.zeros_like(kl)
        with evaluating(model, teacher):
            for group in batches(lengths, self.batch_tokens):
                view = model.collate([left[index] for index in group])
                other = teacher.collate([right[index] for index in group])
                pairing = pair(view, other, [1.0] * len(group), same_vocabulary=True)
                own, theirs = read_logits(model, view), read_logits(teacher, other)
                place = torch.tensor(group)[view.sample_of(view.rows).cpu()]
                mine, beside = pairing.student, pairing.teacher
                assert not isinstance(mine, Spans)
                assert not isinstance(beside, Spans)
                if mine is not None:
                    place = place[mine]
                row_kl, row_same = _compare(own, theirs, mine, beside)
                kl.index_add_(0, place, row_kl)
                same.index_add_(0, place, row_same)
                rows.index_add_(0, place, torch.ones_like(row_kl))
        return kl.tolist(), same.tolist(), rows.tolist()


def _compare(
    student: Logits, teacher: Logits, student_rows: Tensor | None, teacher_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL and equality of the top token for each pair of rows, float64 on the CPU.

    Only one chunk of each model's rows is made, copied or converted at a time.
    """
    width = min(student.shape[1], teacher.shape[1])
    pairs = student.shape[0] if student_rows is None else len(student_rows)
    kl = torch.zeros(pairs, dtype=torch.float64)
    same = torch.zeros_like(kl)
    for part in chunks(pairs, width):
        own = student.rows(part, student_rows)[:, :width]
        theirs = teacher.rows(part, teacher_rows)[:, :width].to(own.device)
        kl[part] = losses.forward_kl(own.float(), theirs.float()).double().cpu()
        same[part] = (own.argmax(-1) == theirs.argmax(-1)).double().cpu()
    return kl, same
