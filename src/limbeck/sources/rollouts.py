"""Samples that the student writes while it trains, beside those that are given."""

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.protocols import Source, Speaking
from limbeck.core.random import stream, stream_seed
from limbeck.core.registry import register
from limbeck.core.schedule import Ramp
from limbeck.core.types import Sample, Sampling, Turn, Written
from limbeck.sources.collapse import Collapse, Watch
from limbeck.sources.held_out import Question
from limbeck.sources.replay import Buffer, Replay, from_json, to_json
from limbeck.sources.speakers import StudentSpeaker

GIVEN, WROTE = "given", "student"
"""Channels of samples that were given, and of those that the student wrote."""

PATIENCE_ANSWERS = 1000
"""Answers in a row that came to nothing after which asking for more is called useless."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """A share that grows when the student stops getting better on held-out text.

    Attributes:
        threshold: how much the held-out KL (nats) may rise above its last measure that counted.
        increase: of the share, each time it rises more.

    Source: Ko et al., "DistiLLM" (arXiv 2402.03898), adaptive off-policy approach.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    threshold: Annotated[float, Field(ge=0)] = 0.0
    increase: Annotated[float, Field(gt=0, le=1)] = 0.1


@register("source", "rollouts")
@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The student's own answers to prompts, as it trains, mixed with given ones.

    A term takes one kind of them by its `channel`: `student` what was written, `given` the rest.

    Attributes:
        of: where the prompts, and the given completions, come from.
        share: of samples (given groups count as one) that the student writes: GKD's lambda; or a
            ramp over the run's steps.
        speaker: who writes; see `sources.speakers`.
        answers: to each prompt that is written for, as one group.
        max_tokens: longest answer.
        temperature: of the draws; 0 is greedy.
        top_p: draw from the likeliest tokens that have this probability together.
        batch: prompts that are answered at a time. More is faster, and less fresh where a step
            takes fewer.
        replay: use the student's samples again.
        adaptive: let `share` grow with the held-out KL instead; it then is where it begins.
        scorer: what gives each answer its score, such as `{kind: critic}` or `{kind: feedback}`.
        collapse: when the run stops because what is written has fallen apart.
    """

    ahead: ClassVar[bool] = False
    parts: ClassVar[dict[str, str]] = {"of": "source", "speaker": "speaker", "scorer": "scorer"}

    of: Any
    share: Share | Ramp = 1.0
    speaker: Any = field(default_factory=StudentSpeaker)
    answers: Positive = 1
    max_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch: Positive = 32
    replay: Replay | None = None
    adaptive: Adaptive | None = None
    scorer: Any = None
    collapse: Collapse = Collapse()

    def __post_init__(self) -> None:
        if self.adaptive is not None and isinstance(self.share, Ramp):
            raise RecipeError("adaptive", "moves `share` itself, which must be a number then")

    def open(self, seed: int) -> "RolloutStream":
        """Open the prompts; the student comes with `bind`."""
        return RolloutStream(self, self.of.open(seed), seed)


@dataclass
class Tally:
    """What was written since it was last told; `asked` counts what came to nothing, too."""

    asked: int = 0
    answers: int = 0
    tokens: int = 0
    ended: int = 0
    repeated: float = 0.0
    surprise: float | None = None
    seconds: float = 0.0

    def count(self, one: Any) -> None:
        """Add an answer."""
        self.answers += 1
        self.tokens += len(one.ids)
        self.ended += one.ended
        self.repeated += repetition(one.ids)
        if one.logp is not None:
            self.surprise = (self.surprise or 0.0) - sum(one.logp)


class RolloutStream:
    """Endless samples; see `Rollouts`. All processes draw the same ones.

    Attributes:
        given: the stream of prompts and given completions.
    """

    ahead = False

    def __init__(self, spec: Rollouts, given: Source, seed: int) -> None:
        self.spec, self.given, self.seed = spec, given, seed
        self.holdout = given.holdout
        self.student: Speaking | None = None
        self.speaker: Any = spec.speaker
        self.teachers: Mapping[str, Any] = {}
        self.together: Any = None
        self.buffer = Buffer(spec.replay) if spec.replay else None
        self.pending: deque[tuple[int, Sample]] = deque()
        self.drawn, self.step, self.last = 0, 0, 1
        self.adapted = spec.share if isinstance(spec.share, float | int) else 0.0
        self.reference: float | None = None
        self.total_tokens = 0
        self.unheard = 0
        self.tally, self.ages = Tally(), [0, 0]
        self.watch = Watch(spec.collapse)
        self.scorer: Any = None

    def bind(self, student: Speaking, teachers: Mapping[str, Any], together: Any = None) -> None:
        """Say who writes.

        Args:
            student: the model that trains.
            teachers: by name, for speakers that have one beside them.
            together: the processes that train, which share the work of writing; see `train.mesh`.
        """
        self.student, self.teachers, self.together = student, teachers, together
        opens = getattr(self.spec.speaker, "open", None)
        self.speaker = opens(student) if opens else self.spec.speaker
        if self.spec.scorer is not None:
            self.scorer = self.spec.scorer.open(student, together, self.seed)

    def leave_out(self, questions: AbstractSet[Question]) -> None:
        """Write for no prompt that is one of these, nor give its rows."""
        leave = getattr(self.given, "leave_out", None)
        if leave:
            leave(questions)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        while not self.pending:
            self._fill()
        written_at, sample = self.pending.popleft()
        if sample.channel != GIVEN:
            self.ages[0] += self.step - written_at
            self.ages[1] += 1
        return sample

    @property
    def share(self) -> float:
        """Of the samples that the student writes now."""
        if isinstance(self.spec.share, Ramp):
            return self.spec.share.at(self.step / self.last)
        return self.adapted

    def _fill(self) -> None:
        """Draw `batch` prompts; for some of them the student writes, and some are used as given."""
        asked: list[tuple[int, Sample]] = []
        order: list[tuple[str, Any]] = []
        first = self.drawn
        while self.drawn - first < self.spec.batch:
            given: list[Sample] = []
            order.append((GIVEN, given))
            chance: float | None = None
            for sample in self._bundle():
                number, self.drawn = self.drawn, self.drawn + 1
                generator = stream(self.seed, "rollouts", number)
                draws = torch.rand(2, generator=generator).tolist()
                chance = draws[0] if chance is None else chance  # one for all of a group
                # A prompt without an answer can only be written for.
                if chance >= self.share and sample.completion is not None:
                    given.append(sample)
                    continue
                replay = self.buffer is not None and draws[1] < self.buffer.replay.share
                again = self.buffer.draw(self.step, generator) if self.buffer and replay else None
                if again is not None:
                    order.append(("again", again))
                else:
                    order.append((WROTE, len(asked)))
                    asked.append((number, sample))
        self._give(order, self._write(asked))

    def _give(self, order: Sequence[tuple[str, Any]], written: Sequence[list[Sample]]) -> None:
        """Put samples into the queue: rows as they are, a group of the buffer, or what was written
        just now. Each is whole: it knows how many of its own follow."""
        for kind, what in order:
            if kind == GIVEN:
                left = range(len(what) - 1, -1, -1)
                for sample, siblings in zip(what, left, strict=True):
                    kept = replace(sample, channel=GIVEN, siblings=siblings)
                    self.pending.append((self.step, kept))
                continue
            at, group = what if kind == "again" else (self.step, written[what])
            if kind == WROTE and self.buffer is not None and group:
                self.buffer.add(self.step, group)
            self.pending.extend((at, sample) for sample in group)

    def _bundle(self) -> list[Sample]:
        """The next row, or all rows of a group: a step never parts it."""
        rows = [next(self.given)]
        while rows[-1].siblings:
            rows.append(next(self.given))
        return rows

    def _write(self, asked: Sequence[tuple[int, Sample]]) -> list[list[Sample]]:
        """The student's answers to each prompt."""
        if not asked:
            return []
        if self.student is None:
            raise RuntimeError("rollouts need a student: call bind() first")
        began = time.perf_counter()
        spec = self.spec
        sampling = Sampling(
            max_tokens=spec.max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            scores=0,
        )
        questions = [_question(sample) for _, sample in asked]
        lines = [question for question in questions for _ in range(spec.answers)]
        seeds = [
            stream_seed(self.seed, "answers", number, k)
            for number, _ in asked
            for k in range(spec.answers)
        ]
        texts = self._shared(lines, seeds, sampling)
        self._bear(texts)
        groups: list[list[Sample]] = []
        for place, (number, _) in enumerate(asked):
            mine = texts[place * spec.answers : (place + 1) * spec.answers]
            groups.append(self._group(questions[place], number, mine))
        if self.scorer is not None and any(groups):
            groups = self.scorer.judge([sample for _, sample in asked], groups)
        self.tally.seconds += time.perf_counter() - began
        return groups

    def _bear(self, texts: Sequence[Any]) -> None:
        """Count answers that came to nothing.

        Raises:
            DataError: so many in a row that asking on, and paying, is of no use.
        """
        came = any(one is not None for one in texts)
        self.unheard = 0 if came else self.unheard + len(texts)
        if self.unheard >= PATIENCE_ANSWERS:
            raise DataError(
                f"of {self.unheard:,} answers in a row not one could be learnt: each was cut at"
                f" `max_tokens` ({self.spec.max_tokens}), failed, or had a prompt that is too long;"
                " raise source.max_tokens, or student.max_length for long prompts"
            )

    def _shared(
        self, lines: Sequence[Sample], seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Any]:
        """What is written behind each line; each process writes its part, where they can part."""
        student, speaker, all_of = self.student, self.speaker, self.together
        assert student is not None

        def write(lines: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Any]:
            return speaker.write(student, self.teachers, lines, seeds, sampling)

        if all_of is None or all_of.size == 1 or all_of.parallel == "fsdp":
            return write(lines, seeds)  # a split model needs all processes for every word
        part = slice(all_of.rank, None, all_of.size)
        mine = [json.dumps(one and asdict(one)) for one in write(lines[part], seeds[part])]
        heard = all_of.gather(mine)
        places = [(place % all_of.size, place // all_of.size) for place in range(len(lines))]
        found = [json.loads(heard[rank][k]) for rank, k in places]
        return [one and SimpleNamespace(**one) for one in found]

    def _group(self, question: Sample, number: int, texts: Sequence[Any]) -> list[Sample]:
        """Samples of the answers to one prompt."""
        student = self.student
        assert student is not None
        group = f"{question.id}@{number}" if len(texts) > 1 else None
        samples: list[Sample] = []
        self.tally.asked += len(texts)
        texts = [one for one in texts if one is not None]
        for k, one in enumerate(texts):
            self.tally.count(one)
            self.total_tokens += len(one.ids)
            chat = any(turn.role for turn in question.turns)
            answer = Turn(text=one.text, role="assistant" if chat else None, learn=True)
            written = None
            if one.logp is not None:
                written = Written(
                    vocabulary=student.vocabulary, ids=tuple(one.ids), logp=tuple(one.logp)
                )
            samples.append(
                replace(
                    question,
                    id=f"{question.id}@{number}" + (f"#{k}" if len(texts) > 1 else ""),
                    turns=(*question.turns, answer),
                    channel=WROTE,
                    parts=(),
                    group=group,
                    siblings=len(texts) - 1 - k,
                    score=None,  # a given one is of the given answer
                    written=written,
                )
            )
        return samples

    def on_step(self, step: Any) -> None:
        """Note how far the run is, and add what was written to the step's figures."""
        self.step, self.last = step.number, step.last
        if hasattr(self.speaker, "on_step"):
            self.speaker.on_step()
        self._adapt(step.metrics)
        tally, figures = self.tally, {"share": self.share, "tokens": float(self.total_tokens)}
        if tally.asked:
            figures |= {
                "asked": float(tally.asked),
                "ended": tally.ended / tally.asked,
                "seconds": tally.seconds,
            }
        if tally.answers:
            figures |= {
                "length_tokens": tally.tokens / tally.answers,
                "repetition": tally.repeated / tally.answers,
            }
        if tally.surprise is not None:
            figures["entropy_nats"] = tally.surprise / max(1, tally.tokens)
        if self.ages[1]:
            figures["age_steps"] = self.ages[0] / self.ages[1]
        if self.buffer is not None:
            figures["buffer"] = float(len(self.buffer))
        step.metrics |= {f"rollouts/{name}": value for name, value in figures.items()}
        if self.scorer is not None:
            of = self.scorer.name
            step.metrics |= {f"{of}/{name}": value for name, value in self.scorer.figures.items()}
        self.tally, self.ages = Tally(), [0, 0]
        self.watch.look(step.number, figures)

    def _adapt(self, metrics: Mapping[str, float]) -> None:
        measured = metrics.get("eval/kl_nats")
        if self.spec.adaptive is None or measured is None:
            return
        if self.reference is not None and measured > self.reference + self.spec.adaptive.threshold:
            self.adapted = min(1.0, self.adapted + self.spec.adaptive.increase)
        self.reference = measured

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, with what was written and not yet used."""
        return {
            "given": self.given.state_dict(),
            "drawn": self.drawn,
            "step": [self.step, self.last],
            "adapted": self.adapted,
            "reference": self.reference,
            "total_tokens": self.total_tokens,
            "pending": [[at, to_json(sample)] for at, sample in self.pending],
            "buffer": self.buffer.state_dict() if self.buffer is not None else None,
            "watch": self.watch.state_dict(),
            "figures": None if self.scorer is None else dict(self.scorer.figures),
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What of the scorer changes; see `core.protocols.Carried`."""
        if self.scorer is not None:
            yield from self.scorer.tensors()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.given.load_state_dict(state["given"])
        self.drawn, self.adapted = int(state["drawn"]), float(state["adapted"])
        self.step, self.last = state["step"]
        self.reference, self.total_tokens = state["reference"], int(state["total_tokens"])
        self.pending = deque((int(at), from_json(sample)) for at, sample in state["pending"])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.watch.load_state_dict(state["watch"])
        if self.scorer is not None:
            self.scorer.figures = dict(state.get("figures") or {})


def _question(sample: Sample) -> Sample:
    """A sample's prompt alone."""
    if not sample.prompt:
        raise DataError(
            f"row {sample.id} is a text without a prompt, so there is nothing to answer; give rows"
            " with `prompt`, or `messages`"
        )
    return replace(sample, turns=sample.prompt, written=None)


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before; 0 where it has none.

    >>> repetition([1, 2, 3, 4, 5, 6])
    0.0
    >>> round(repetition([7] * 13), 2)
    0.9
    """
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
