"""What a recipe needs of the world: models that exist and fit each other. No weights are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from limbeck.core.errors import ModelError, RecipeError
from limbeck.core.registry import kinds
from limbeck.core.specs import (
    CachedTeacher,
    EnsembleTeacher,
    SelfTeacher,
    ServerTeacher,
    model_of,
)
from limbeck.models.facts import ModelFacts, facts_of, facts_of_tokenizer
from limbeck.models.positions import known_positions
from limbeck.recipe.document import Document
from limbeck.recipe.schema import Recipe
from limbeck.teachers.remains import model_folder, remembered_facts


@dataclass(frozen=True)
class Facts:
    """The models of a recipe, as far as they are known without weights.

    Attributes:
        student: facts of the student.
        teachers: facts of each teacher; of a cached one, those of the model behind it. An ensemble
            has as many parameters as all its models; a server's are not known, which is 0.
        models: what to load of each teacher but the ensembles. Where a cache's model is gone, what
            the cache keeps of it, which has a tokenizer and no weights.
        gone: the teachers of which only a cache is left.
    """

    student: ModelFacts
    teachers: Mapping[str, ModelFacts]
    models: Mapping[str, Any]
    gone: frozenset[str] = frozenset()


def check(recipe: Recipe, document: Document | None = None) -> Facts:
    """Look at every model that the recipe names.

    Raises:
        ModelError: a model is missing, unsafe or of an unknown kind.
        RecipeError: an objective compares tokens of two different tokenizers, or looks at more
            tokens than there are; a layer that is to be kept does not exist; a cache would keep
            more tokens than there are; a sample may be longer than a model can read; the models of
            an ensemble have different tokenizers.
    """
    document = document or Document({}, {})
    teachers: dict[str, ModelFacts] = {}
    models = {name: model_of(spec) for name, spec in recipe.models.items()}
    gone: set[str] = set()
    try:
        for name, spec in recipe.models.items():
            try:
                teachers[name] = facts_of(models[name], {})
            except ModelError:
                if not isinstance(spec, CachedTeacher) or Path(spec.of.name).expanduser().exists():
                    raise
                if (remembered := remembered_facts(spec)) is None:
                    raise
                teachers[name] = remembered
                models[name] = replace(spec.of, name=str(model_folder(spec.path)), tokenizer=None)
                gone.add(name)
            _check_k(spec, teachers[name], name, document)
        for name, spec in recipe.readers.items():
            if isinstance(spec, EnsembleTeacher):
                teachers[name] = _together(spec, name, teachers, document)
            if isinstance(spec, ServerTeacher):
                teachers[name] = facts_of_tokenizer(str(spec.tokenizer))
        _check_origin(recipe, gone, document)
        student = facts_of(recipe.student, models)
        itself = [n for n, s in recipe.readers.items() if isinstance(s, SelfTeacher)]
        teachers |= dict.fromkeys(itself, student)
    except RecipeError as error:
        raise document.error(error.field, error.reason) from None
    _check_lengths(recipe, student, teachers, gone, document)
    _check_vocabularies(recipe, student, teachers, document)
    _check_ranked(recipe, student, teachers, document)
    return Facts(student, teachers, models, frozenset(gone))


def _check_k(spec: Any, facts: ModelFacts, name: str, document: Document) -> None:
    """A cache can keep no more tokens than there are."""
    if not isinstance(spec, CachedTeacher) or "sparse" not in spec.offers:
        return
    columns = _columns(facts)
    if spec.k > columns:
        raise document.error(
            f"teachers.{name}.k",
            f"{spec.k:,} is more than the teacher's {columns:,} tokens; `keep: topk` with"
            f" `k: {columns}` keeps all of them",
        )


def _check_lengths(
    recipe: Recipe,
    student: ModelFacts,
    teachers: Mapping[str, ModelFacts],
    gone: set[str],
    document: Document,
) -> None:
    """No model reads samples that go on behind the last position that it knows."""
    asked = recipe.student.max_length
    readers = [("the student", recipe.student, student, "student.max_length", asked)]
    for name, outer in recipe.models.items():
        spec, facts = model_of(outer), teachers[name]
        length = spec.max_length or asked
        if facts.vocabulary == student.vocabulary:
            length = max(length, asked)  # it reads what the student reads, too
        of = f"teachers.{name}" if spec is outer else f"teachers.{name}.of"
        field = "student.max_length" if length == asked else f"{of}.max_length"
        if name not in gone:
            readers.append((f"teacher {name!r}", spec, facts, field, length))
    for who, spec, facts, field, length in readers:
        most = getattr(facts.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(most, int) or length <= most:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                facts.config, trust_remote_code=spec.trust_remote_code
            )
        if known_positions(model, facts.config) is not None:
            raise document.error(
                field,
                f"{length:,} is more than the {most:,} positions that {who} has; set it to"
                f" {most} or less",
            )


def _together(
    spec: EnsembleTeacher, name: str, teachers: Mapping[str, ModelFacts], document: Document
) -> ModelFacts:
    """Facts of an ensemble, whose models must have one tokenizer."""
    first, *others = spec.of
    for other in others:
        if teachers[other].vocabulary != teachers[first].vocabulary:
            raise document.error(
                f"teachers.{name}.of.{other}",
                f"{other!r} and {first!r} have different tokenizers, and an ensemble compares them"
                " token by token; give each a term of its own",
            )
    # Only the columns that all of them have are left.
    narrow = min((teachers[member] for member in spec.of), key=_columns)
    return replace(narrow, parameters=sum(teachers[member].parameters for member in spec.of))


def _columns(facts: ModelFacts) -> int:
    return facts.config.get_text_config().vocab_size


def _check_ranked(
    recipe: Recipe, student: ModelFacts, teachers: Mapping[str, ModelFacts], document: Document
) -> None:
    """An objective cannot look at more tokens than there are."""
    for index, term in enumerate(recipe.terms):
        k = getattr(term.objective, "k", None)
        if not isinstance(k, int) or term.teacher is None:
            continue
        columns = min(_columns(student), _columns(teachers[term.teacher]))
        if k > columns:
            raise document.error(
                f"terms.{index}.objective.k",
                f"{k:,} is more than the {columns:,} tokens that there are",
            )


def _check_origin(recipe: Recipe, gone: set[str], document: Document) -> None:
    """A student cannot be cut from a teacher of which only a cache is left."""
    origin = recipe.student.from_
    if origin is not None and gone & {origin, *(recipe.models if origin == "teacher" else ())}:
        name = next(iter(gone)) if origin == "teacher" else origin
        raise document.error(
            "student.from",
            f"the weights of teacher {name!r} are gone ({recipe.teachers[name].of.name}); a cache"
            " keeps none. Give the student a `name` or a `config`",
        )


def _check_vocabularies(
    recipe: Recipe, student: ModelFacts, teachers: Mapping[str, ModelFacts], document: Document
) -> None:
    for index, term in enumerate(recipe.terms):
        if term.teacher is None or not term.objective.shared_vocabulary:
            continue
        if teachers[term.teacher].vocabulary != student.vocabulary:
            works = [
                name
                for name, cls in kinds("objective").items()
                if not getattr(cls, "shared_vocabulary", True)
            ]
            raise document.error(
                f"terms.{index}.objective",
                f"student and teacher {term.teacher!r} have different tokenizers, and "
                f"{getattr(term.objective, 'kind', 'this objective')} compares them token by token;"
                f" these would work: {', '.join(works)}",
            )
