"""What `limbeck generate --dry-run` says: the first prompts in full, and the most that they cost.

Nothing is sent, no model is loaded, and nothing is written: whoever is asked gives no answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Question, Reply
from limbeck.core.protocols import Reader
from limbeck.core.specs import ServerTeacher, TokenPrice
from limbeck.core.types import Sampling
from limbeck.ledger.money import dollars, prompt_tokens_upper, worst_case_usd
from limbeck.recipe.card import plus
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk, Step, asks_of, reads_of, through
from limbeck.teachers.probe import remembered
from limbeck.teachers.wire import written_out

SHOWN_PROMPTS = 3


@dataclass
class Asked:
    """What a step has asked a teacher at one time: the first questions, and bounds of tokens."""

    step: int
    teacher: str
    sampling: Sampling
    n: int
    questions: int = 0
    prompt_tokens: int = 0
    usd: float | None = 0.0
    first: tuple[Question, ...] = ()

    @property
    def terms(self) -> str:
        """What is the same for all of the questions, in words."""
        return (
            f"{self.n} answers each, temperature {self.sampling.temperature:g},"
            f" at most {self.sampling.max_tokens:,} tokens an answer"
        )

    def add(self, requests: int, tokens: int, usd: float | None) -> None:
        """Count a question that takes so many requests, each of which costs this at most."""
        self.questions += 1
        self.prompt_tokens += requests * tokens
        self.usd = plus(self.usd, None if usd is None else requests * usd)


class DryWriter:
    """Counts what it would be asked, and answers nothing.

    Args:
        name: of the teacher.
        spec: its specification; one that is no server costs nothing.
        step: place of the step that asks.
        seen: where what is asked is noted.
    """

    def __init__(self, name: str, spec: Any, step: int, seen: list[Asked]) -> None:
        self.name, self.step, self.seen = name, step, seen
        self.price, self.extra, self.together = TokenPrice(input=0.0, output=0.0), (), True
        if isinstance(spec, ServerTeacher):
            known = remembered(spec)
            self.price, self.extra = spec.price, written_out(spec.extra)
            self.together = known is not None and known.n

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """n failures for each question."""
        asked = Asked(self.step, self.name, sampling, n)
        self.seen.append(asked)
        requests, answers = (1, n) if self.together else (n, 1)
        for question in questions:
            texts = [turn.text for turn in question.prompt]
            tokens = prompt_tokens_upper([*texts, question.prefix, *self.extra])
            worst = worst_case_usd(self.price, tokens, sampling.max_tokens, answers)
            asked.add(requests, tokens, worst)
            if len(asked.first) < SHOWN_PROMPTS:
                asked.first += (question,)
            yield [Reply(question=question.id, index=k, failure="dry run") for k in range(n)]


def rehearsed(
    steps: Sequence[Step],
    rows: Iterable[Row],
    *,
    seed: int,
    folder: Path,
    spec_of: Callable[[str], Any],
) -> list[str]:
    """Lines about what the steps would ask about these rows.

    Steps are gone through as far as none lets a teacher read: what reading costs, nobody can tell
    without a tokenizer, and a model here would have to be loaded for it.

    Args:
        steps: of a source.
        rows: the first ones.
        seed: of the recipe.
        folder: where the recipe's relative paths start.
        spec_of: the specification of a teacher by its name.

    Raises:
        RecipeError: a step cannot work as it is written.
    """
    seen: list[Asked] = []
    open_to_us = list(takewhile(lambda step: not reads_of(step), steps))
    flow = iter(rows)
    for place, step in enumerate(open_to_us):

        def writer(name: str, place: int = place) -> DryWriter:
            return DryWriter(name, spec_of(name), place, seen)

        desk = Desk(seed=seed, writer=writer, reader=_nobody, folder=folder)
        flow = through([step], flow, desk)
    for _ in flow:
        pass
    # A step begins to ask when the one behind it does.
    seen.sort(key=lambda asked: asked.step)
    lines = _told([asked for asked in seen if asked.questions])
    if not any(map(asks_of, steps)):
        lines.append("no step asks a teacher")
    if depends := _dependent(open_to_us, seen):
        lines.append(f"to this is added what depends on the answers: {', '.join(depends)}")
    if closed := [_named(step) for step in steps[len(open_to_us) :]]:
        behind = f" and of what follows ({', '.join(closed[1:])})" if closed[1:] else ""
        lines.append(
            f"{closed[0]} lets a teacher read the rows: the cost of that{behind} is not said here"
        )
    return lines


def _nobody(name: str) -> Reader:
    raise RecipeError("source.steps", f"a step lets {name} read and does not say so in `reads`")


def _named(step: Any) -> str:
    return str(getattr(step, "kind", type(step).__name__))


def _dependent(steps: Sequence[Step], seen: Sequence[Asked]) -> list[str]:
    """The steps that may ask more than was seen: those behind the first that asks, and any that
    asks time after time, with a view to what it was answered."""
    asking = [place for place, step in enumerate(steps) if asks_of(step)]
    times = [asked.step for asked in seen]
    return [_named(steps[k]) for k in asking if k != asking[0] or times.count(k) > 1]


def _told(seen: Sequence[Asked]) -> list[str]:
    """The first prompts, a few lines for each teacher and setting, and their sum."""
    lines: list[str] = []
    for asked in seen[:1]:
        for question in asked.first:
            lines.append(f"--- {asked.teacher}, {question.id}")
            lines += [f"[{turn.role or 'text'}] {turn.text}" for turn in question.prompt]
    found = _summed(seen)
    for (teacher, terms), one in found.items():
        answers = one.questions * one.n * one.sampling.max_tokens
        lines += [
            f"--- {teacher}",
            f"{one.questions:,} questions, {terms}",
            f"at most {one.prompt_tokens:,} prompt tokens and {answers:,} answer tokens: at most"
            f" {dollars(one.usd)}",
        ]
    if len(found) > 1:
        total = reduce(plus, (one.usd for one in found.values()))
        lines += ["---", f"all together: at most {dollars(total)}"]
    return lines


def _summed(seen: Iterable[Asked]) -> Mapping[tuple[str, str], Asked]:
    """What was asked of one teacher in one way, whenever that was."""
    found: dict[tuple[str, str], Asked] = {}
    for one in seen:
        known = found.get((one.teacher, one.terms))
        if known is not None:
            one = replace(
                one,
                questions=known.questions + one.questions,
                prompt_tokens=known.prompt_tokens + one.prompt_tokens,
                usd=plus(known.usd, one.usd),
            )
        found[one.teacher, one.terms] = one
    return found
