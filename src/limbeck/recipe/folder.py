"""The folder of a run: who may take it, and what of an earlier try may go."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from limbeck.core.errors import RecipeError
from limbeck.core.files import discard, held, sweep
from limbeck.recipe.document import read
from limbeck.recipe.resolve import resolve, training_sha256
from limbeck.recipe.schema import Recipe
from limbeck.train.checkpoint import sorted_checkpoints
from limbeck.train.mesh import Mesh

RECIPE = "recipe.yaml"
UNTRAINED = {RECIPE, "metrics.jsonl", "evals.json", "terms", "checkpoints", "profile"}
"""What a run may leave that ends before its first step."""


def look(out: Path, resume: bool) -> None:
    """See that a run may take `out`, as far as that can be said without its recipe.

    Raises:
        RecipeError: it is a file, holds something else, or holds a run and `resume` is off.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError("--out", f"{out} is a file, not a folder")
    # Hidden files are a lock and half-written ones, which a run that was killed at once leaves.
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return
    if not (out / RECIPE).exists():
        raise RecipeError("--out", f"{out} is not empty and holds no run; give another folder")
    if not _began(out) and not _written_by_a_run(out / RECIPE):
        raise RecipeError("--out", f"{out} holds your recipe; give a folder of its own")
    if not resume and not _nothing_to_lose(out):
        raise RecipeError("--out", f"{out} holds a run; go on with --resume or give another folder")


@contextmanager
def claimed(out: Path, resume: bool, recipe: Recipe, mesh: Mesh) -> Iterator[None]:
    """Hold `out` for this run alone; what a try left that trained nothing makes room for it.

    Raises:
        RecipeError: it holds a run already and `resume` is off, or the run of another recipe, or
            another process is using it.
    """
    if not mesh.main:
        yield
        return
    look(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    with held(out) as mine:
        if not mine:
            raise RecipeError("--out", f"{out} is in use by another run")
        sweep(out)
        if (out / RECIPE).exists():
            _make_room(out, resume, training_sha256(recipe))
        yield


def _make_room(out: Path, resume: bool, ours: str) -> None:
    """Keep what a run of this recipe goes on from, and refuse to go on from another's."""
    same = training_sha256(resolve(read(out / RECIPE))) == ours
    if resume and same:
        return
    if not _nothing_to_lose(out):
        raise RecipeError(
            "--out",
            f"{out} holds the run of another recipe; give another folder, or go on with"
            f" {out / RECIPE}",
        )
    (out / "evals.json").unlink(missing_ok=True)
    if (out / "terms").exists():
        discard(out / "terms")


def _began(out: Path) -> bool:
    """Whether a run in this folder came to its first step."""
    metrics = out / "metrics.jsonl"
    trained = metrics.exists() and metrics.stat().st_size > 0
    return trained or bool(sorted_checkpoints(out / "checkpoints"))


def _nothing_to_lose(out: Path) -> bool:
    """Whether there is nothing here but what a run leaves that ends before its first step."""
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    return names <= UNTRAINED and not _began(out)


def _written_by_a_run(path: Path) -> bool:
    """Whether a recipe is laid out as a run writes it, and so has none of a person's comments."""
    try:
        values = read(path).values
    except RecipeError:
        return False
    written = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return path.read_text(encoding="utf-8") == written
