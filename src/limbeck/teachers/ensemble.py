"""Several teachers that speak as one: their mixture, their geometric mean, or one for each sample.

With weights w that add up to 1, and p_k what teacher k says of the next token:

    mixture     p = sum_k w_k p_k
    geometric   p = softmax(sum_k w_k log p_k)
    route       p = p_k of the teacher that has the name of the sample's channel
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.protocols import Reader
from limbeck.core.specs import EnsembleTeacher
from limbeck.core.types import Encoding, Needs, Sample, Signals, View

log = logging.getLogger(__name__)

LOGITS: Needs = frozenset({"logits"})


class Ensemble:
    """Reads several teachers with one tokenizer and says what they say together.

    A member may be on any device; the first one's is that of the answer, whose columns are those
    that all members have. Logits of a mixture are log-probabilities, so a temperature softens the
    mixture and not its members. A row counts where all members that read it have something to say.

    Args:
        spec: who, and how.
        members: readers by name, at least those that `spec` names. They may serve other terms too.

    Attributes:
        members: those that `spec` names, in its order.
        ahead: True where all of them may be read before they are needed.
    """

    def __init__(self, spec: EnsembleTeacher, members: Mapping[str, Reader]) -> None:
        self.spec, self.offers = spec, spec.offers
        self.members: dict[str, Any] = {name: members[name] for name in spec.of}
        self.first = next(iter(self.members.values()))
        self.name = f"{spec.how} of {', '.join(spec.of)}"
        self.vocabulary = self.first.vocabulary
        self.ahead = all(getattr(member, "ahead", False) for member in self.members.values())
        self._strangers: set[str] = set()

    def encode(self, sample: Sample) -> Encoding:
        """Tokenize one sample."""
        return self.first.encode(sample)

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Pad encodings into a batch."""
        return self.first.collate(encodings)

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has none."""
        return self.first.end_token

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token id stands for; None for special ones and unused columns."""
        return min((list(member.token_bytes()) for member in self.members.values()), key=len)

    def read(self, view: View, needs: Needs) -> Signals:
        """`logits` and `chosen` of every row of the view."""
        heard = self._routed(view) if self.spec.how == "route" else self._together(view)
        assert heard.logits is not None
        logits = heard.logits
        if "chosen" in needs:
            labels = heard.labels[:, None]
            chosen = logits.float().log_softmax(-1).gather(-1, labels).squeeze(-1)
            heard = replace(heard, chosen=chosen)
        return heard if "logits" in needs else replace(heard, logits=None)

    def _together(self, view: View) -> Signals:
        """All members read all rows; one member's logits at a time are beside the sum."""
        total: Tensor | None = None
        valid: Tensor | None = None
        for name, share in self.spec.shares.items():
            said, logits = self._ask(name, view)
            if self.spec.how == "mixture":
                part = logits.log_softmax(-1).add_(math.log(share))
            else:
                part = share * logits  # a constant in a row changes no softmax
            if total is None:
                total = part
            else:
                part = part.to(total.device)
                # What one has beyond the others is padding, which has next to no probability.
                width = min(total.shape[1], part.shape[1])
                total, part = total[:, :width], part[:, :width]
                total = total.logaddexp(part) if self.spec.how == "mixture" else total.add_(part)
            valid = _both(valid, said.valid, total.device)
        assert total is not None
        return self._answer(view, total, valid)

    def _routed(self, view: View) -> Signals:
        """Each member reads its own samples; the rows come back in the view's order."""
        readers = self._readers(view)
        of_row = torch.tensor(readers)[view.sample_of(view.rows).cpu()]
        parts: list[Tensor] = []
        places: list[Tensor] = []
        known: list[Tensor] = []
        for index, name in enumerate(self.members):
            mine = [sample for sample, reader in enumerate(readers) if reader == index]
            rows = (of_row == index).nonzero().flatten()
            if not len(rows):
                continue
            said, logits = self._ask(name, some_samples(view, mine))
            parts.append(logits)
            places.append(rows)
            every = torch.ones(len(rows), dtype=torch.bool)
            known.append(every if said.valid is None else said.valid.cpu())
        if not parts:
            return self._answer(view, self._ask(next(iter(self.members)), view)[1], None)
        width = min(logits.shape[1] for logits in parts)
        device = parts[0].device
        back = torch.cat(places).argsort()
        whole = torch.cat([p[:, :width].to(device) for p in parts])[back.to(device)]
        valid = torch.cat(known)[back]
        return self._answer(view, whole, None if bool(valid.all()) else valid.to(device))

    def _readers(self, view: View) -> list[int]:
        """For each sample, the place of the member that reads it."""
        places = {name: index for index, name in enumerate(self.members)}
        channels = view.channels or ("",) * view.sample_count
        for channel in {*channels} - {*places, *self._strangers, "", "main"}:
            self._strangers.add(channel)
            log.warning(
                "no teacher of the ensemble is called %r, so %s reads the samples of this channel",
                channel,
                next(iter(places)),
            )
        return [places.get(channel, 0) for channel in channels]

    def _ask(self, name: str, view: View) -> tuple[Signals, Tensor]:
        """What a member says, and its logits in float32 or wider."""
        said = self.members[name].read(view, LOGITS)
        assert said.logits is not None
        dtype = torch.promote_types(said.logits.dtype, torch.float32)
        return said, said.logits.to(dtype)

    def _answer(self, view: View, logits: Tensor, valid: Tensor | None) -> Signals:
        labels = view.labels.to(logits.device)
        sample = view.sample_of(view.rows).to(logits.device)
        return Signals(labels=labels, logits=logits, valid=valid, sample=sample)


def behind(reader: Reader) -> list[Reader]:
    """The readers that do the work: an ensemble's members, or the reader itself."""
    return [*reader.members.values()] if isinstance(reader, Ensemble) else [reader]


def some_samples(view: View, samples: Sequence[int]) -> View:
    """The view of some of its samples, laid out as it was: padded lines, or one packed line.

    Args:
        view: of all samples.
        samples: which to keep, ascending. Their rows come in the same order as in the view.
    """
    device = view.ids.device
    kept = torch.zeros(view.sample_count, dtype=torch.bool, device=device)
    kept[torch.tensor(samples, dtype=torch.int64, device=device)] = True
    width = view.ids.shape[1]
    if view.positions is None:
        longest = int(view.attend[kept].sum(-1).max()) if samples else 0
        stays = kept[:, None] & (torch.arange(width, device=device) < longest)
    else:
        stays = kept[view.sample_of(torch.arange(width, device=device))][None]
        longest = int(stays.sum())
    shape = (len(samples) if view.positions is None else 1, longest)
    place = stays.flatten().cumsum(0) - 1  # of each position that stays, among those
    rows = view.rows[stays.flatten()[view.rows]]

    def cut(values: Tensor) -> Tensor:
        return values[stays].reshape(*shape, *values.shape[2:])

    return replace(
        view,
        ids=cut(view.ids),
        attend=cut(view.attend),
        offsets=cut(view.offsets),
        rows=place[rows],
        positions=None if view.positions is None else cut(view.positions),
        names=tuple(view.names[i] for i in samples) if view.names else (),
        channels=tuple(view.channels[i] for i in samples) if view.channels else (),
    )


def _both(first: Tensor | None, second: Tensor | None, device: torch.device) -> Tensor | None:
    """Where both are True; None is True everywhere."""
    if second is None:
        return first
    second = second.to(device)
    return second if first is None else first & second
