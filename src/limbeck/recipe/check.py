"""What a recipe needs of the world: models that exist and fit each other. No weights are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from limbeck.core.errors import RecipeError
from limbeck.core.registry import kinds
from limbeck.models.facts import ModelFacts, facts_of
from limbeck.recipe.document import Document
from limbeck.recipe.schema import Recipe


@dataclass(frozen=True)
class Facts:
    """The models of a recipe, as far as they are known without weights."""

    student: ModelFacts
    teachers: Mapping[str, ModelFacts]


def check(recipe: Recipe, document: Document | None = None) -> Facts:
    """Look at every model that the recipe names.

    Raises:
        ModelError: a model is missing, unsafe or of an unknown kind.
        RecipeError: an objective compares tokens of two different tokenizers, or a layer that is
            to be kept does not exist.
    """
    document = document or Document({}, {})
    try:
        teachers = {name: facts_of(spec, {}) for name, spec in recipe.teachers.items()}
        student = facts_of(recipe.student, recipe.teachers)
    except RecipeError as error:
        raise document.error(error.field, error.reason) from None
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
    return Facts(student, teachers)
