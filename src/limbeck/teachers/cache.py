"""A teacher that ran once: what it said of each sample is read from a folder."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from limbeck.core.errors import CacheError
from limbeck.core.specs import CachedTeacher
from limbeck.core.types import Encoding, Needs, Sample, Signals, View
from limbeck.models.encode import Encoder
from limbeck.models.facts import vocabulary_fingerprint
from limbeck.models.tokens import token_bytes
from limbeck.teachers.keep import Arrays, join, keeper
from limbeck.teachers.parts import Part, parts
from limbeck.teachers.remains import read_head
from limbeck.teachers.store import Store, token_hash


class CacheReader:
    """Reads a teacher's signals from disk, in any order.

    It gives all that was kept; that this is what an objective needs is checked before. A row on
    which the teacher's logits were not numbers is False in `Signals.valid`, and zero.

    Args:
        store: the folder, of which every shard is there.
        spec: what it keeps.
        tokenizer: what makes tokens of the samples, as when it was made.
        max_length: tokens kept of a sample.
        device: where the head is kept, and what is read with it; all else is read to the CPU.

    Attributes:
        apart: whether another process may read: one that is forked cannot use a GPU, and a head is
            not to be sent with every step.
    """

    ahead: ClassVar[bool] = True
    """It may be read before it is needed, beside other work."""

    def __init__(
        self,
        store: Store,
        spec: CachedTeacher,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        device: torch.device,
    ) -> None:
        self.store, self.spec = store, spec
        self.name, self.offers = spec.of.name, spec.offers
        self.vocabulary = vocabulary_fingerprint(tokenizer)
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer, max_length)
        sizes = store.extra
        self.keeper = keeper(spec, sizes["columns"], sizes["width"], sizes["dtype"])
        self.head = read_head(spec.path, sizes, device) if spec.keep == "hidden" else None
        self.apart = self.head is None
        self.device = torch.device("cpu") if self.apart else device

    def encode(self, sample: Sample) -> Encoding:
        """Tokenize one sample."""
        return self.encoder.encode(sample)

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Pad encodings into a batch."""
        return self.encoder.collate(encodings)

    def read(self, view: View, needs: Needs) -> Signals:
        """What was kept of the view's rows, in their order.

        Raises:
            CacheError: a sample is not in the cache, has other tokens now, or is damaged.
        """
        found = [self._sample(part) for part in parts(view) if part.rows]
        arrays = join(found) if found else self.keeper.nothing()
        valid = torch.from_numpy(arrays["valid"])
        fields = self.keeper.signals(arrays, self.device)
        if self.head is not None:
            hidden = fields.pop("hidden").to(self.head.weight.dtype)
            fields["projection"] = replace(self.head, hidden=hidden)
            if "logits" in needs:
                fields["logits"] = fields["projection"].logits()
        if not bool(valid.all()):
            fields["valid"] = valid.to(self.device)
        return Signals(labels=view.labels.to(self.device), **fields)

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has none."""
        return self.encoder.eos

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token id stands for; None for special ones and unused columns."""
        return token_bytes(self.tokenizer, self.store.extra["columns"])

    def _sample(self, part: Part) -> Arrays:
        record = self.store.get(part.name, token_hash(part.ids.tolist(), part.learn.tolist()))
        try:
            if record.rows != part.rows:
                raise ValueError(f"{record.rows} rows are stored, not {part.rows}")
            return self.keeper.from_cells(record.cells, part.rows)
        except ValueError as error:
            raise CacheError(
                f"{self.spec.path}: what is kept of sample {part.name} cannot be read ({error});"
                " remove the folder and make it again: limbeck cache RECIPE"
            ) from error
