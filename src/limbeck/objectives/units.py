"""The units of the teacher that count for the task, in the student's own units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Scene
from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses.features import exact, hidden_correlation
from limbeck.objectives.layers import LayerPair, Layers, check_layers, layer_pairs
from limbeck.objectives.selection import Cut, Select, Selection, select_units


@register("objective", "flex_kd")
@dataclass(frozen=True, kw_only=True)
class FlexKD:
    """Correlation of the student's units with as many of the teacher's, without a projector.

    Attributes:
        layers: which layer beside which; see `objectives.layers.Layers`.
        select: which units are kept of the wider model: those on which its output depends most
            (`attribution`), any (`random`), or none but the directions in which its states vary
            most (`pca`).
        examples: of the training data, on which that is found out.
    """

    asks: ClassVar[Needs] = frozenset({"hidden"})
    needs: ClassVar[Needs] = frozenset({"hidden"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False

    layers: Layers = "last"
    select: Select = "attribution"
    examples: Annotated[int, Field(gt=0)] = 64

    def __post_init__(self) -> None:
        check_layers(self.layers)

    def finish(self, scene: Scene) -> "FlexKDAt":
        """The objective for the models at hand, with the units chosen.

        The choice is kept in the scene's folder: `selection.safetensors`, and `selection.png`.

        Raises:
            RecipeError: a layer does not exist, or the examples are too few.
        """
        pairs = layer_pairs(self.layers, scene)
        return FlexKDAt(pairs, select_units(scene, pairs, self.select, self.examples))

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Not before `finish`."""
        raise RecipeError("", "flex_kd must be finished for the models at hand")


class FlexKDAt(nn.Module):
    """`FlexKD` of two models at hand; nothing in it trains.

    Unit j of the narrower model stands beside the j-th kept unit of the wider one, in the order
    that they have there.

    Args:
        pairs: sites, the student's and the teacher's.
        chosen: what is kept of the wider one of each pair.
    """

    kind = "flex_kd"
    unit: Unit = "token"
    shared_vocabulary = False

    def __init__(self, pairs: Sequence[LayerPair], chosen: Sequence[tuple[Cut, Selection]]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.asks: Needs = frozenset(f"hidden:{mine}" for mine, _ in pairs)
        self.needs: Needs = frozenset(f"hidden:{theirs}" for _, theirs in pairs)
        whole = nn.Identity()
        self.of_student = nn.ModuleList(
            Kept(selection) if cut.whose == "student" else whole for cut, selection in chosen
        )
        self.of_teacher = nn.ModuleList(
            Kept(selection) if cut.whose == "teacher" else whole for cut, selection in chosen
        )

    def forward(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses, mean over the pairs."""
        parts = zip(self.pairs, self.of_student, self.of_teacher, strict=True)
        values = [
            hidden_correlation(of_student(student.hidden[mine]), of_teacher(teacher.hidden[theirs]))
            for (mine, theirs), of_student, of_teacher in parts
        ]
        return torch.stack(values).mean(0)


class Kept(nn.Module):
    """[n, d] -> [n, k]: some units, or components along some directions."""

    units: Tensor | None
    directions: Tensor | None

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.register_buffer("units", selection.units)
        self.register_buffer("directions", selection.directions)

    def forward(self, states: Tensor) -> Tensor:
        """What is kept of each row."""
        if self.units is not None:
            return states[:, self.units]
        assert self.directions is not None
        with exact(states):
            return states.to(self.directions.dtype) @ self.directions
