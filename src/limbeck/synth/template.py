"""Requests of steps that make rows: plain files with `{named}` places, ours or a user's."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from limbeck.core.errors import RecipeError
from limbeck.synth.judging import filled, template_text

__all__ = ["filled", "ours", "template"]


def ours(name: str) -> str:
    """The text of a template that comes with the package.

    >>> "{instruction}" in ours("evolve_deepen")
    True
    """
    place = files("limbeck.synth").joinpath("templates", f"{name}.txt")
    return place.read_text(encoding="utf-8")


def template(
    path: str | None, name: str, folder: Path, places: Sequence[str], field: str = "template"
) -> str:
    """A template's text: a user's file, or ours; each of the places must be in it, and no other.

    Args:
        path: of the user's file, from `folder` where it is relative; None takes ours.
        name: of ours.
        folder: where the recipe's relative paths start.
        places: the names between braces.
        field: of the recipe, for messages.

    Raises:
        RecipeError: the file cannot be read, lacks a place, or has an unknown one.
    """
    try:
        return template_text(path, ours(name) if path is None else "", folder, places)
    except RecipeError as error:
        raise RecipeError(field, error.reason) from None
