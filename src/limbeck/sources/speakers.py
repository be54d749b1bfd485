"""Who writes during training: the student, alone or with a teacher's help at every token.

    student       y ~ q
    mixed         y ~ alpha p + (1 - alpha) q                           MiniLLM's exploration
    speculative   y ~ q where y is among the teacher's k likeliest, else y ~ p   (q, then corrected)

with q the student's and p the teacher's distribution of the next token, both at the sampling's
temperature. The last two draw from one distribution that is known in closed form, so that its
log-probabilities are those of what was drawn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Speaking
from limbeck.core.registry import register
from limbeck.core.types import Sample, Sampling
from limbeck.models.following import Follower

Share = Annotated[float, Field(gt=0, lt=1)]


class SpeakerSpec(Protocol):
    """Who writes."""

    def write(
        self,
        student: Speaking,
        teachers: Mapping[str, Any],
        prompts: Sequence[Sample],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Sequence[Any]:
        """What is written behind each prompt (see `models.writing.Continuation`); None where
        nothing came that could be learnt. Where its `logp` is None, its tokens are not the
        student's, and the text is read as any other."""
        ...


def ids_of(student: Speaking, prompts: Sequence[Sample]) -> list[list[int]]:
    """The prompts as the student's token ids."""
    return [student.prompt_ids(prompt) for prompt in prompts]


@register("speaker", "student")
@dataclass(frozen=True, kw_only=True)
class StudentSpeaker:
    """The student alone."""

    def write(
        self,
        student: Speaking,
        teachers: Mapping[str, Any],
        prompts: Sequence[Sample],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Sequence[Any]:
        """Continue each prompt."""
        del teachers
        return student.write(ids_of(student, prompts), seeds, sampling)


@dataclass(frozen=True, kw_only=True)
class _WithTeacher(ABC):
    """The student with a teacher of the same tokenizer beside it.

    Attributes:
        teacher: its name in the recipe.
    """

    teacher: str

    @abstractmethod
    def mix(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[b, v] log-probabilities to draw from, of those of both."""

    def write(
        self,
        student: Speaking,
        teachers: Mapping[str, Any],
        prompts: Sequence[Sample],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Sequence[Any]:
        """Continue each prompt.

        Raises:
            RecipeError: there is no such teacher with weights, or it has another tokenizer.
        """
        other: Any = teachers.get(self.teacher)
        if not hasattr(other, "transformer"):
            raise RecipeError(
                "source.speaker.teacher", f"{self.teacher!r} is no teacher with weights at hand"
            )
        if other.vocabulary != student.vocabulary:
            raise RecipeError(
                "source.speaker.teacher",
                f"{self.teacher!r} has another tokenizer than the student, so they cannot write one"
                " text token by token; use the speaker `student`",
            )
        heat = sampling.temperature or 1.0

        def shift(attend: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            reader = getattr(other, "reader", other)
            follow = Follower(reader.transformer, attend)

            def mixed(ids: Tensor, logits: Tensor) -> Tensor:
                heard = follow(ids).to(logits.device)[:, : logits.shape[1]]
                wide = logits.float()
                if heard.shape[1] < wide.shape[1]:  # columns that no token uses
                    heard = torch.nn.functional.pad(
                        heard, (0, wide.shape[1] - heard.shape[1]), value=-torch.inf
                    )
                return self.mix((wide / heat).log_softmax(-1), (heard / heat).log_softmax(-1))

            return mixed

        # What comes out is softened already.
        drawn = replace(sampling, temperature=1.0) if sampling.temperature else sampling
        return student.write(ids_of(student, prompts), seeds, drawn, shift)


@register("speaker", "mixed")
@dataclass(frozen=True, kw_only=True)
class MixedSpeaker(_WithTeacher):
    """Student and teacher draw each token from a mixture of both.

    Attributes:
        alpha: the teacher's share.

    Source: Gu et al., "MiniLLM" (arXiv 2306.08543), teacher-mixed sampling.
    """

    alpha: Share = 0.2

    def mix(self, student: Tensor, teacher: Tensor) -> Tensor:
        """log(alpha p + (1 - alpha) q)."""
        shares = torch.tensor([self.alpha, 1 - self.alpha], device=student.device).log()
        return torch.logaddexp(teacher + shares[0], student + shares[1])


@register("speaker", "speculative")
@dataclass(frozen=True, kw_only=True)
class SpeculativeSpeaker(_WithTeacher):
    """The student proposes each token; the teacher replaces one that it finds unlikely.

    Attributes:
        k: of the teacher's likeliest tokens, among which a proposal stays.

    Source: Xu et al., "Speculative Knowledge Distillation" (arXiv 2410.11325).
    """

    k: Annotated[int, Field(gt=0)] = 25

    def mix(self, student: Tensor, teacher: Tensor) -> Tensor:
        """log(q 1[in the k likeliest] + (1 - q(k likeliest)) p)."""
        k = min(self.k, teacher.shape[-1])
        kept = torch.zeros_like(teacher, dtype=torch.bool)
        kept.scatter_(-1, teacher.topk(k).indices, True)
        accepted = student.masked_fill(~kept, -torch.inf)
        rejected = student.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.logaddexp(accepted, teacher + rejected)
