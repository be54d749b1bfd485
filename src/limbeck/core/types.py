"""The words everyone shares: what is learnt from, how a model sees it, and what a model says of it.

Shape letters: b sequences, t positions, n rows, v vocabulary, d width, h heads, k kept, g spans.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse

Needs = frozenset[str]
"""Signals an objective asks for, or a model offers: `needs <= offers` is checked up front.

The names are those of the fields of `Signals`, and `text`. A need may say where in the network:
`hidden:3` is the output of decoder layer 3 (from 0; -1 is the last), `hidden:model.norm` that of
the module of this name, `attention:3` the attention scores of layer 3. What a model offers has no
place: just `hidden`.
"""

Unit = Literal["token", "order", "span", "sample", "sequence"]
"""What stands beside what; see `align/spans.py`:

- token: the rows at which both models have read the same text;
- order: the i-th row of a sample with the i-th, whatever they have read;
- span: the tokens of each model that cover the same bytes, as one row;
- sample: nothing is paired; the objective sees all rows of both, and which sample each is of;
- sequence: all learnt tokens of a sample, as one row; samples of one group are kept together.
"""

NO_OFFSET = -1
"""Byte offset of a token that is not part of the sample's text (BOS, chat markers, padding)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A stretch of text. `role` is None outside a conversation; `learn` marks what is trained."""

    text: str
    role: str | None = None
    learn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A completion as the model that wrote it knows it.

    Attributes:
        vocabulary: fingerprint of its tokenizer; models with the same one read these very tokens.
        ids: of the completion, with the token that ended it, where one did.
        logp: of each token when it was drawn, nats: under the distribution that it was drawn from,
            at temperature 1. Empty where not known.
    """

    vocabulary: str
    ids: tuple[int, ...]
    logp: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One example as text; token ids are private to each model.

    Attributes:
        id: stable name of the row, for logs and caches.
        turns: the text, in order. The concatenation of their `text` is the coordinate system of
            all byte offsets, so two models with different templates can be compared.
        privileged: turns that only a teacher reads, before the others.
        weight: factor of each of its rows in the loss.
        channel: name that a term can select.
        parts: stretches of the text with channels of their own: the byte where each begins, and its
            name; in order. Before the first of them, the sample's channel counts.
        group: name that answers to one prompt share, which are compared with each other; a step
            never parts them.
        siblings: how many samples of its group follow it in a stream.
        score: what an objective of groups is told of this one: a probability, a rank, a reward.
        answer: the right answer, where it is known; no model reads it.
        written: the completion's own tokens, where a model wrote it during this run.
    """

    id: str
    turns: tuple[Turn, ...]
    privileged: tuple[Turn, ...] = ()
    weight: float = 1.0
    channel: str = "main"
    parts: tuple[tuple[int, str], ...] = ()
    group: str | None = None
    siblings: int = 0
    score: float | None = None
    answer: str | None = None
    written: Written | None = None

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last learnt one."""
        return self.turns[:-1] if self.turns and self.turns[-1].learn else self.turns

    @property
    def completion(self) -> str | None:
        """The last learnt turn's text, or None where there is only a prompt."""
        return self.turns[-1].text if self.turns and self.turns[-1].learn else None


