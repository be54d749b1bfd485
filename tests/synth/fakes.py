"""Writers and readers without a model, for the tests of steps."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from limbeck.core.exchange import Question, Reply
from limbeck.core.types import NO_OFFSET, Encoding, Needs, Sample, Sampling, Signals, Turn, View
from limbeck.synth.rows import Row
from limbeck.synth.step import Desk, through

Said = str | Reply


class FakeWriter:
    """Says what a function of the question and the index says; notes what it was asked."""

    name = "fake"

    def __init__(self, say: Callable[[Question, int], Said], window: int = 3) -> None:
        self.say, self.window = say, window
        self.questions: list[Question] = []
        self.samplings: list[tuple[Sampling, int]] = []

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """Takes a few questions before it answers the first, as servers and batches do."""
        self.samplings.append((sampling, n))
        waiting: list[Question] = []
        for question in questions:
            self.questions.append(question)
            waiting.append(question)
            if len(waiting) == self.window:
                for one in waiting:
                    yield self._replies(one, n)
                waiting = []
        for one in waiting:
            yield self._replies(one, n)

    def _replies(self, question: Question, n: int) -> list[Reply]:
        return [self._reply(self.say(question, index), question, index) for index in range(n)]

    def _reply(self, said: Said, question: Question, index: int) -> Reply:
        if isinstance(said, Reply):
            return said
        tokens = {"prompt_tokens": 5, "completion_tokens": len(said.split())}
        return Reply(
            question=question.id, index=index, text=said, finish="stop", model="fake-1", **tokens
        )


def cut(text: str) -> Reply:
    """An answer that hit the limit."""
    return Reply(question="", index=0, text=text, finish="length", model="fake-1")


def broken(reason: str) -> Reply:
    """No answer."""
    return Reply(question="", index=0, failure=reason, model="fake-1")


class FakeReader:
    """Cuts text with one function and gives each token the log-probability of another.

    Args:
        pieces: the tokens of a text, which they spell.
        logp: of a token, by the whole text and the byte where the token begins and ends.
        longest: tokens it can read.
    """

    offers: Needs = frozenset({"chosen"})

    def __init__(
        self,
        pieces: Callable[[str], Sequence[str]],
        logp: Callable[[str, int, int], float],
        longest: int = 10_000,
        end: float | None = None,
    ) -> None:
        self.name, self.vocabulary = "fake reader", "fake"
        self.pieces, self.logp, self.longest, self.end = pieces, logp, longest, end
        self.known: dict[str, list[float]] = {}
        self.batches: list[int] = []

    def encode(self, sample: Sample) -> Encoding:
        """One token for the beginning of the text, then the pieces."""
        text = "".join(turn.text for turn in sample.turns)
        before = sum(len(turn.text.encode()) for turn in sample.turns[:-1])
        starts, ends, learn, logps = [NO_OFFSET], [NO_OFFSET], [False], [math.nan]
        place = 0
        for piece in self.pieces(text):
            size = len(piece.encode())
            starts.append(place)
            ends.append(place + size)
            learn.append(place + size > before)
            logps.append(self.logp(text, place, place + size))
            place += size
        if self.end is not None:
            starts.append(place)
            ends.append(place)
            learn.append(True)
            logps.append(self.end)
        kept = min(len(starts), self.longest)
        self.known[sample.id] = logps
        return Encoding(
            ids=list(range(kept)),
            learn=learn[:kept],
            starts=starts[:kept],
            ends=ends[:kept],
            truncated=len(starts) - kept,
            name=sample.id,
        )

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Padded on the right."""
        self.batches.append(len(encodings))
        width = max(len(encoding.ids) for encoding in encodings)
        ids = torch.zeros(len(encodings), width, dtype=torch.int64)
        offsets = torch.full((len(encodings), width, 2), NO_OFFSET)
        learn = torch.zeros(len(encodings), width, dtype=torch.bool)
        for row, one in enumerate(encodings):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            offsets[row, : len(one.ids), 0] = torch.tensor(one.starts)
            offsets[row, : len(one.ids), 1] = torch.tensor(one.ends)
            learn[row, : len(one.ids)] = torch.tensor(one.learn)
        rows = learn.flatten().nonzero().flatten() - 1
        names = tuple(one.name for one in encodings)
        return View(ids=ids, attend=ids > 0, offsets=offsets, rows=rows, names=names)

    def read(self, view: View, needs: Needs) -> Signals:
        """The log-probabilities of the rows' next tokens."""
        assert needs == {"chosen"}
        of = view.sample_of(view.rows).tolist()
        found = [
            self.known[view.names[sample]][label]
            for sample, label in zip(of, view.labels.tolist(), strict=True)
        ]
        return Signals(labels=view.labels, chosen=torch.tensor(found))


def prompt(text: str) -> tuple[Turn, ...]:
    """A plain prompt."""
    return (Turn(text=text),)


def row(name: str, completion: str | None = None, **more) -> Row:
    """A row with a prompt of its own."""
    return Row(id=name, prompt=more.pop("prompt", prompt("Q?\n")), completion=completion, **more)


def run_step(step, rows: Sequence[Row], writers=None, readers=None, seed: int = 0):
    """All rows that come of a step, and the desk it worked at."""
    desk = Desk(
        seed=seed,
        writer=(writers or {}).__getitem__,
        reader=(readers or {}).__getitem__,
    )
    return list(through([step], iter(rows), desk)), desk


def good(rows: Sequence[Row]) -> list[Row]:
    """Those that have not failed."""
    return [one for one in rows if one.failure is None]
