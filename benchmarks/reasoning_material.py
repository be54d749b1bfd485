"""Rows that a teacher makes for `reasoning.py`: steps over prompts, and what was asked for them.

The teacher is the demo's, asked as one behind an API would be: for text, and for the probabilities
of text. A file of rows is made once, and again where its steps or prompts are others.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from comparison_material import CPU, named, once, read_rows, write_rows

from limbeck.core.exchange import Question, Reply
from limbeck.core.registry import kinds
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.models.causal import CausalModel
from limbeck.models.load import load_teacher
from limbeck.recipe import resolve as _registers  # noqa: F401
from limbeck.synth.rows import Row, to_json
from limbeck.synth.step import Desk, Step, through
from limbeck.teachers.local import LocalWriter

USD_PER_MILLION = {"asked": 1.0, "written": 4.0}
"""An example price of tokens, not one that anybody asks."""

Steps = Sequence[Mapping[str, Any]]


@cache
def model(folder: str) -> CausalModel:
    """A model that stays loaded."""
    return load_teacher(LocalTeacher(name=folder), CPU, 256)


@dataclass
class Counting:
    """A writer that remembers what it said, and counts the tokens of all that it is asked.

    What several files of rows ask for is written once; each counts it as if it were alone.
    """

    name: str
    writer: LocalWriter
    tokens: Counter[str]
    known: dict[Any, Sequence[Reply]]

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """All of them, in order; the questions of a file fit into memory."""
        asked = list(questions)
        keys = [(question.prompt, question.prefix, sampling, n) for question in asked]
        new = dict(zip(keys, asked, strict=True))
        new = {key: question for key, question in new.items() if key not in self.known}
        self.known |= zip(new, self.writer.answers(new.values(), sampling, n), strict=True)
        for key in keys:
            replies = self.known[key]
            # A prompt is paid once, however many answers it gets.
            self.tokens["asked"] += replies[0].prompt_tokens or 0
            self.tokens["written"] += sum(reply.completion_tokens or 0 for reply in replies)
            yield replies


@dataclass
class Office:
    """Where rows are made: models by name, and the folder in which rows are kept."""

    folder: Path
    models: Mapping[str, str]
    known: dict[str, dict[Any, Sequence[Reply]]] = field(default_factory=dict[str, Any])

    def rows(self, name: str, steps: Steps, prompts: Path) -> Path:
        """The rows that come of prompts by steps, in a file that says them in its name."""
        slug = "-".join("".join(c if c.isalnum() else " " for c in name).split())
        path = self.folder / f"{named(slug, list(steps), prompts.name, self.models)}.jsonl"
        return once(path, lambda aside: self._make(steps, prompts, aside, cost_path(path)))

    def _make(self, steps: Steps, prompts: Path, aside: Path, cost: Path) -> None:
        tokens: dict[str, Counter[str]] = {name: Counter() for name in self.models}

        def writer(name: str) -> Counting:
            known = self.known.setdefault(name, {})
            return Counting(name, LocalWriter(model(self.models[name])), tokens[name], known)

        desk = Desk(seed=0, writer=writer, reader=lambda name: model(self.models[name]))
        made = list(through([step_of(step) for step in steps], prompt_rows(prompts), desk))
        good = [to_json(row) for row in made if row.failure is None]
        for row in good:
            row.pop("source", None)
        write_rows(aside, good)
        counted = dict(desk.counts) | {"rows": len(good), "failed": len(made) - len(good)}
        cost.write_text(json.dumps({"tokens": tokens["big"], "counts": counted}, indent=1) + "\n")
        print(f"{aside.name[1:]}: {counted}", flush=True)


def cost_path(rows: Path) -> Path:
    """Where it is said what a file of rows was made with."""
    return rows.with_suffix(".cost.json")


def cost_of(rows: Sequence[Path]) -> str:
    """Teacher's tokens and dollars of some files of rows, in words; empty where not known."""
    tokens: Counter[str] = Counter()
    for path in rows:
        if cost_path(path).exists():
            tokens.update(json.loads(cost_path(path).read_text())["tokens"])
    if not tokens:
        return ""
    usd = sum(tokens[kind] * price / 1e6 for kind, price in USD_PER_MILLION.items())
    return f"{tokens.total() / 1000:,.0f}k, ${usd:.2f}"


def missing_steps(steps: Steps) -> list[str]:
    """Kinds of steps that this limbeck does not have."""
    return sorted({step["kind"] for step in steps} - set(kinds("step")))


def step_of(fields: Mapping[str, Any]) -> Step:
    """The step that a recipe's fields say."""
    given = dict(fields)
    return kinds("step")[given.pop("kind")](**given)


def prompt_rows(path: Path) -> Iterator[Row]:
    """Problems as rows to be answered: the given completion is dropped, the answer known."""
    for index, row in enumerate(read_rows(path)):
        prompt = (Turn(text=row["prompt"]),)
        yield Row(id=str(index), prompt=prompt, answer=row["answer"], group=str(index))
