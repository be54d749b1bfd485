"""What a run would do and take, found without loading a weight."""

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table

from limbeck.core.specs import CachedTeacher
from limbeck.recipe.check import Facts, check
from limbeck.recipe.document import Document
from limbeck.recipe.memory import Memory, memory_of
from limbeck.recipe.resolve import dump
from limbeck.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """Figures of a run to come."""

    recipe: Recipe
    facts: Facts
    memory: Memory

    @property
    def tokens(self) -> int:
        """Tokens that all steps read."""
        return self.recipe.train.steps * self.recipe.train.batch_tokens

    def render(self) -> RenderableType:
        """Tables for the terminal."""
        train, memory = self.recipe.train, self.memory
        return Group(
            Syntax(dump(self.recipe), "yaml", background_color="default", word_wrap=True),
            self._terms(),
            _table(
                ("models", "parameters", "trained"),
                [
                    ("student", f"{self.facts.student.parameters:,}", f"{self.memory.trainable:,}"),
                    *(
                        (name, f"{facts.parameters:,}" if facts.parameters else "unknown", "0")
                        for name, facts in self.facts.teachers.items()
                    ),
                ],
            ),
            *self._caches(),
            _table(
                ("memory of a device", "estimate"),
                [
                    ("weights, optimizer, teachers", _bytes(memory.weights_bytes)),
                    ("gradients", _bytes(memory.gradients_bytes)),
                    ("activations of a micro-batch", _bytes(memory.activations_bytes)),
                    ("its loss", _bytes(memory.loss_bytes)),
                    *(
                        [("its attention maps", _bytes(memory.maps_bytes))]
                        * bool(memory.maps_bytes)
                    ),
                    ("peak", _bytes(memory.peak_bytes)),
                ],
            ),
            f"{train.steps:,} steps of {train.batch_tokens:,} tokens: {self.tokens:,} tokens",
        )

    def _caches(self) -> list[Table]:
        rows = [
            (name, spec.path, f"{spec.keep}{_settings(spec)}", _on_disk(spec))
            for name, spec in self.recipe.teachers.items()
            if isinstance(spec, CachedTeacher)
        ]
        return [_table(("cached teacher", "folder", "keeps", "on disk"), rows)] if rows else []

    def _terms(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for term in self.recipe.terms:
            needs = ", ".join(sorted(term.objective.needs)) or "nothing"
            offers = "-"
            if term.teacher is not None:
                offers = ", ".join(sorted(self.recipe.teachers[term.teacher].offers))
            rows.append((term.label, f"{term.weight:g}", needs, term.teacher or "-", offers))
        return _table(("term", "weight", "needs", "teacher", "which offers"), rows)


def plan(recipe: Recipe, document: Document | None = None, processes: int | None = None) -> Plan:
    """Check the models of a recipe and estimate what it takes.

    Args:
        recipe: checked for what its parts need.
        document: where errors are placed.
        processes: how many train together; by default what torchrun says, else 1.

    Raises:
        RecipeError, ModelError: see `check`.
    """
    facts = check(recipe, document)
    size = processes or int(os.environ.get("WORLD_SIZE", "1"))
    return Plan(recipe, facts, memory_of(recipe, facts, size))


def _settings(spec: CachedTeacher) -> str:
    if "sparse" not in spec.offers:
        return ""
    return f", k {spec.k}" + (f", temperature {spec.temperature:g}" * (spec.temperature != 1))


def _on_disk(spec: CachedTeacher) -> str:
    files = [path for path in Path(spec.path).expanduser().rglob("*") if path.is_file()]
    if not files:
        return "nothing yet: limbeck cache RECIPE"
    return _bytes(sum(path.stat().st_size for path in files))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*head, box=None, padding=(0, 3, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
