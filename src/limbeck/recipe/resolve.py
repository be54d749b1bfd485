"""From a document to a `Recipe` and back: kinds are looked up, every field is checked."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

import limbeck.evals  # noqa: F401  # registers the evaluations
import limbeck.objectives  # noqa: F401  # registers the objectives
import limbeck.sources  # noqa: F401  # registers the sources
import limbeck.synth  # noqa: F401  # registers the steps
from limbeck.core.errors import RecipeError
from limbeck.core.registry import did_you_mean, kinds
from limbeck.core.specs import ServerTeacher
from limbeck.core.text import one_line
from limbeck.recipe.document import Document
from limbeck.recipe.fit import fit
from limbeck.recipe.schema import Price, Recipe, Term, Train

DEFAULT_KINDS = {"student": "causal", "teacher": "local", "source": "dataset"}

LAYOUT = (
    "accumulate",
    "packing",
    "logits",
    "parallel",
    "device",
    "save_every",
    "keep",
    "patience",
    "profile",
)
"""Settings of `train` that change how a run is laid out, not what it computes."""

Value = TypeVar("Value")


def resolve(document: Document) -> Recipe:
    """The recipe that a document describes.

    Raises:
        RecipeError: a field is unknown, missing, of the wrong type or out of range; or fields do
            not fit each other. It names file, line and field.
    """
    values = document.values
    _known(values, [field.name for field in fields(Recipe)], "", document)
    for key in ("student", "source", "terms"):
        if values.get(key) is None:
            raise document.error(key, "is missing")
    teachers = _teachers(document)
    parts: dict[str, Any] = {
        "student": _kind("student", values["student"], "student", document),
        "source": _kind("source", values["source"], "source", document),
        "teachers": teachers,
        "terms": tuple(
            _term(value, f"terms.{index}", document)
            for index, value in enumerate(_list(values["terms"], "terms", document))
        ),
        "evals": tuple(
            _kind("eval", value, f"evals.{index}", document)
            for index, value in enumerate(_list(_or(values.get("evals"), []), "evals", document))
        ),
    }
    for name, cls in (("train", Train), ("price", Price)):
        parts[name] = _dataclass(cls, _or(values.get(name), {}), name, document)
    simple = {key: values[key] for key in ("compare", "seed") if values.get(key) is not None}
    recipe = _validated(Recipe, {**parts, **simple}, "", document)
    return fit(recipe, document)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `limbeck generate` needs of a recipe; it may have nothing else."""

    source: Any
    teachers: Mapping[str, Any]
    student: Any
    seed: int
    file: str | None


