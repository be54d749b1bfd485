"""From a recipe's objectives to those that are trained with, which know the models at hand."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network, Reader, Scene, Source
from limbeck.core.term import Term
from limbeck.models.causal import CausalModel
from limbeck.recipe.document import Document
from limbeck.recipe.schema import Recipe
from limbeck.train.mesh import Mesh

SAMPLES = 64
"""Of the training data, that objectives may look at before training."""


def ready_terms(
    recipe: Recipe,
    student: CausalModel,
    teachers: Mapping[str, Reader],
    source: Source,
    folder: Path,
    mesh: Mesh,
    document: Document | None = None,
) -> tuple[Term, ...]:
    """The terms with every objective finished; see `core.protocols.Scene`.

    What objectives find out from data is kept in `folder`, where a resumed run finds it. The source
    is left where it was.

    Raises:
        RecipeError: an objective does not fit the models: a layer that is not there, widths that
            differ. It names the line.
    """
    document = document or Document({}, {})
    if not any(hasattr(term.objective, "finish") for term in recipe.terms):
        return recipe.terms
    data = getattr(source, "given", source)
    place = data.state_dict()
    samples = [next(data) for _ in range(SAMPLES)]
    data.load_state_dict(place)
    # All processes look together, since a split model needs them all; each keeps its own notes.
    folder = folder if mesh.main else folder / f".process-{mesh.rank}"
    terms: list[Term] = []
    for index, term in enumerate(recipe.terms):
        scene = Scene(
            student=student,
            teacher=cast(Network | None, teachers.get(term.teacher or "")),
            samples=samples,
            seed=recipe.seed,
            folder=folder / re.sub(r"[^\w-]", "_", term.label),
        )
        try:
            terms.append(_ready(term, scene))
        except RecipeError as error:
            field = f"terms.{index}.objective.{error.field}".strip(".")
            raise document.error(field, error.reason) from None
    for term in terms:
        if isinstance(term.objective, torch.nn.Module):
            term.objective.to(mesh.device)
    return tuple(terms)


def _ready(term: Term, scene: Scene) -> Term:
    finish: Any = getattr(term.objective, "finish", None)
    if finish is None:
        return term
    networks = [n for n in (scene.student, scene.teacher) if isinstance(n, CausalModel)]
    modes = [(network.module, network.module.training) for network in networks]
    for module, _ in modes:
        module.eval()
    try:
        # The label stays, whatever the finished objective is called.
        return replace(term, objective=finish(scene), name=term.label)
    finally:
        for module, training in modes:
            module.train(training)
