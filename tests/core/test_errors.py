"""Errors read as one line, survive pickling, and are also the built-in ones they resemble."""

import pickle

import pytest

from limbeck.core import errors


def test_a_recipe_error_names_its_place():
    of = errors.RecipeError
    assert str(of("a.b", "bad", "f.yaml", 3)) == "f.yaml:3: a.b: bad"
    assert str(of("a.b", "bad", "f.yaml")) == "f.yaml:1: a.b: bad"
    assert str(of("", "bad", "f.yaml", 3)) == "f.yaml:3: bad"
    assert str(of("a.b", "bad")) == "a.b: bad"
    assert str(of("", "bad")) == "bad"
    again = pickle.loads(pickle.dumps(of("a.b", "bad", "f.yaml", 3)))
    assert str(again) == "f.yaml:3: a.b: bad"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.RecipeError, ValueError),
        (errors.DataError, ValueError),
        (errors.ModelError, ValueError),
        (errors.CheckpointError, OSError),
        (errors.DivergedError, ArithmeticError),
        (errors.Interrupted, InterruptedError),
    ],
)
def test_each_has_two_families(kind, builtin):
    assert issubclass(kind, errors.LimbeckError)
    assert issubclass(kind, builtin)
