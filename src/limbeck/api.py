"""Distillation from Python: a whole recipe, or a student, a teacher and data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Objective
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.recipe.document import Document, read
from limbeck.recipe.report import Report
from limbeck.recipe.resolve import describe, describe_term, resolve
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
    if isinstance(recipe, Recipe):  # as it would be written, so that it is checked like any other
        recipe = _written(recipe)
    document = Document(recipe, {}) if isinstance(recipe, Mapping) else read(Path(recipe))
    return run_recipe(resolve(document), Path(out), resume, document)


def distill(
    *,
    student: Any,
    data: Any,
    out: str | PathLike[str],
    teacher: Any = None,
    terms: Sequence[Term | Objective | Mapping[str, Any] | str] | Objective | str | None = None,
    evals: Sequence[Any] | str | None = None,
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
        terms: parts of the loss, each a `Term`, just an objective, or as a recipe writes them; by
            default the forward KL to the teacher, or cross-entropy without one.
        evals: values, or as in a recipe; by default agreement with the teacher, and perplexity.
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
        "student": _named(student, "name", "student"),
        "source": _named(data, "path", "data"),
        "terms": _terms(terms),
        "evals": _list(evals, "evals"),
        "train": train,
        "seed": seed,
    }
    if teacher is not None:
        recipe["teachers"] = {"teacher": _named(teacher, "name", "teacher")}
    return run(recipe, out, resume=resume)


def _written(recipe: Recipe) -> dict[str, Any]:
    """A recipe's value as one would write it; parts that are written already stay."""
    teachers = recipe.teachers
    if isinstance(teachers, Mapping):
        teachers = {name: _part(spec, f"teachers.{name}") for name, spec in teachers.items()}
    return {
        "student": _part(recipe.student, "student"),
        "source": _part(recipe.source, "source"),
        "teachers": teachers,
        "terms": _terms(recipe.terms),
        "train": asdict(recipe.train) if is_dataclass(recipe.train) else recipe.train,
        "evals": _list(recipe.evals, "evals"),
        "compare": recipe.compare,
        "price": asdict(recipe.price) if is_dataclass(recipe.price) else recipe.price,
        "seed": recipe.seed,
    }


def _terms(values: Any) -> list[Any]:
    return [_term(value, f"terms.{index}") for index, value in enumerate(_several(values))]


def _term(value: Any, field: str) -> Any:
    if isinstance(value, str):
        return {"objective": value}
    if isinstance(value, Mapping):
        inner = {k: _part(v, f"{field}.{k}") for k, v in value.items() if k == "objective"}
        return {**value, **inner}
    return _part(value if isinstance(value, Term) else Term(objective=value), field, describe_term)


def _list(values: Any, field: str) -> list[Any]:
    return [_part(value, f"{field}.{index}") for index, value in enumerate(_several(values))]


def _several(values: Any) -> list[Any]:
    """One part may stand for a list of one."""
    many = isinstance(values, Sequence) and not isinstance(values, str)
    return list(values) if many else [values]


def _named(value: Any, key: str, field: str) -> Any:
    """A path or a hub id is a part that has a name alone."""
    return {key: str(value)} if isinstance(value, str | PathLike) else _part(value, field)


def _part(value: Any, field: str, written: Callable[[Any], dict[str, Any]] = describe) -> Any:
    """A part of a recipe as one would write it; what is written already is checked with the rest.

    Raises:
        RecipeError: it is neither written nor a value of a registered kind.
    """
    if value is None or isinstance(value, str | Mapping):
        return value
    try:
        return written(value)
    except (AttributeError, PydanticSerializationError):
        reason = f"no value that a recipe could name; it is {value!r:.60}"
        raise RecipeError(field, reason) from None
