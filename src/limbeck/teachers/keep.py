"""What a cache keeps of a row, in both directions: from a teacher's signals, and back to signals.

Each kind has `look` (what is kept of a chunk of rows, as arrays), `pack` (one sample's arrays as
bytes), `unpack`, and `signals` (the arrays of a whole batch as fields of `Signals`). In all arrays
the first dimension counts rows; "valid" is False where the teacher's logits were not numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.specs import CachedTeacher
from limbeck.core.types import Signals
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse
from limbeck.models.load import DTYPES
from limbeck.teachers.codec import (
    FloatName,
    pack_draws,
    pack_floats,
    pack_topk,
    unpack_draws,
    unpack_floats,
    unpack_rest,
    unpack_topk,
)

Arrays = dict[str, NDArray[Any]]
Cells = Mapping[str, bytes]

DROPPED = "dropped"
"""Cell that marks the rows that are not valid; absent where all are."""


@dataclass(frozen=True)
class Keeper(ABC):
    """Common to all kinds.

    Attributes:
        k: draws, or likeliest tokens.
        temperature: divides the logits of `Draws` and `TopK`.
        columns: v of the teacher's logits.
        width: d of the hidden state; only `Hidden` has to know it.
        dtype: of stored floats; each sample says its own when it is read.
    """

    k: int
    temperature: float
    columns: int
    width: int | None
    dtype: FloatName

    def luck(self, rows: int, generator: torch.Generator) -> Tensor | None:
        """Random numbers for a sample's rows, for a kind that draws."""
        del rows, generator
        return None

    @abstractmethod
    def look(self, signals: Signals, luck: Tensor | None) -> Arrays:
        """What is kept of some rows."""

    def to_cells(self, arrays: Arrays) -> dict[str, bytes]:
        """One sample's arrays as bytes."""
        valid = arrays["valid"]
        marks = {} if valid.all() else {DROPPED: np.packbits(~valid).tobytes()}
        return {**self.pack(arrays), **marks}

    def from_cells(self, cells: Cells, rows: int) -> Arrays:
        """The arrays again.

        Raises:
            ValueError: the bytes are damaged, or are not of so many rows.
        """
        arrays = self.unpack(cells, rows)
        arrays["valid"] = np.ones(rows, dtype=np.bool_)
        if DROPPED in cells:
            marks = np.unpackbits(np.frombuffer(cells[DROPPED], dtype=np.uint8))
            if len(marks) != -(-rows // 8) * 8:
                raise ValueError(f"{len(marks)} marks for {rows} rows")
            arrays["valid"] = marks[:rows] == 0
        return arrays

    def nothing(self) -> Arrays:
        """The arrays of no rows."""
        labels = torch.zeros(0, dtype=torch.int64)
        width = self.width or 1
        nowhere = Projection(hidden=torch.zeros(0, width), weight=torch.zeros(1, width))
        signals = Signals(labels=labels, logits=torch.zeros(0, self.columns), projection=nowhere)
        arrays = self.look(signals, self.luck(0, torch.Generator()))
        return self.from_cells(self.to_cells(arrays), 0)

    @abstractmethod
    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """`to_cells` without "valid"."""

    @abstractmethod
    def unpack(self, cells: Cells, rows: int) -> Arrays:
        """`from_cells` without "valid"."""

    @abstractmethod
    def signals(self, arrays: Arrays, device: torch.device) -> dict[str, Any]:
        """A batch's arrays as fields of `Signals`."""


class Draws(Keeper):
    """Random draws from the distribution, with repetition: unbiased, whatever their number."""

    def luck(self, rows: int, generator: torch.Generator) -> Tensor:
        """[rows, k] uniform numbers in [0, 1)."""
        return torch.rand(rows, self.k, dtype=torch.float64, generator=generator)

    def look(self, signals: Signals, luck: Tensor | None) -> Arrays:
        """Ids, with repetition, and the mean of their log-probabilities."""
        assert luck is not None
        logits, valid = numbers(logits_of(signals))
        ids, mean_logp = draw(logits, luck.to(logits.device), self.temperature)
        return {"ids": _numpy(ids), "mean_logp": _numpy(mean_logp), "valid": _numpy(valid)}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """Each token once, with its count."""
        return pack_draws(arrays["ids"], arrays["mean_logp"], self.columns)

    def unpack(self, cells: Cells, rows: int) -> Arrays:
        """Counts instead of repetition; rows with fewer tokens end in count 0."""
        ids, counts, mean_logp = unpack_draws(cells, rows)
        return {"ids": ids, "counts": counts, "mean_logp": mean_logp}

    def signals(self, arrays: Arrays, device: torch.device) -> dict[str, Any]:
        """Shares of draws as masses."""
        valid = torch.from_numpy(arrays["valid"])
        counts = torch.from_numpy(arrays["counts"].astype(np.float32)) * valid[:, None]
        sparse = Sparse(
            ids=torch.from_numpy(arrays["ids"]),
            mass=counts / self.k,
            rest=torch.zeros(len(valid)),
            negentropy=torch.from_numpy(arrays["mean_logp"]) * valid,
            temperature=self.temperature,
        )
        return {"sparse": sparse.to(device)}


class TopK(Keeper):
    """The likeliest tokens, and how much probability all others have together."""

    def look(self, signals: Signals, luck: Tensor | None) -> Arrays:
        """Ids and log-probabilities."""
        logits, valid = numbers(logits_of(signals))
        logp = (logits / self.temperature).log_softmax(-1)
        kept, ids = logp.topk(self.k, dim=-1)
        return {"ids": _numpy(ids), "logp": _numpy(kept), "valid": _numpy(valid)}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """The rest is stored with them."""
        return pack_topk(arrays["ids"], arrays["logp"], self.columns)

    def unpack(self, cells: Cells, rows: int) -> Arrays:
        """In another order within a row; masses and rest sum to 1."""
        ids, logp = unpack_topk(cells, rows, self.k)
        return {"ids": ids, "logp": logp, "rest": unpack_rest(cells, rows)}

    def signals(self, arrays: Arrays, device: torch.device) -> dict[str, Any]:
        """Probabilities, and the rest of them."""
        valid = torch.from_numpy(arrays["valid"])
        mass = torch.from_numpy(arrays["logp"]).exp() * valid[:, None]
        rest = torch.from_numpy(arrays["rest"]) * valid
        sparse = Sparse(
            ids=torch.from_numpy(arrays["ids"]),
            mass=mass,
            rest=rest,
            negentropy=torch.xlogy(mass, mass).sum(-1) + torch.xlogy(rest, rest),
            temperature=self.temperature,
        )
        return {"sparse": sparse.to(device)}


class Chosen(Keeper):
    """The log-probability of the text's own next token."""

    def look(self, signals: Signals, luck: Tensor | None) -> Arrays:
        """At temperature 1, whatever objectives use."""
        logits, valid = numbers(logits_of(signals))
        logp = logits.log_softmax(-1).gather(-1, signals.labels[:, None])
        return {"chosen": _numpy(logp), "valid": _numpy(valid)}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """A number a row."""
        return pack_floats(arrays["chosen"], self.dtype)

    def unpack(self, cells: Cells, rows: int) -> Arrays:
        """A number a row."""
        return {"chosen": unpack_floats(cells, rows, 1)}

    def signals(self, arrays: Arrays, device: torch.device) -> dict[str, Any]:
        """Nats; 0 where a row is not valid."""
        chosen = np.where(arrays["valid"], arrays["chosen"][:, 0], 0.0).astype(np.float32)
        return {"chosen": torch.from_numpy(chosen).to(device)}


class Hidden(Keeper):
    """What the output head reads: with the head, which is stored once, the exact logits."""

    def look(self, signals: Signals, luck: Tensor | None) -> Arrays:
        """In the type that is stored."""
        assert signals.projection is not None
        hidden = signals.projection.hidden.to(DTYPES[self.dtype])  # what does not fit becomes inf
        return {"hidden": _numpy(hidden), "valid": _numpy(hidden.isfinite().all(-1))}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """d numbers a row."""
        return pack_floats(arrays["hidden"], self.dtype)

    def unpack(self, cells: Cells, rows: int) -> Arrays:
        """d numbers a row."""
        return {"hidden": unpack_floats(cells, rows, self.width or 1)}

    def signals(self, arrays: Arrays, device: torch.device) -> dict[str, Any]:
        """ "hidden", for the reader to put into a projection."""
        return {"hidden": _floats(arrays, "hidden").to(device)}


class Full(Keeper):
    """The logits themselves; for tests and small vocabularies."""

    def look(self, signals: Signals, luck: Tensor | None) -> Arrays:
        """In the type that is stored."""
        logits, valid = numbers(logits_of(signals).to(DTYPES[self.dtype]))
        return {"logits": _numpy(logits), "valid": _numpy(valid)}

    def pack(self, arrays: Arrays) -> dict[str, bytes]:
        """v numbers a row."""
        return pack_floats(arrays["logits"], self.dtype)

    def unpack(self, cells: Cells, rows: int) -> Arrays:
        """v numbers a row."""
        return {"logits": unpack_floats(cells, rows, self.columns)}

    def signals(self, arrays: Arrays, device: torch.device) -> dict[str, Any]:
        """Zero where a row is not valid."""
        return {"logits": _floats(arrays, "logits").to(device)}


KEEPERS: dict[str, type[Keeper]] = {
    "sampled": Draws,
    "topk": TopK,
    "chosen": Chosen,
    "hidden": Hidden,
    "full": Full,
}


def keeper(spec: CachedTeacher, columns: int, width: int | None, dtype: FloatName) -> Keeper:
    """What a cache keeps, for a teacher of these sizes whose numbers are of `dtype`.

    Log-probabilities are computed in float32 whatever the teacher computes in, and are kept so.
    """
    own: FloatName = "float32" if spec.keep == "chosen" else dtype
    return KEEPERS[spec.keep](
        k=spec.k,
        temperature=spec.temperature,
        columns=columns,
        width=width,
        dtype=own if spec.dtype == "auto" else spec.dtype,
    )


def logits_of(signals: Signals) -> Tensor:
    """[n, v] in at least float32."""
    logits = signals.logits
    if logits is None:
        assert isinstance(signals.projection, Projection)
        logits = signals.projection.logits()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def numbers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with rows that are no distribution (NaN, inf) set to 0, and which were good."""
    valid = logits.float().logsumexp(-1).isfinite()
    return torch.where(valid[:, None], logits, 0.0), valid


def draw(logits: Tensor, luck: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Random tokens from softmax(logits / T), by the inverse of its cumulative sums.

    Token j is drawn where luck * total lies in [c_{j-1}, c_j), c = cumsum p; so its chance is p_j
    up to the rounding of the softmax. Sums are float64: in float32 they would lose the tail of a
    large vocabulary.

    Args:
        logits: [n, v], finite or -inf.
        luck: [n, k] float64, uniform in [0, 1).
        temperature: T.

    Returns:
        [n, k] int64 ids, and [n] the mean of their log-probabilities, nats.
    """
    logp = (logits / temperature).log_softmax(-1)
    sums = logp.exp().cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:].contiguous()
    # Below the total even after rounding, or a token behind the last likely one could be drawn.
    point = torch.minimum(luck * total, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(sums, point, right=True)
    return ids, logp.gather(-1, ids).double().mean(-1).float()


def _numpy(value: Tensor) -> NDArray[Any]:
    """An array on the CPU; bfloat16, which numpy does not have, as float32."""
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def _floats(arrays: Arrays, name: str) -> Tensor:
    valid = torch.from_numpy(arrays["valid"])
    return torch.where(valid[:, None], torch.from_numpy(arrays[name]), 0.0)


def join(samples: Sequence[Arrays]) -> Arrays:
    """The arrays of several samples below each other; narrower ones are filled up with 0."""
    rows = sum(len(sample["valid"]) for sample in samples)
    joined: Arrays = {}
    for name, first in samples[0].items():
        width = max(sample[name].shape[1:] for sample in samples)
        whole = np.zeros((rows, *width), dtype=first.dtype)
        place = 0
        for sample in samples:
            array = sample[name]
            columns = tuple(slice(size) for size in array.shape[1:])
            whole[(slice(place, place + len(array)), *columns)] = array
            place += len(array)
        joined[name] = whole
    return joined
