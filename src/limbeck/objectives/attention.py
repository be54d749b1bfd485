"""Where the student looks beside where the teacher looks."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network, Scene
from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses import attention
from limbeck.objectives.layers import (
    LayerPair,
    Layers,
    check_layers,
    layer_pairs,
    number_of,
    teacher_of,
)
from limbeck.objectives.projections import Relation, Slice, find_slice

LOSSES = {"kl": attention.attention_kl, "mse": attention.attention_mse}


@register("objective", "attention_maps")
@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """Attention maps of chosen layers; head by head where both have as many, else their mean.

    Attributes:
        layers: which layer beside which, by number; see `objectives.layers.Layers`.
        loss: `kl` of the maps, or `mse` of the scores before the softmax.
    """

    asks: ClassVar[Needs] = frozenset({"attention"})
    needs: ClassVar[Needs] = frozenset({"attention"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = True

    layers: Layers = "last"
    loss: Literal["kl", "mse"] = "kl"

    def __post_init__(self) -> None:
        check_layers(self.layers)

    def finish(self, scene: Scene) -> "AttentionMapsAt":
        """The objective for the models at hand.

        Raises:
            RecipeError: a layer does not exist or is not a number, or the teacher reads more text.
        """
        pairs = layer_pairs(self.layers, scene)
        _only_numbers(pairs)
        if any(sample.privileged for sample in scene.samples):
            raise RecipeError(
                "", "only the teacher reads the privileged turns, so maps cannot be compared"
            )
        return AttentionMapsAt(pairs=pairs, loss=self.loss)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Not before `finish`."""
        raise RecipeError("", "attention_maps must be finished for the models at hand")


@dataclass(frozen=True, kw_only=True)
class AttentionMapsAt:
    """`AttentionMaps` of two models at hand; `pairs` are layers, the student's first."""

    kind: ClassVar[str] = "attention_maps"
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = True

    pairs: tuple[LayerPair, ...]
    loss: Literal["kl", "mse"]

    @property
    def asks(self) -> Needs:
        """Signals it reads of the student."""
        return frozenset(f"attention:{mine}" for mine, _ in self.pairs)

    @property
    def needs(self) -> Needs:
        """Signals it reads of the teacher."""
        return frozenset(f"attention:{theirs}" for _, theirs in self.pairs)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses, mean over the pairs."""
        loss = LOSSES[self.loss]
        values = [loss(student.attention[a], teacher.attention[b]) for a, b in self.pairs]
        return torch.stack(values).mean(0)


@register("objective", "attention_relations")
@dataclass(frozen=True, kw_only=True)
class AttentionRelations:
    """How each row's query, key or value lies to those of the rows before it.

    Widths, heads and tokenizers may differ, and attention may run in any kernel: only the outputs
    of the projections are read. The relations are among learnt rows that both models have.

    Attributes:
        layers: which layer beside which, by number; see `objectives.layers.Layers`.
        relations: of which vectors.
        heads: equal parts that each vector is cut into, which must divide all widths. `auto` takes
            for each relation the largest number that does, up to the student's own heads.
    """

    asks: ClassVar[Needs] = frozenset({"hidden"})
    needs: ClassVar[Needs] = frozenset({"hidden"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False

    layers: Layers = "last"
    relations: tuple[Relation, ...] = ("query", "key", "value")
    heads: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if not self.relations or len(set(self.relations)) < len(self.relations):
            raise RecipeError("relations", "name query, key and value, each at most once")

    def finish(self, scene: Scene) -> "AttentionRelationsAt":
        """The objective for the models at hand.

        Raises:
            RecipeError: a layer does not exist or is not a number, a model's projections are not
                known, or `heads` does not divide a width.
        """
        pairs = layer_pairs(self.layers, scene)
        _only_numbers(pairs)
        student, teacher = scene.student, teacher_of(scene)
        return AttentionRelationsAt(
            parts=tuple(
                self._part(relation, (int(mine), student), (int(theirs), teacher))
                for mine, theirs in pairs
                for relation in self.relations
            )
        )

    def _part(
        self, relation: Relation, mine: tuple[int, Network], theirs: tuple[int, Network]
    ) -> "Part":
        ours, other = (find_slice(network, layer, relation) for layer, network in (mine, theirs))
        divisors = attention.common_divisors(ours.width, other.width)
        if self.heads == "auto":
            most = mine[1].heads()
            return Part(ours, other, max(number for number in divisors if number <= most))
        if self.heads not in divisors:
            raise RecipeError(
                "heads",
                f"{self.heads} does not divide the widths of the {relation}s, {ours.width} (student"
                f" layer {mine[0]}) and {other.width} (teacher layer {theirs[0]}); these do: "
                + ", ".join(map(str, divisors)),
            )
        return Part(ours, other, self.heads)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Not before `finish`."""
        raise RecipeError("", "attention_relations must be finished for the models at hand")


@dataclass(frozen=True)
class Part:
    """One relation of one pair of layers: where its vectors are, and how many parts they have."""

    student: Slice
    teacher: Slice
    heads: int


@dataclass(frozen=True, kw_only=True)
class AttentionRelationsAt:
    """`AttentionRelations` of two models at hand."""

    kind: ClassVar[str] = "attention_relations"
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False

    parts: tuple[Part, ...]

    @property
    def asks(self) -> Needs:
        """Signals it reads of the student."""
        return frozenset(f"hidden:{part.student.site}" for part in self.parts)

    @property
    def needs(self) -> Needs:
        """Signals it reads of the teacher."""
        return frozenset(f"hidden:{part.teacher.site}" for part in self.parts)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses, mean over pairs and relations."""
        assert student.sample is not None
        values = [
            attention.relation_kl(
                part.student.of(student), part.teacher.of(teacher), student.sample, part.heads
            )
            for part in self.parts
        ]
        return torch.stack(values).mean(0)


def _only_numbers(pairs: tuple[LayerPair, ...]) -> None:
    for site in (site for pair in pairs for site in pair):
        if number_of(site) is None:
            raise RecipeError("layers", f"attention is of a layer; give its number for {site!r}")
