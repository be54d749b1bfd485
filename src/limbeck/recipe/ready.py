"""From a recipe's objectives to those that are trained with, which know the models at hand."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network, Reader, Scene, Source
from limbeck.core.term import Term
from limbeck.models.causal import CausalModel
from limbeck.models.modes import evaluating
from limbeck.recipe.document import Document
from limbeck.recipe.schema import Recipe
from limbeck.train.mesh import Mesh

SAMPLES = 64
"""Of the training data, that an objective may look at before training, unless its `examples` say
more."""


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
    counts = [max(SAMPLES, getattr(term.objective, "examples", 0)) for term in recipe.terms]
    samples = [next(data) for _ in range(max(counts))]
    data.load_state_dict(place)
    terms: list[Term] = []
    with _notes(folder, mesh) as notes:
        for index, (term, count) in enumerate(zip(recipe.terms, counts, strict=True)):
            scene = Scene(
                student=student,
                teacher=cast(Network | None, teachers.get(term.teacher or "")),
                samples=samples[:count],
                seed=recipe.seed,
                folder=notes / re.sub(r"[^\w-]", "_", term.label),
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


@contextmanager
def _notes(kept: Path, mesh: Mesh) -> Iterator[Path]:
    """Where this process's objectives find what they found out before, and keep what is new.

    Only the first process's notes are kept, and all begin with those: to look at a split model
    takes all processes, so none may know what another has to look for.
    """
    if mesh.main:
        mesh.barrier()  # nothing new before all have the old
        yield kept
        return
    with tempfile.TemporaryDirectory() as copy:
        if kept.is_dir():
            shutil.copytree(kept, copy, dirs_exist_ok=True)
        mesh.barrier()
        yield Path(copy)


def _ready(term: Term, scene: Scene) -> Term:
    finish: Any = getattr(term.objective, "finish", None)
    if finish is None:
        return term
    networks = [n for n in (scene.student, scene.teacher) if isinstance(n, CausalModel)]
    with evaluating(*(network.module for network in networks)):
        # The label stays, whatever the finished objective is called.
        return replace(term, objective=finish(scene), name=term.label)
