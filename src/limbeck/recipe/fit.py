"""Whether the parts of a recipe fit each other, as far as the recipe itself says."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

import limbeck.evals
from limbeck.core.errors import RecipeError
from limbeck.core.registry import did_you_mean, kinds
from limbeck.core.specs import CachedTeacher, EnsembleTeacher, SelfTeacher, ServerTeacher
from limbeck.core.term import Term
from limbeck.core.types import Needs, without_sites
from limbeck.losses.fused import why_not
from limbeck.recipe.document import Document
from limbeck.recipe.schema import Recipe

CACHE = "{kind: cache, path: FOLDER, of: {name: ...}, keep: sampled}"
"""A teacher that offers what only a cache can."""


def fit(recipe: Recipe, document: Document | None = None) -> Recipe:
    """Check that the parts of a recipe fit each other, and fill in what follows from them.

    Raises:
        RecipeError: naming the field.
    """
    document = document or Document({}, {})
    if not recipe.terms:
        raise document.error("terms", "there is no term, so nothing would be trained")
    _fit_student(recipe, document)
    for name, spec in recipe.teachers.items():
        if isinstance(spec, EnsembleTeacher):
            _fit_ensemble(spec, name, recipe, document)
    speaker = recipe.speaker
    if speaker is not None and speaker not in recipe.teachers:
        raise document.error("source.speaker.teacher", _no_teacher(speaker, recipe))
    terms = tuple(
        _fit_term(term, f"terms.{index}", recipe, document)
        for index, term in enumerate(recipe.terms)
    )
    labels = [term.label for term in terms]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise document.error(
                f"terms.{index}", f"a second {label!r}; give this term a `name` of its own"
            )
    for index, evaluation in enumerate(recipe.evals):
        if evaluation.needs_teacher and not recipe.others:
            raise document.error(
                f"evals.{index}",
                f"{evaluation.kind} needs a teacher that is a model on this machine",
            )
    try:
        limbeck.evals.check_names(recipe.evals)
    except RecipeError as error:
        raise document.error(error.field, error.reason) from None
    if reason := why_not(recipe.train.logits):
        raise document.error("train.logits", reason)
    return replace(recipe, terms=terms)


def _fit_student(recipe: Recipe, document: Document) -> None:
    student, teachers = recipe.student, recipe.teachers
    given = [key for key in ("name", "from_", "config") if getattr(student, key) is not None]
    if len(given) != 1:
        found = " and ".join(key.strip("_") for key in given) or "none of them"
        raise document.error("student", f"give one of name, from, config; it has {found}")
    if student.layers is not None and student.from_ is None:
        raise document.error("student.layers", "only goes with `from`")
    if student.from_ not in (None, "teacher", *teachers):
        raise document.error("student.from", _no_teacher(student.from_, recipe))
    origin = teachers.get(student.from_ or "")
    if isinstance(origin, SelfTeacher | ServerTeacher):
        raise document.error(
            "student.from", f"{student.from_!r} has no weights of its own to copy layers from"
        )
    if isinstance(origin, EnsembleTeacher):
        members = ", ".join(origin.of)
        raise document.error(
            "student.from", f"{student.from_!r} is an ensemble; name one of its models: {members}"
        )
    if student.quantize and not student.lora:
        raise document.error("student.quantize", "frozen weights need `lora` to train something")
    if student.dtype == "float32" and "flash" in (student.attention or ""):
        raise document.error("student.attention", "wants `dtype: bfloat16` or `float16` beside it")


def _no_teacher(name: str, recipe: Recipe) -> str:
    names = list(recipe.teachers)
    hint = did_you_mean(name, names) if names else "the recipe has no `teachers`"
    return f"no teacher {name!r}; {hint}"


def _fit_ensemble(spec: EnsembleTeacher, name: str, recipe: Recipe, document: Document) -> None:
    """Its members are other teachers that give logits, and no ensembles."""
    path = f"teachers.{name}.of"
    single = list(recipe.models)
    if len(spec.of) < 2:
        raise document.error(path, "an ensemble has at least two teachers")
    for member in spec.of:
        if member not in recipe.teachers:
            hint = did_you_mean(member, single) if single else "the recipe has no other teachers"
            raise document.error(f"{path}.{member}", f"no teacher {member!r}; {hint}")
        if isinstance(recipe.teachers[member], EnsembleTeacher):
            raise document.error(
                f"{path}.{member}", f"{member!r} is an ensemble too; name its teachers here"
            )
        if member not in single:
            raise document.error(f"{path}.{member}", f"{member!r} has no weights of its own")
        offers = recipe.teachers[member].offers
        if "logits" not in offers:
            raise document.error(
                f"{path}.{member}",
                f"an ensemble needs logits; {member!r} offers {', '.join(sorted(offers))} (a cache"
                " gives logits with `keep: hidden` or `keep: full`)",
            )
    cached = [isinstance(recipe.teachers[member], CachedTeacher) for member in spec.of]
    if any(cached) and not all(cached):
        raise document.error(
            path,
            "caches and models on this machine cannot be one ensemble: a cache may have nothing to"
            " say of a row; give each a term of its own, with its weight",
        )
    if spec.how == "route" and recipe.train.parallel == "fsdp":
        raise document.error(
            f"teachers.{name}.how",
            "with `parallel: fsdp` all processes must run a model together, and `route` runs it"
            " only where a sample asks for it; use ddp",
        )


def _fit_term(term: Term, path: str, recipe: Recipe, document: Document) -> Term:
    needs, kind = without_sites(term.objective.needs), getattr(term.objective, "kind", "objective")
    _fit_schedule(term, path, recipe, document)
    names = list(recipe.teachers)
    if not needs:
        if term.teacher is not None:
            raise document.error(f"{path}.teacher", f"{kind} listens to no teacher; leave it out")
        return term
    name = term.teacher
    only = list(recipe.readers) if len(names) > 1 else names
    if name is None and len(only) == 1:
        name = only[0]
    if name is None:
        found = f"one of: {', '.join(names)}" if names else "the recipe has no `teachers`"
        raise document.error(f"{path}.teacher", f"{kind} needs a teacher; {found}")
    if name not in recipe.teachers:
        raise document.error(f"{path}.teacher", _no_teacher(name, recipe))
    offers = recipe.teachers[name].offers
    if not needs <= offers:
        missing = needs - offers
        works = [
            other
            for other, cls in kinds("objective").items()
            if without_sites(getattr(cls, "needs", frozenset[str]())) <= offers
        ]
        raise document.error(
            f"{path}.objective",
            f"{kind} needs {', '.join(sorted(missing))}; teacher {name!r} offers "
            f"{', '.join(sorted(offers))}. These would work: {', '.join(works)}"
            + _remedy(recipe.teachers[name], name, missing),
        )
    if isinstance(recipe.teachers[name], CachedTeacher) and hasattr(recipe.source, "speaker"):
        raise document.error(
            f"{path}.teacher",
            f"{name!r} is a cache of given text, and cannot read what the student writes; name a"
            " teacher with weights",
        )
    _fit_temperature(term, recipe.teachers[name], name, path, document)
    return replace(term, teacher=name)


def _remedy(teacher: Any, name: str, missing: Needs) -> str:
    """How else a teacher may come to offer what is missing."""
    if isinstance(teacher, ServerTeacher) and missing <= {"chosen", "sparse"}:
        return f"; or set teachers.{name}.tokenizer, with which a server reads"
    return f"; or teachers.{name}: {CACHE}" if "sparse" in missing else ""


def _fit_temperature(term: Term, teacher: Any, name: str, path: str, document: Document) -> None:
    """What was kept of a distribution at one temperature cannot serve another."""
    if "sparse" not in term.objective.needs:
        return
    asked, kept = getattr(term.objective, "temperature", 1.0), teacher.temperature
    server = isinstance(teacher, ServerTeacher)
    fixed = (
        f"teacher {name!r} is {'told' if server else 'kept'} at {kept}, which cannot serve another"
    )
    if "temperature" in term.schedule:
        raise document.error(f"{path}.schedule.temperature", f"{fixed}; leave it out")
    if asked != kept:
        again = f", or teachers.{name}.temperature to {asked} and make the cache again"
        raise document.error(
            f"{path}.objective.temperature",
            f"it is {asked}, but {fixed}; set it to {kept}{'' if server else again}",
        )


def _fit_schedule(term: Term, path: str, recipe: Recipe, document: Document) -> None:
    """Each name is a number that can change, and both ends are values that it may have."""
    known = {"weight": _type_of(Term, "weight"), **_numbers(term.objective)}
    for name, ramp in term.schedule.items():
        place = f"{path}.schedule.{name}"
        if name not in known:
            raise document.error(
                place, f"no number that can change; {did_you_mean(name, [*known])}"
            )
        if name != "weight" and recipe.train.logits == "compiled":
            raise document.error(
                place, "with `logits: compiled` each step would be compiled anew; use `chunked`"
            )
        for end, value in (("from", ramp.from_), ("to", ramp.to)):
            try:
                TypeAdapter(known[name]).validate_python(value)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                reason = f"{reason[0].lower()}{reason[1:]}; it is {value!r}"
                raise document.error(f"{place}.{end}", reason) from None


def _numbers(objective: Any) -> Mapping[str, Any]:
    """The fields of an objective that may change from step to step, with their types."""
    cls = type(objective)
    finish = getattr(cls, "finish", None)
    if not is_dataclass(cls):
        return {}
    if finish is not None:  # what is trained with may be something else, without these fields
        try:
            made = get_type_hints(finish).get("return")
        except NameError:  # names that only a type checker sees
            made = None
        if not isinstance(made, type) or not issubclass(made, cls):
            return {}
    types = {field.name: _type_of(cls, field.name) for field in fields(cls)}
    return {name: kind for name, kind in types.items() if float in (kind, *get_args(kind)[:1])}


def _type_of(cls: Any, name: str) -> Any:
    return get_type_hints(cls, include_extras=True)[name]
