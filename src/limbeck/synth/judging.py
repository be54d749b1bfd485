"""A judge asked which of two answers is better, in both orders."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from limbeck.core.exchange import Question, Reply, Writer
from limbeck.core.random import stream_seed
from limbeck.core.types import Sampling, Turn
from limbeck.synth import verdicts
from limbeck.synth.grouped import asked
from limbeck.synth.template import filled

Item = TypeVar("Item")
By = Literal["scores", "preference"]

UNPARSABLE = "unparsable verdicts"
"""What a desk counts them as."""


PRINCIPLE = (
    "You judge answers. A good one is right, answers what was asked, is complete, and says no more"
    " than that."
)
"""By what steps judge where a recipe does not say."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to a prompt.

    Attributes:
        name: of the comparison; unique.
        prompt: what was asked.
        incumbent, challenger: the answers. The challenger must be better, not as good.
    """

    name: str
    prompt: tuple[Turn, ...]
    incumbent: str
    challenger: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge found.

    Attributes:
        margin: by how much the challenger is better. None: a reply was cut or failed, or does not
            end in a verdict.
        replies: with the answers in either order.
    """

    margin: float | None
    replies: tuple[Reply, Reply]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who judges, and how.

    Attributes:
        writer: is asked.
        by: `scores` for both answers, or which one it has a `preference` for.
        principle: by what it is to judge.
        template: with places {principle}, {question}, {answers}, {form}.
        sampling: how its replies are drawn.
        seed: of the codes in its questions.
    """

    writer: Writer
    by: By
    principle: str
    template: str
    sampling: Sampling
    seed: int

    def compare(
        self, items: Iterable[tuple[Item, Pair | None]]
    ) -> Iterator[tuple[Item, Verdict | None]]:
        """Each item, in order, with the verdict on its pair; None where it has none.

        The challenger stands second in the first question and first in the other. Scores: the mean
        of its own minus the mean of the incumbent's, so what a place adds to a score cancels.
        Preferences: 1 or -1 where both replies prefer the same answer, else 0.
        """
        first: Reply | None = None
        for (item, code), replies in asked(self._questions(items), self.writer, self.sampling):
            if replies is None:
                yield item, None
            elif first is None:
                first = replies[0]
            else:
                both = (first, replies[0])
                yield item, Verdict(margin=self._margin(both, code), replies=both)
                first = None

    def _questions(
        self, items: Iterable[tuple[Item, Pair | None]]
    ) -> Iterator[tuple[tuple[Item, str], Question | None]]:
        for item, pair in items:
            if pair is None:
                yield (item, ""), None
                continue
            texts = [verdicts.plain(pair.prompt), pair.incumbent, pair.challenger]
            code = verdicts.code_for(self.seed, pair.name, texts)
            for swapped in (False, True):
                yield (item, code), self._question(pair, code, swapped)

    def _question(self, pair: Pair, code: str, swapped: bool) -> Question:
        shown = (pair.incumbent, pair.challenger)
        by_scores = self.by == "scores"
        form = verdicts.scores_form(code, 2) if by_scores else verdicts.preference_form(code)
        text = filled(
            self.template,
            principle=self.principle,
            question=verdicts.enclosed("QUESTION", verdicts.plain(pair.prompt), code),
            answers=enclosed_answers(shown[::-1] if swapped else shown, "AB", code),
            form=form,
        )
        return Question(
            id=f"{pair.name}/{'BA' if swapped else 'AB'}",
            prompt=verdicts.framed(text, pair.prompt),
        )

    def _margin(self, replies: tuple[Reply, Reply], code: str) -> float | None:
        if not all(reply.whole for reply in replies):
            return None
        plain, swapped = (reply.text for reply in replies)
        if self.by == "scores":
            one, other = (verdicts.scores(text, code, 2) for text in (plain, swapped))
            if one is None or other is None:
                return None
            return ((one[1] + other[0]) - (one[0] + other[1])) / 2
        prefers, prefers_swapped = (verdicts.preference(text, code) for text in (plain, swapped))
        if prefers is None or prefers_swapped is None:
            return None
        return {("B", "A"): 1.0, ("A", "B"): -1.0}.get((prefers, prefers_swapped), 0.0)


def enclosed_answers(texts: Sequence[str], labels: Sequence[str], code: str) -> str:
    """Answers one after the other, each between its marks."""
    return "\n\n".join(
        verdicts.enclosed(f"ANSWER {label}", text, code)
        for label, text in zip(labels, texts, strict=True)
    )


def draws(
    seed: int, step: str, *, temperature: float, max_tokens: int, top_p: float = 1.0
) -> Sampling:
    """How a step's replies are drawn: its own draws, by the recipe's seed."""
    # Half of the bits: servers take seeds of at most 32.
    own = stream_seed(seed, step) >> 32
    return Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=own)


def why_not(reply: Reply, teacher: str) -> str | None:
    """Why a reply is no whole answer; None where it is one."""
    if reply.failure is not None:
        return f"{teacher} gave no answer: {reply.failure}"
    if not reply.whole:
        return f"the answer of {teacher} is not whole: it ended with {reply.finish!r}"
    return None if reply.text.strip() else f"the answer of {teacher} is empty"
