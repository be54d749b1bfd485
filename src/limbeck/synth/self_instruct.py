"""Step `self_instruct`: from a few instructions, many of their kind."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Question, Reply
from limbeck.core.random import stream
from limbeck.core.registry import register
from limbeck.core.types import Turn
from limbeck.synth.judging import draws
from limbeck.synth.parsing import numbered, spoken
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk
from limbeck.synth.template import filled, template
from limbeck.synth.words import size, words

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]

OUT_OF_REACH = tuple(
    "image images picture pictures photo graph graphs chart plot map draw video audio file".split()
)
"""Words of tasks that text alone cannot do."""


@register("step", "self_instruct")
@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """A teacher is shown some instructions and writes more, which become examples in their turn.

    The rows are the seeds. New ones are called `self_instruct-K`; they have a prompt only, which
    the step `answers` then answers. In a round, `together` requests with examples drawn from the
    pool are asked; then their lists are gone through in order, and what passes the filters joins
    the pool. A list that is not numbered as asked for is unparsable, and is left out.

    Attributes:
        teacher: who writes.
        make: new instructions that are wanted.
        per_request: that are asked for at a time.
        human, machine: examples that are shown of the seeds, and of what was made; more seeds
            while there is too little of the latter.
        together: requests of a round.
        attempts: rounds without a new instruction, after which there is no use in going on.
        similarity: greatest ROUGE-L (F) with an instruction of the pool.
        min_words, max_words: of an instruction; each 20 characters count as a word at least.
        forbidden: words that it must not have.
        keep: also give on the seeds.
        template: file of the request, with places {examples}, {number}; without one it is ours.
        temperature, top_p, max_tokens: of the lists.

    Source: Wang et al., "Self-Instruct" (arXiv 2212.10560). Its 6 and 2 examples, temperature 0.7,
        top-p 0.5 and ROUGE-L 0.7 are the defaults; the request's text and the form of the list are
        our own.
    """

    teacher: Text
    make: Positive
    per_request: Annotated[int, Field(gt=0, le=100)] = 8
    human: Positive = 6
    machine: Count = 2
    together: Positive = 8
    attempts: Positive = 5
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.7
    min_words: Count = 4
    max_words: Positive = 150
    forbidden: tuple[Text, ...] = OUT_OF_REACH
    keep: bool = True
    template: str | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_tokens: Positive = 1024

    def __post_init__(self) -> None:
        if self.max_words < self.min_words:
            raise RecipeError("max_words", "is less than min_words")

    @property
    def asks(self) -> Sequence[str]:
        """Who writes."""
        return (self.teacher,)

    def run(self, rows: Iterable[Row], desk: Desk) -> Iterator[Row]:
        """The seeds, then the new rows; instructions that do not pass have failed."""
        text = template(self.template, "self_instruct", desk.folder, ("examples", "number"))
        seeds: list[Row] = []
        for row in rows:
            if not row.prompt:
                yield row.failed("a seed needs a prompt")
                continue
            seeds.append(row)
            yield row if self.keep else row.failed("a seed; what was made from it is kept")
        if not seeds:
            return
        pool = Pool(seeds)
        count = turn = idle = 0
        while pool.made < self.make and idle < self.attempts:
            before = pool.made
            for place, instruction, reply in self._round(turn, pool, text, desk):
                fault = self._fault(instruction, pool)
                row = pool.row(count, instruction)
                row = row.made_by(
                    "self_instruct",
                    self.teacher,
                    reply,
                    item=place,
                    temperature=self.temperature,
                    top_p=self.top_p,
                )
                count += 1
                if fault is None:
                    pool.add(row.id, instruction)
                desk.counts["new instructions"] += fault is None
                desk.counts["instructions that were left out"] += fault is not None
                yield row if fault is None else row.failed(fault)
            turn += 1
            idle = idle + 1 if pool.made == before else 0
        desk.counts["rounds of requests"] += turn
        if pool.made < self.make:
            desk.counts["instructions that are missing"] += self.make - pool.made

    def _round(
        self, turn: int, pool: "Pool", text: str, desk: Desk
    ) -> Iterator[tuple[int, str, Reply]]:
        """What the lists of a round hold, in order: place in the list, instruction, reply."""
        sampling = draws(
            desk.seed,
            f"self_instruct/{turn}",  # the same examples may come again, the same list not
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            top_p=self.top_p,
        )
        needed = -(-(self.make - pool.made) // self.per_request)
        questions: list[Question] = []
        for request in range(min(self.together, needed)):
            drawn = stream(desk.seed, "self_instruct", turn, request)
            shown = pool.examples(self.human, self.machine, drawn)
            asked = filled(text, examples=listed(shown), number=str(self.per_request))
            prompt = (Turn(text=asked, role="user" if pool.chat else None),)
            questions.append(Question(id=f"self_instruct/{turn}.{request}", prompt=prompt))
        for (said,) in desk.writer(self.teacher).answers(questions, sampling):
            reply = spoken(said)
            desk.counts["requests"] += 1
            for place, instruction in enumerate(self._list(reply, desk)):
                yield place + 1, instruction, reply

    def _list(self, reply: Reply, desk: Desk) -> Sequence[str]:
        """The instructions of a reply; of one that was cut, those that stand there whole."""
        if reply.failure is not None or reply.finish not in ("stop", "length"):
            desk.counts["requests without an answer"] += 1
            return ()
        found = numbered(reply.text, whole=reply.whole)
        if found is None:
            desk.counts["unparsable lists"] += 1
            return ()
        desk.counts["lists that were cut"] += not reply.whole
        return found[: self.per_request]

    def _fault(self, instruction: str, pool: "Pool") -> str | None:
        """Why an instruction does not join the pool."""
        if pool.made == self.make:
            return f"there are {self.make} new ones already"
        found = words(instruction)
        length = size(instruction)
        if not self.min_words <= length <= self.max_words:
            return f"it has {length} words"
        if not instruction[0].isalnum():
            return "it begins with punctuation"
        if (
            word := next((w for w in self.forbidden if _within(words(w), found)), None)
        ) is not None:
            return f"it has the word {word!r}"
        nearest = pool.nearest(found, self.similarity)
        if nearest is not None:
            return f"it is too near to {nearest[0]!r} (ROUGE-L {nearest[1]:.2f})"
        return None


class Pool:
    """Seeds and what was made, with what tells how near a new instruction is to one of them."""

    def __init__(self, seeds: Sequence[Row]) -> None:
        self.chat = any(turn.role for seed in seeds for turn in seed.prompt)
        last = seeds[0].prompt[-1].text
        self.ending = "" if self.chat else last[len(last.rstrip()) :]
        self._names: list[str] = []
        self._texts: list[str] = []
        self._encoded: list[str] = []
        self._letters: dict[str, str] = {}
        for seed in seeds:
            self.add(seed.id, seed.prompt[-1].text)
        self.seeds = len(seeds)
        self._taken = {seed.id for seed in seeds}
        self._nearest = _nearest()  # now, not when the first answer is paid for

    @property
    def made(self) -> int:
        """How many were made."""
        return len(self._texts) - self.seeds

    def add(self, name: str, text: str) -> None:
        """Take an instruction in."""
        self._names.append(name)
        self._texts.append(text)
        self._encoded.append(self._spelt(words(text)))

    def row(self, number: int, instruction: str) -> Row:
        """The row of a new instruction; in plain text it ends as the first seed does."""
        name = f"self_instruct-{number}"
        while name in self._taken:
            name += "+"
        role = "user" if self.chat else None
        return Row(id=name, prompt=(Turn(text=instruction + self.ending, role=role),))

    def examples(self, human: int, machine: int, drawn: torch.Generator) -> list[str]:
        """Some seeds and some of what was made, in a random order; seeds where there is less."""
        few = min(machine, self.made)
        own = torch.randperm(self.made, generator=drawn)[:few] + self.seeds
        seeds = torch.randperm(self.seeds, generator=drawn)[: human + machine - few]
        places = torch.cat([seeds, own])
        order = torch.randperm(len(places), generator=drawn)
        return [self._texts[place] for place in places[order].tolist()]

    def nearest(self, found: Sequence[str], above: float) -> tuple[str, float] | None:
        """The instruction that is nearest to these words, if it is nearer than `above`.

            ROUGE-L (F) = 2 LCS(a, b) / (|a| + |b|), over words

        which is 1 less the normalised distance by insertions and deletions.
        """
        best = self._nearest(self._spelt(found), self._encoded, score_cutoff=above)
        if best is None:
            return None
        nearer = above == 1 or best[1] > above + 1e-9  # the cut-off lets through what is as near
        return (self._names[best[2]], best[1]) if nearer else None

    def _spelt(self, found: Sequence[str]) -> str:
        """Words as one letter each, which makes comparing them a matter of comparing strings."""
        for word in found:
            if word not in self._letters:
                number = len(self._letters)
                self._letters[word] = chr(number if number < 0xD800 else number + 0x800)
        return "".join(self._letters[word] for word in found)


def _nearest() -> Callable[..., Any]:
    """What finds the nearest of many strings, by insertions and deletions.

    Raises:
        RecipeError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Indel
        from rapidfuzz.process import extractOne
    except ImportError:
        raise RecipeError(
            "source.steps", "self_instruct needs rapidfuzz: pip install 'limbeck[synth]'"
        ) from None
    return partial(extractOne, scorer=Indel.normalized_similarity)


def listed(instructions: Sequence[str]) -> str:
    """A numbered list, an instruction a line, whatever line breaks are in it."""
    return "\n".join(f"{k + 1}. {' '.join(text.split())}" for k, text in enumerate(instructions))


def _within(some: Sequence[str], text: Sequence[str]) -> bool:
    """Whether some words stand in a text, one behind the other."""
    size = len(some)
    return any(text[k : k + size] == some for k in range(len(text) - size + 1)) if size else False