def numbered(groups: Iterable[str | None]) -> list[int]:
    """Groups by numbers from 0, in the order in which they come; without a name, one of its own.

    >>> numbered(["a", None, "a", None])
    [0, 1, 0, 2]
    """
    numbers: dict[str | int, int] = {}
    keys = (place if name is None else name for place, name in enumerate(groups))
    return [numbers.setdefault(key, len(numbers)) for key in keys]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One sample under one tokenizer, before padding; four lists of the same length.

    `starts` and `ends` are byte offsets into the sample's text (`NO_OFFSET` outside it). A learnt
    end-of-sequence token has the empty span at the end of the text. `truncated` counts the tokens
    that did not fit. `name` is the sample's id.
    """

    ids: Sequence[int]
    learn: Sequence[bool]
    starts: Sequence[int]
    ends: Sequence[int]
    truncated: int = 0
    name: str = ""

    @classmethod
    def without_text(cls, ids: Sequence[int], learn: Sequence[bool], name: str = "") -> "Encoding":
        """Of tokens whose places in a text play no part."""
        nowhere = [NO_OFFSET] * len(ids)
        return cls(ids=ids, learn=learn, starts=nowhere, ends=nowhere, name=name)

    @property
    def rows(self) -> int:
        """How many tokens are learnt; the first token has no prefix and cannot be."""
        return sum(self.learn[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One model's encoding of a batch: a sample a line padded on the right, or all in one line.

    Attributes:
        ids: [b, t] int64.
        attend: [b, t] bool, False on padding.
        offsets: [b, t, 2] int64 byte offsets into each sample's text.
        rows: [n] int64, flat positions (into b*t) whose *next* token is learnt.
        positions: [1, t] int64 where samples are packed into one line, 0 at each one's start; None
            where each has a line of its own.
        names: the samples' ids, in order.
        channels: the samples' channels, where they are known.
        groups: [b] int64, the samples' groups numbered from 0, where they are known.
        scores: [b] float32, the samples' scores, NaN where there is none.
        behaviour: [n] float32, log-probability of each row's token when it was drawn, NaN where it
            was not; None where nothing was.
    """

    ids: Tensor
    attend: Tensor
    offsets: Tensor
    rows: Tensor
    positions: Tensor | None = None
    names: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    groups: Tensor | None = None
    scores: Tensor | None = None
    behaviour: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """[n] the token that each row should predict."""
        return self.ids.flatten()[self.rows + 1]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attend.sum())

    @property
    def sample_count(self) -> int:
        """How many samples it holds."""
        return len(self.ids) if self.positions is None else int((self.positions == 0).sum())

    def sample_of(self, places: Tensor) -> Tensor:
        """[m] which sample each flat position belongs to, from 0."""
        if self.positions is not None:
            return ((self.positions == 0).flatten().cumsum(0) - 1)[places]
        return places // self.ids.shape[1] if self.ids.numel() else places

    def to(self, device: torch.device) -> "View":
        """The same view with its tensors on `device`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


def sites(needs: Needs, signal: str) -> tuple[str, ...]:
    """The places in the network that `needs` names for a signal, in order of their names.

    >>> sites(frozenset({"hidden:3", "hidden:-1", "logits"}), "hidden")
    ('-1', '3')
    """
    split = (need.partition(":") for need in needs)
    return tuple(sorted(site for name, _, site in split if name == signal and site))


def without_sites(needs: Needs) -> Needs:
    """The signals alone, as a model offers them."""
    return frozenset(need.partition(":")[0] for need in needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Rows of one model in groups, each of which predicts one stretch of text.

    Attributes:
        rows: [m] int64, ascending.
        span: [m] int64, the group of each of them, 0 .. g-1, ascending.
        after: [g] int64, the row that predicts what comes behind the group, -1 where none does.
    """

    rows: Tensor
    span: Tensor
    after: Tensor

    def to(self, device: torch.device) -> "Spans":
        """The same on `device`."""
        return Spans(
            rows=self.rows.to(device, non_blocking=True),
            span=self.span.to(device, non_blocking=True),
            after=self.after.to(device, non_blocking=True),
        )

    def sum(self, values: Tensor) -> Tensor:
        """[g] the sum of `values` [n] over each group's rows."""
        return values.new_zeros(len(self.after)).index_add(0, self.span, values[self.rows])

    def last(self) -> Tensor:
        """[g] the last row of each group."""
        final = torch.ones_like(self.span, dtype=torch.bool)
        final[:-1] = self.span[1:] != self.span[:-1]
        return self.rows[final]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Row `student[i]` of the student stands beside row `teacher[i]` of the teacher.

    The indices point into the rows of the two views (0 .. n-1), not into positions. None means
    all rows in order, which costs no copy. With `Spans`, group i stands beside group i. `weight` is
    [n] float32, one for each pair; for the unit `sample`, one for each of the student's rows.
    """

    student: Tensor | Spans | None
    teacher: Tensor | Spans | None
    weight: Tensor
    unit: Unit = "token"

    def to(self, device: torch.device) -> "Pairing":
        """The same pairing with its tensors on `device`."""

        def moved(index: Tensor | Spans | None) -> Tensor | Spans | None:
            if index is None or isinstance(index, Spans):
                return None if index is None else index.to(device)
            return index.to(device, non_blocking=True)

        return replace(
            self,
            student=moved(self.student),
            teacher=moved(self.teacher),
            weight=self.weight.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What a model says about n rows; what was not asked for is None or empty.

    Attributes:
        labels: [n] int64, the token that came next in this model's own tokenization.
        logits: [n, v].
        projection: the same logits, not yet made.
        sparse: a few tokens' share of each distribution.
        chosen: [n] log-probability of `labels`, nats.
        behaviour: [n] the same when the text was written, NaN for text that is given; of the
            student, and of a sequence the sum.
        boundary: [n] log-probability that the next token begins a word or ends the text, nats.
        hidden: by site, [n, d], in the type that the model computes in.
        attention: by site, [n, h, t] scores before the softmax, -inf where a row does not look;
            t are the positions of the view's lines.
        sample: [n] int64, which sample of the batch each row is of.
        group: [n] int64, which group of samples each row is of.
        length: [n] float32, how many tokens the row stands for; of the unit `sequence`.
        score: [n] what its sample is said to be worth; NaN where nothing is said.
        valid: [n] bool, False where a teacher has nothing to say; None where it always has.
    """

    labels: Tensor
    logits: Tensor | None = None
    projection: Projection | None = None
    sparse: Sparse | None = None
    chosen: Tensor | None = None
    behaviour: Tensor | None = None
    boundary: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    attention: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    sample: Tensor | None = None
    group: Tensor | None = None
    length: Tensor | None = None
    score: Tensor | None = None
    valid: Tensor | None = None

    def select(self, index: Tensor | Spans | None) -> "Signals":
        """The rows that `index` names; None keeps all without a copy.

        Of `Spans`, each group becomes a row: `chosen` and `behaviour` are the log-probability of
        all its tokens, `length` their number, `boundary` that of the row behind it (0, that is
        certainty, where there is none), and all else is of its last row.
        """
        if index is None:
            return self
        if isinstance(index, Spans):
            return self._of_spans(index)
        return self._each(lambda value: value[index])

    def _of_spans(self, spans: Spans) -> "Signals":
        boundary = self.boundary
        if boundary is not None:
            known = spans.after >= 0
            boundary = torch.where(known, boundary[spans.after.clamp(min=0)], 0.0)
        chosen, behaviour = (
            None if value is None else spans.sum(value) for value in (self.chosen, self.behaviour)
        )
        length = spans.sum(torch.ones(len(self.labels), device=self.labels.device))
        last = self.select(spans.last())
        return replace(last, chosen=chosen, behaviour=behaviour, boundary=boundary, length=length)

    def to(self, device: torch.device) -> "Signals":
        """The same signals on `device`; a projection stays where its head is."""

        def moved(value: Any) -> Any:
            if isinstance(value, Projection):
                return value
            if isinstance(value, Sparse):
                return value.to(device)
            return value.to(device, non_blocking=True)

        return self._each(moved)

    def _each(self, change: Callable[[Any], Any]) -> "Signals":
        """The signals after a change to each that is there."""

        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {site: change(part) for site, part in value.items()}
            return None if value is None else change(value)

        return replace(self, **{name: changed(getattr(self, name)) for name in self.__slots__})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is drawn from a model.

    Attributes:
        max_tokens: longest answer.
        temperature: divides the logits; 0 is greedy.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: of the draws.
        stop: an answer ends before the first of these strings.
        scores: also ask for each token's log-probability, and those of so many likeliest tokens at
            its place; None asks for none.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    scores: int | None = None
