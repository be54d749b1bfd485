"""The student's hidden states beside the teacher's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Scene
from limbeck.core.random import seeded
from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses import features
from limbeck.objectives.layers import LayerPair, Layers, check_layers, layer_pairs, teacher_of

FeatureLoss = Literal["mse", "cosine", "correlation", "similarity", "cka"]
Projector = Literal["none", "linear", "mlp"]

OF_ANY_WIDTH = ("similarity", "cka")
"""Losses that compare spaces of different widths."""


@register("objective", "features")
@dataclass(frozen=True, kw_only=True)
class Features:
    """Hidden states of chosen layers, compared row by row or in how the rows lie to each other.

    With two tokenizers the rows are those at which both models have read the same text.

    Attributes:
        layers: which layer beside which; see `objectives.layers.Layers`.
        loss: `mse`, `cosine` and `correlation` compare unit with unit; `similarity` (of the tokens
            of a sample) and `cka` (over all rows) compare spaces of any widths.
        projector: what takes the student's width to the teacher's: `linear`, or `mlp` (linear,
            ReLU, linear). It trains with the student, is in checkpoints, and is not exported.
    """

    asks: ClassVar[Needs] = frozenset({"hidden"})
    needs: ClassVar[Needs] = frozenset({"hidden"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False

    layers: Layers = "last"
    loss: FeatureLoss = "mse"
    projector: Projector = "none"

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if self.loss in OF_ANY_WIDTH and self.projector != "none":
            raise RecipeError("projector", f"{self.loss} compares any widths; leave it out")

    def finish(self, scene: Scene) -> "FeaturesAt":
        """The objective for the models at hand, with its projectors.

        Raises:
            RecipeError: a layer does not exist, or widths differ and there is no projector.
        """
        pairs = layer_pairs(self.layers, scene)
        teacher = teacher_of(scene)
        widths = [(scene.student.width(mine), teacher.width(theirs)) for mine, theirs in pairs]
        for (mine, theirs), (narrow, wide) in zip(pairs, widths, strict=True):
            if narrow != wide and self.projector == "none" and self.loss not in OF_ANY_WIDTH:
                raise RecipeError(
                    "projector",
                    f"student {mine} is {narrow} wide and teacher {theirs} {wide}; set"
                    " `projector: linear`, or `loss: similarity` or `loss: cka`, which compare"
                    " any widths",
                )
        projectors: list[nn.Module] = []
        for (mine, theirs), (narrow, wide) in zip(pairs, widths, strict=True):
            with seeded(scene.seed, f"projector {mine} {theirs}"):
                projectors.append(make_projector(self.projector, narrow, wide))
        return FeaturesAt(pairs, self.loss, projectors)

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """Not before `finish`."""
        raise RecipeError("", "features must be finished for the models at hand")


class FeaturesAt(nn.Module):
    """`Features` of two models at hand.

    Args:
        pairs: sites, the student's and the teacher's.
        loss: by name.
        projectors: one for each pair.
    """

    kind = "features"
    unit: Unit = "token"
    shared_vocabulary = False

    def __init__(
        self, pairs: Sequence[LayerPair], loss: FeatureLoss, projectors: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.pairs, self.loss = tuple(pairs), loss
        self.asks: Needs = frozenset(f"hidden:{mine}" for mine, _ in pairs)
        self.needs: Needs = frozenset(f"hidden:{theirs}" for _, theirs in pairs)
        self.projectors = nn.ModuleList(projectors)

    def forward(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses, mean over the pairs."""
        values: list[Tensor] = []
        for (mine, theirs), projector in zip(self.pairs, self.projectors, strict=True):
            state = student.hidden[mine]
            # In float32 whatever the model computes in: a loss may be taken in or out of autocast.
            with features.exact(state):
                state = projector(state.float())
            values.append(self._compare(state, teacher.hidden[theirs], student.sample))
        return torch.stack(values).mean(0)

    def _compare(self, student: Tensor, teacher: Tensor, sample: Tensor | None) -> Tensor:
        if self.loss == "similarity":
            assert sample is not None
            return features.similarity(student, teacher, sample)
        return ROWS_ALONE[self.loss](student, teacher)


ROWS_ALONE = {
    "mse": features.hidden_mse,
    "cosine": features.hidden_cosine,
    "correlation": features.hidden_correlation,
    "cka": features.cka_loss,
}


def make_projector(kind: Projector, narrow: int, wide: int) -> nn.Module:
    """From the student's width to the teacher's, with torch's usual random weights."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(narrow, wide)
    return nn.Sequential(nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, wide))
