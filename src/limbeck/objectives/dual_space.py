"""Distillation in both models' spaces, whose tokenizers may differ."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network, Scene
from limbeck.core.random import seeded
from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses.dual_space import (
    cross_attention,
    mean_of_sample,
    student_space,
    teacher_space,
)
from limbeck.losses.features import exact
from limbeck.losses.projection import Projection
from limbeck.objectives.layers import teacher_of
from limbeck.objectives.token import Temperature

Align = Literal["attention", "bytes"]

PROJECTION: Needs = frozenset({"projection"})


@register("objective", "dual_space")
@dataclass(frozen=True, kw_only=True)
class DualSpace:
    """Each model's last states, projected, are read by the other one's head and compared there.

    Attributes:
        align: how a row finds its partners: `attention` learns it, among all rows of the sample;
            `bytes` takes the row at which the other model has read the same text.
        temperature: of both KLs, which are multiplied by its square.
    """

    asks: ClassVar[Needs] = frozenset({"projection", "hidden"})
    needs: ClassVar[Needs] = frozenset({"projection", "hidden"})
    unit: ClassVar[Unit] = "sample"
    shared_vocabulary: ClassVar[bool] = False

    align: Align = "attention"
    temperature: Temperature = 2.0

    def __post_init__(self) -> None:
        if self.align == "bytes":
            object.__setattr__(self, "unit", "token")

    def finish(self, scene: Scene) -> "DualSpaceAt":
        """The objective for the models at hand, with its projectors.

        Raises:
            RecipeError: it is not known how one of the models makes its logits.
        """
        student = _look(scene.student, scene, "student")
        teacher = _look(teacher_of(scene), scene, "teacher")
        with seeded(scene.seed, "dual_space"):
            return DualSpaceAt(student, teacher, self.align, self.temperature)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Not before `finish`."""
        raise RecipeError("", "dual_space must be finished for the models at hand")


@dataclass(frozen=True)
class Ends:
    """Both ends of a network.

    Attributes:
        embedding: the site of the input embedding.
        embedding_width: of what it gives.
        head_width: of what the head reads.
    """

    embedding: str
    embedding_width: int
    head_width: int

    @property
    def address_width(self) -> int:
        """Of an input embedding and a row of the head together."""
        return self.embedding_width + self.head_width


class DualSpaceAt(nn.Module):
    """`DualSpace` of two models at hand; `to_student`, `to_teacher` and `query` are projectors."""

    kind = "dual_space"
    shared_vocabulary = False

    def __init__(self, student: Ends, teacher: Ends, align: Align, temperature: float) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.temperature = temperature
        self.asks, self.needs = PROJECTION, PROJECTION
        self.unit: Unit = "token"
        self.to_student = nn.Linear(teacher.head_width, student.head_width)
        self.to_teacher = nn.Linear(student.head_width, teacher.head_width)
        self.query: nn.Linear | None = None
        if align == "attention":
            self.unit = "sample"
            self.asks = PROJECTION | {f"hidden:{student.embedding}"}
            self.needs = PROJECTION | {f"hidden:{teacher.embedding}"}
            self.query = nn.Linear(student.address_width, teacher.address_width)

    def forward(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses; the student's rows each get the mean of the teacher's in their sample."""
        with exact(student.labels):
            if self.query is None:
                return self._side_by_side(_head(student), _head(teacher), student.labels)
            assert student.sample is not None
            assert teacher.sample is not None
            # Rows without weight are gone, and a model may have been cut short: what is of one
            # side alone has nobody to look at.
            mine = torch.isin(student.sample, teacher.sample).nonzero().flatten()
            theirs = torch.isin(teacher.sample, student.sample).nonzero().flatten()
            values = self._by_attention(self.query, student.select(mine), teacher.select(theirs))
            return values.new_zeros(len(student.labels)).index_put((mine,), values)

    def _side_by_side(self, said: Projection, heard: Projection, labels: Tensor) -> Tensor:
        """[n] where row stands beside row."""
        to_student = self.to_student(self._exact(heard.hidden.to(labels.device)).detach())
        to_teacher = self.to_teacher(self._exact(said.hidden))
        return student_space(
            said, to_student, labels, temperature=self.temperature
        ) + teacher_space(heard, to_teacher, temperature=self.temperature)

    def _by_attention(self, query: nn.Linear, student: Signals, teacher: Signals) -> Tensor:
        """[n] where all rows of both are of the same samples."""
        said, heard = _head(student), _head(teacher)
        assert student.sample is not None
        assert teacher.sample is not None
        states = self._exact(heard.hidden.to(student.labels.device)).detach()
        target = self._exact(_targets(heard, teacher.labels)).to(states)
        asked = self._address(student, self.student, _targets(said, student.labels))
        to_student, to_teacher = cross_attention(
            query(asked),
            self._address(teacher, self.teacher, target),
            # Weights of a row's attention sum to 1, so states may be projected before or after.
            self.to_teacher(self._exact(said.hidden)),
            self.to_student(states + _of_length_1(target) * states.norm(dim=-1, keepdim=True)),
            student.sample,
            teacher.sample,
        )
        ours = student_space(said, to_student, student.labels, temperature=self.temperature)
        theirs = teacher_space(heard, to_teacher, temperature=self.temperature)
        return ours + mean_of_sample(theirs, teacher.sample, student.sample)

    def _address(self, signals: Signals, ends: Ends, target: Tensor) -> Tensor:
        """[n, e] what a row is known by: the token that it reads and the one that it predicts.

        Each half has mean square 1, row by row, so that the value depends on nothing else in the
        batch. It is only an address: no gradient goes there.
        """
        read = self._exact(signals.hidden[ends.embedding]).detach()
        halves = (read, self._exact(target).to(read))
        return torch.cat([_of_length_1(x) * x.shape[1] ** 0.5 for x in halves], -1)

    def _exact(self, values: Tensor) -> Tensor:
        """In the projectors' own type, whatever the models compute in."""
        return values.to(self.to_student.weight.dtype)


def _head(signals: Signals) -> Projection:
    if signals.projection is None:
        raise RecipeError(
            "",
            "dual_space reads the output head, which is not at hand where all logits are made at"
            " once: set `train.logits: auto`, and take out terms that need all logits together",
        )
    return signals.projection


def _targets(head: Projection, labels: Tensor) -> Tensor:
    """[n, d] the head's rows of the tokens that came next.

    They stand for the tokens' embeddings: they are these where both are tied, and else they are of
    the space of the states, to which they are added.
    """
    return head.weight.detach()[labels.to(head.device)].to(labels.device)


def _of_length_1(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _look(network: Network, scene: Scene, whose: str) -> Ends:
    """The widths of a network's two ends, as it says of a sample.

    Raises:
        RecipeError: its head is not known.
    """
    if not network.offers >= PROJECTION:
        raise RecipeError(
            "",
            f"dual_space puts other states into the {whose}'s output head, and how that makes its"
            " logits is not known here, or it is split over processes (`train.parallel: fsdp`)",
        )
    embedding = network.embedding_name()
    view = network.collate([network.encode(scene.samples[0])])
    with torch.no_grad():
        said = network.read(view, PROJECTION | {f"hidden:{embedding}"})
    return Ends(embedding, said.hidden[embedding].shape[1], _head(said).hidden.shape[1])
