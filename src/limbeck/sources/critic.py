"""A critic that learns to tell given answers from the student's, and scores the student's.

It needs nothing of a teacher but its text: that is the completion of the given rows.

    D(x, y) = w h + b, with h the last hidden state of a copy of the student behind x and y
    L_D = -log sigma(D(x, y_given) - D(x, y_student))                      (Bradley-Terry)

The student's answers get D as their score, from which `group_policy` takes its advantage.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.core.random import seeded
from limbeck.core.registry import register
from limbeck.core.types import Encoding, Sample

LAST = "hidden:-1"
READ_AT_ONCE = 32
"""Answers that the critic reads together."""


@register("scorer", "critic")
@dataclass(frozen=True, kw_only=True)
class Critic:
    """A discriminator on a copy of the student, trained beside it (GAD).

    Attributes:
        learning_rate: of the critic's AdamW.
        clip: largest norm of its gradient.

    Source: Ye et al., "Black-Box On-Policy Distillation of Large Language Models"
    (arXiv 2511.10643).
    """

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def open(self, student: Any, mesh: Any, seed: int) -> "Discriminator":
        """The critic of this student, as it is now.

        Raises:
            RecipeError: the student is split over processes, of which no copy can be made.
        """
        if mesh is not None and mesh.parallel == "fsdp" and mesh.size > 1:
            raise RecipeError(
                "source.scorer", "the critic is a copy of the student, which `fsdp` splits; use ddp"
            )
        return Discriminator(self, student, seed)


class Discriminator:
    """The critic at work. All processes hold the same one and see the same answers.

    Attributes:
        name: under which the figures stand.
        figures: of its last update: loss, how often it told right, and the mean scores.
    """

    name = "critic"

    def __init__(self, spec: Critic, student: Any, seed: int) -> None:
        self.spec = spec
        self.model = type(student)(
            deepcopy(student.transformer),
            student.tokenizer,
            name="critic",
            max_length=student.encoder.max_length,
            autocast=student.autocast,
        )
        width = student.width("-1")
        with seeded(seed, "critic"):
            self.head = nn.Linear(width, 1).to(student.device)
        nn.init.zeros_(self.head.weight)  # so that at first it finds all answers equal
        nn.init.zeros_(self.head.bias)
        self.model.module.requires_grad_(True)
        named = [*self.model.module.named_parameters(), *self._of_head()]
        self.parameters = dict(named)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=spec.learning_rate, weight_decay=0.0
        )
        self._start_moments()
        self.figures: dict[str, float] = {}

    def judge(
        self, given: Sequence[Sample | None], groups: Sequence[Sequence[Sample]]
    ) -> list[list[Sample]]:
        """The answers with their scores; then the critic learns from them.

        Args:
            given: the row to each group's prompt; the critic learns where it has an answer.
            groups: the student's answers.
        """
        flat = [sample for group in groups for sample in group]
        with torch.no_grad():
            scores = self._scores(flat).tolist()
        judged = iter([replace(s, score=v) for s, v in zip(flat, scores, strict=True)])
        pairs = [
            (real, sample)
            for real, group in zip(given, groups, strict=True)
            for sample in group
            if real is not None and real.completion is not None
        ]
        if pairs:
            self._learn(pairs)
        return [[next(judged) for _ in group] for group in groups]

    def _learn(self, pairs: Sequence[tuple[Sample, Sample]]) -> None:
        """One step on all pairs."""
        self.model.module.train()
        total = right = 0.0
        means = torch.zeros(2)
        for first in range(0, len(pairs), READ_AT_ONCE):
            part = pairs[first : first + READ_AT_ONCE]
            real = self._scores([pair[0] for pair in part])
            mine = self._scores([pair[1] for pair in part])
            loss = nn.functional.softplus(mine - real)
            (loss.sum() / len(pairs)).backward()
            real, mine = real.detach(), mine.detach()
            total += float(loss.detach().sum())
            right += float((real > mine).sum())
            means += torch.stack([real.sum(), mine.sum()]).cpu()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.spec.clip)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.module.eval()
        real_mean, own_mean = (means / len(pairs)).tolist()
        self.figures = {
            "loss": total / len(pairs),
            "right": right / len(pairs),
            "given_score": real_mean,
            "student_score": own_mean,
        }

    def _scores(self, samples: Sequence[Sample]) -> Tensor:
        """[s] D of each sample's prompt and answer."""
        found: list[Tensor] = []
        for first in range(0, len(samples), READ_AT_ONCE):
            encodings = [self._closed(sample) for sample in samples[first : first + READ_AT_ONCE]]
            view = self.model.collate(encodings)
            said = self.model.read(view, frozenset({LAST}))
            found.append(self.head(said.hidden["-1"].float()).squeeze(-1))
        return torch.cat(found)

    def _closed(self, sample: Sample) -> Encoding:
        """The text with one more token, so that the state behind its last one is a row.

        Of the longest text the last token makes room: the model may have no position beyond.
        """
        encoding = self.model.encode(replace(sample, privileged=()))
        length = min(len(encoding.ids), self.model.encoder.max_length - 1)
        ids = [*encoding.ids[:length], self.model.encoder.pad]
        return Encoding.without_text(ids, [False] * length + [True], encoding.name)

    def _of_head(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"head.{name}", value) for name, value in self.head.named_parameters()]

    def _start_moments(self) -> None:
        """AdamW makes its moments in the first step; a checkpoint wants them before."""
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments; see `core.protocols.Carried`."""
        for name, parameter in self.parameters.items():
            yield name, parameter
            for moment, value in self.optimizer.state[parameter].items():
                yield f"{name}/{moment}", value