def resolve_generation(document: Document) -> Generation:
    """The part of a recipe that makes data: source, teachers, seed, and the student if it has one.

    Raises:
        RecipeError: a field is unknown, missing, of the wrong type or out of range.
    """
    values = document.values
    _known(values, [field.name for field in fields(Recipe)], "", document)
    if values.get("source") is None:
        raise document.error("source", "is missing")
    student, seed = values.get("student"), _or(values.get("seed"), 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise document.error("seed", f"a whole number from 0 is wanted; it is {seed!r}")
    return Generation(
        source=_kind("source", values["source"], "source", document),
        teachers=_teachers(document),
        student=None if student is None else _kind("student", student, "student", document),
        seed=seed,
        file=document.file,
    )


def generation_of(recipe: Recipe, file: str | None = None) -> Generation:
    """The same of a whole recipe, which was read from a file."""
    return Generation(
        source=recipe.source,
        teachers=recipe.teachers,
        student=recipe.student,
        seed=recipe.seed,
        file=file,
    )


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values with all defaults; `resolve` makes the same recipe of it."""
    return {
        "student": describe(recipe.student),
        "teachers": {name: describe(teacher) for name, teacher in recipe.teachers.items()},
        "source": describe(recipe.source),
        "terms": [describe_term(term) for term in recipe.terms],
        "train": _fields(recipe.train),
        "evals": [describe(evaluation) for evaluation in recipe.evals],
        "compare": recipe.compare,
        "price": _fields(recipe.price),
        "seed": recipe.seed,
    }


def describe(value: Any) -> dict[str, Any]:
    """A value of a registered kind as a recipe writes it."""
    parts: dict[str, Any] = {}
    for part in getattr(value, "parts", {}):
        inner = getattr(value, part)
        if isinstance(inner, tuple):
            parts[part] = [describe(one) for one in inner]
        elif inner is not None:
            parts[part] = describe(inner)
    return {"kind": value.kind, **_fields(value, set(parts)), **parts}


def describe_term(term: Term) -> dict[str, Any]:
    """A term as a recipe writes it."""
    skip = {"objective"} if term.schedule else {"objective", "schedule"}
    return {"objective": describe(term.objective), **_fields(term, skip)}


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)


def sha256(recipe: Recipe) -> str:
    """Hash of the whole resolved recipe."""
    return _hash(to_mapping(recipe))


def training_sha256(recipe: Recipe) -> str:
    """Hash of what decides the trained weights; a checkpoint of another one is refused.

    Layout, evaluations, prices and budgets may change between a run and its resume.
    """
    values = to_mapping(recipe)
    train = {key: value for key, value in values["train"].items() if key not in LAYOUT}
    kept = {key: values[key] for key in ("student", "source", "terms", "seed")}
    heard = {
        name: spec.identity if isinstance(spec, ServerTeacher) else values["teachers"][name]
        for name, spec in recipe.teachers.items()
        if name in recipe.readers or name == recipe.speaker
    }
    return _hash({**kept, "teachers": heard, "train": train})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _teachers(document: Document) -> dict[str, Any]:
    given = _mapping(_or(document.values.get("teachers"), {}), "teachers", document)
    return {name: _kind("teacher", v, f"teachers.{name}", document) for name, v in given.items()}


def _term(value: Any, path: str, document: Document) -> Term:
    given = dict(_mapping(value, path, document))
    if "objective" not in given:
        raise document.error(path, "has no objective")
    given["objective"] = _kind("objective", given["objective"], f"{path}.objective", document)
    return _dataclass(Term, given, path, document)


def _kind(slot: str, value: Any, path: str, document: Document) -> Any:
    """A value of a registered kind; a bare word is a kind without settings."""
    if isinstance(value, str) and slot in ("eval", "objective", "step"):
        value = {"kind": value}
    given = dict(_mapping(value, path, document))
    name = given.pop("kind", DEFAULT_KINDS.get(slot))
    known = kinds(slot)
    if name is None:
        raise document.error(path, f"has no kind; one of: {', '.join(known)}")
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(str(name), list(known))
        raise document.error(f"{path}.kind", f"no {slot} {name!r}; {hint}")
    for part, inner in getattr(known[name], "parts", {}).items():
        place = f"{path}.{part}"
        if inner.endswith("s") and part in given:  # a list of kinds
            listed = _list(given[part], place, document)
            slot_of = inner.removesuffix("s")
            made = [_kind(slot_of, v, f"{place}.{i}", document) for i, v in enumerate(listed)]
            given[part] = tuple(made)
        elif given.get(part) is not None:
            given[part] = _kind(inner, given[part], place, document)
    return _dataclass(known[name], given, path, document)


def _dataclass(cls: type[Value], value: Any, path: str, document: Document) -> Value:
    given = _mapping(value, path, document)
    _known_fields(cls, given, path, document)
    return _validated(cls, given, path, document)


def _validated(cls: type[Value], given: Mapping[str, Any], path: str, document: Document) -> Value:
    try:
        result = TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in _location(first["loc"], given))
        field = f"{path}.{place}".strip(".")
        if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            raise document.error(field, "is missing") from None
        own = first.get("ctx", {}).get("error")
        if isinstance(own, RecipeError):  # the part's own check, which names its field
            raise document.error(f"{field}.{own.field}".strip("."), own.reason) from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        shown = one_line(repr(first["input"]), 60)
        raise document.error(field, f"{one_line(reason)}; it is {shown}") from None
    if (place := _true_number(given, result, path)) is not None:
        raise document.error(place, "a number is wanted, not true or false")
    if (place := _not_finite(given, path)) is not None:
        raise document.error(place, "a finite number is wanted")
    return result


def _not_finite(given: Any, path: str) -> str | None:
    """Where NaN or infinity stands in free-form values, such as `student.config`."""
    if isinstance(given, float):
        return None if math.isfinite(given) else path
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(given, Mapping):
        pairs = given.items()
    elif isinstance(given, list):
        pairs = enumerate(given)
    found = (_not_finite(item, f"{path}.{key}".strip(".")) for key, item in pairs)
    return next((place for place in found if place is not None), None)


def _true_number(given: Any, made: Any, path: str) -> str | None:
    """Where `true` or `false` was taken as a number, which pydantic and Python do silently."""
    if isinstance(given, bool):
        taken = isinstance(made, int | float) and not isinstance(made, bool)
        return path if taken else None
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(given, Mapping):
        of = made.get if isinstance(made, Mapping) else partial(_attribute, made)
        pairs = [(key, item, of(key)) for key, item in given.items()]
    elif isinstance(given, list) and isinstance(made, list | tuple):
        pairs = [(i, *both) for i, both in enumerate(zip(given, made, strict=False))]
    found = (_true_number(old, new, f"{path}.{key}".strip(".")) for key, old, new in pairs)
    return next((place for place in found if place is not None), None)


def _attribute(made: Any, key: str) -> Any:
    """A field's value by the name that a recipe writes."""
    return getattr(made, key, getattr(made, f"{key}_", None))


def _location(loc: tuple[int | str, ...], given: Mapping[str, Any]) -> list[int | str]:
    """The part of pydantic's location that names places in the document, not branches of types."""
    found: list[int | str] = []
    value: Any = given
    for part in loc:
        if isinstance(value, Mapping) and (part in value or not found):
            found.append(part)
            value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            found.append(part)
            value = value[part]
        elif isinstance(value, Mapping) and isinstance(part, str) and part.isidentifier():
            found.append(part)
            break
    return found


def _known(given: Mapping[str, Any], names: list[str], path: str, document: Document) -> None:
    for key in given:
        if key not in names:
            field = f"{path}.{key}".strip(".")
            raise document.error(field, f"unknown field; {did_you_mean(key, names)}")


def _known_fields(cls: Any, given: Mapping[str, Any], path: str, document: Document) -> None:
    """The same for all fields of a class, and of classes inside it: `lora`, each `schedule`."""
    _known(given, [_alias(field.name) for field in fields(cls)], path, document)
    types = get_type_hints(cls)
    for key, item in given.items():
        by_name = get_origin(types.get(key)) is Mapping
        for inner in (types.get(key), *get_args(types.get(key))):
            if not is_dataclass(inner) or not isinstance(item, Mapping):
                continue
            parts = item if by_name else {"": item}
            for name, part in parts.items():
                if isinstance(part, Mapping):
                    _known_fields(inner, part, f"{path}.{key}.{name}".rstrip("."), document)


def _or(value: Any, default: Any) -> Any:
    """The default where a part is absent or left empty; `false` and `0` are mistakes."""
    return default if value is None else value


def _mapping(value: Any, path: str, document: Document) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise document.error(path, f"a mapping is wanted; it is {value!r:.60}")
    return value


def _list(value: Any, path: str, document: Document) -> list[Any]:
    if not isinstance(value, list):
        raise document.error(path, f"a list is wanted; it is {value!r:.60}")
    return value


def _fields(value: Any, skip: set[str] | None = None) -> dict[str, Any]:
    made = TypeAdapter(type(value)).dump_python(value, mode="json", by_alias=True, exclude=skip)
    # Left out, a null would become the field's default again.
    silent = {_alias(field.name) for field in fields(value) if field.default is None}
    found = {_alias(key): item for key, item in made.items()}
    return {key: item for key, item in found.items() if item is not None or key not in silent}


def _alias(name: str) -> str:
    """`from_` is written `from`, which is a keyword in Python."""
    return name.removesuffix("_")
