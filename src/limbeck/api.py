"""Distillation from Python: a whole recipe, or a student, a teacher and data."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from limbeck.core.protocols import Objective
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.recipe.document import Document, read
from limbeck.recipe.report import Report
from limbeck.recipe.resolve import describe_term, resolve
from limbeck.recipe.run import run as run_recipe
from limbeck.recipe.schema import Recipe, Term


def run(
    recipe: Recipe | Mapping[str, Any] | str | PathLike[str],
    out: str | PathLike[str],
    *,
    resume: bool = False,
) -> Report:
    """Run a recipe, which may be a value, a mapping or a YAML file; `out` receives its files.

    Raises:
        RecipeError: the recipe is wrong.
        LimbeckError: the run failed; the message says what to do.
    """
    if not isinstance(recipe, Recipe):
        document = Document(recipe, {}) if isinstance(recipe, Mapping) else read(Path(recipe))
        return run_recipe(resolve(document), Path(out), resume, document)
    return run_recipe(recipe, Path(out), resume)


def distill(
    *,
    student: Any,
    data: Any,
    out: str | PathLike[str],
    teacher: Any = None,
    terms: Sequence[Term | Objective] | None = None,
    evals: Sequence[Any] | None = None,
    resume: bool = False,
    seed: int = 0,
    **train: Any,
) -> Report:
    """Distil a teacher into a student with the settings of a recipe.

    Args:
        student: folder or hub id, or the fields of a recipe's `student`.
        data: path or hub id, or the fields of a recipe's `source`.
        out: folder of the run; the trained student lies in `out/student`.
        teacher: folder or hub id, or the fields of a teacher; None for plain fine-tuning.
        terms: parts of the loss, as `Term` or just as objectives; by default the forward KL to the
            teacher, or cross-entropy without one.
        evals: as in a recipe; by default agreement with the teacher, and perplexity.
        resume: go on from the newest checkpoint in `out`.
        seed: of everything that is drawn.
        **train: fields of a recipe's `train`, such as `steps=500`.

    Returns:
        The report; its figures are also in `out/report.json` and `out/report.md`.
    """
    if terms is None:
        terms = [CrossEntropy() if teacher is None else ForwardKL()]
    if evals is None:
        evals = ["perplexity"] if teacher is None else ["agreement", "perplexity"]
    recipe: dict[str, Any] = {
        "student": {"name": str(student)} if isinstance(student, str | PathLike) else student,
        "source": {"path": str(data)} if isinstance(data, str | PathLike) else data,
        "terms": [describe_term(t if isinstance(t, Term) else Term(objective=t)) for t in terms],
        "evals": list(evals),
        "train": train,
        "seed": seed,
    }
    if teacher is not None:
        named = {"name": str(teacher)} if isinstance(teacher, str | PathLike) else teacher
        recipe["teachers"] = {"teacher": named}
    return run(recipe, out, resume=resume)
