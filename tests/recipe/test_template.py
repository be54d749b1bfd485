"""`limbeck init` writes a recipe that resolves, for every objective there is."""

import pytest

import limbeck.recipe.resolve  # noqa: F401  # registers the kinds
from limbeck.core.errors import RecipeError
from limbeck.core.registry import kinds
from limbeck.recipe.document import parse
from limbeck.recipe.resolve import resolve
from limbeck.recipe.template import template

PLACES = {"student": "Qwen/Qwen3-0.6B", "teacher": "Qwen/Qwen3-4B", "data": "data.jsonl"}


@pytest.mark.parametrize("kind", kinds("objective"))
def test_it_resolves_with_defaults(kind):
    text = template(kind, **PLACES)
    recipe = resolve(parse(text))
    assert recipe.terms[0].objective == kinds("objective")[kind]()
    assert bool(recipe.teachers) == bool(recipe.terms[0].objective.needs)
    assert len(text.splitlines()) <= 40
    assert recipe.student.name == PLACES["student"]


@pytest.mark.parametrize("place", ["a: b", "it's # here", '"quoted"', "- x", "[a]", "ä b", "{x}"])
def test_places_with_odd_names_survive(place):
    recipe = resolve(parse(template("forward_kl", student=place, teacher=place, data=place)))
    assert recipe.student.name == recipe.teachers["big"].name == recipe.source.path == place


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("group_policy", "rollouts"),
        ("on_policy_kl", "rollouts"),
        ("candidates", "{prompt, completion, group, score}, as the step `distribution` makes"),
        ("sequence_ranking", "{prompt, completion, group, score}, as the step `rank` makes"),
        ("forward_kl", "rows of {prompt, completion}"),
    ],
)
def test_the_source_is_one_from_which_the_method_learns(method, source):
    text = template(method, **PLACES)
    assert source in text
    if method == "group_policy":
        made = resolve(parse(text)).source
        assert made.scorer is not None
        assert made.answers > 1


def test_an_unknown_method():
    with pytest.raises(RecipeError, match="did you mean 'forward_kl'"):
        template("forwardkl", **PLACES)
