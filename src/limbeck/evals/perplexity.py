"""How well a model predicts held-out text, per token and per byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.core.registry import register
from limbeck.core.types import NO_OFFSET, Encoding, Sample, View
from limbeck.evals.reading import (
    BATCH_TOKENS,
    as_student,
    batches,
    chunks,
    evaluating,
    read_logits,
    tell_once,
)
from limbeck.evals.score import Score, ratio_interval


@register("eval", "perplexity")
@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp(nats / tokens), and nats / ln 2 / bytes, of the learnt part of held-out samples.

    Perplexity counts the model's own tokens and can be compared only between models with one
    tokenizer. Bits per byte count the same text for all models that take in all of it, and say in
    the log where this one does not; the cost of a learnt end-of-sequence token is in the nats and
    adds no byte.

    Attributes:
        batch_tokens: tokens, with padding, of one forward pass.
    """

    name: ClassVar[str] = "perplexity"
    needs_teacher: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ("perplexity", "bits_per_byte")

    batch_tokens: Annotated[int, Field(gt=0)] = BATCH_TOKENS

    def check(self) -> None:
        """It reads nothing but the held-out samples."""

    def measure(self, model: Any, teacher: Any, holdout: Sequence[Sample]) -> dict[str, Score]:
        """`perplexity` over n tokens and `bits_per_byte` over n bytes.

        Both are absent where the model does not score text or nothing is held out.

        Raises:
            DataError: the held-out samples have no learnt token.
        """
        del teacher
        if not holdout:
            tell_once("perplexity is not measured: no samples are held out; see `source.holdout`")
            return {}
        if not model.offers & {"logits", "chosen"}:
            tell_once(f"perplexity is not measured: {model.name} does not score text")
            return {}
        encodings = [model.encode(as_student(sample)) for sample in holdout]
        tokens = [float(encoding.rows) for encoding in encodings]
        if not any(tokens):
            raise DataError(
                "perplexity: the held-out samples have no learnt token; give rows with a "
                "completion, or raise `max_length` where all of it is cut off"
            )
        nats = self._nats(model, encodings)
        mean, interval = ratio_interval(nats, tokens)
        scores = {
            "perplexity": Score(
                value=_exp(mean),
                n=int(sum(tokens)),
                interval95=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
                better="lower",
                unit="per token",
            )
        }
        sizes = [float(learnt_bytes(encoding)) for encoding in encodings]
        if any(sizes):
            _tell_of_other_text(model, encodings, int(sum(sizes)))
            # A sample that learns only its end-of-sequence token has nats but no byte: left out.
            rate, interval = ratio_interval([n / math.log(2) for n in nats], sizes)
            scores["bits_per_byte"] = Score(
                value=rate,
                n=int(sum(sizes)),
                interval95=None if interval is None else (max(0.0, interval[0]), interval[1]),
                better="lower",
                unit="bits/byte",
            )
        return scores

    @torch.no_grad()
    def _nats(self, model: Any, encodings: Sequence[Encoding]) -> list[float]:
        """Each sample's negative log-likelihood over its learnt tokens."""
        total = torch.zeros(len(encodings), dtype=torch.float64)
        lengths = [len(encoding.ids) if encoding.rows else 0 for encoding in encodings]
        with evaluating(model):
            for group in batches(lengths, self.batch_tokens):
                view: View = model.collate([encodings[index] for index in group])
                place = torch.tensor(group)[view.sample_of(view.rows).cpu()]
                total.index_add_(0, place, _row_nats(model, view))
        return total.tolist()


def _row_nats(model: Any, view: View) -> Tensor:
    """-log p of each row's label, float64 on the CPU.

    Logits are preferred where the model gives them: in chunks they need less memory than the
    model's own `chosen`, which converts all rows at once.
    """
    if "logits" not in model.offers:
        return -model.read(view, frozenset({"chosen"})).chosen.double().cpu()
    logits, labels = read_logits(model, view), view.labels
    nats = torch.zeros(len(labels), dtype=torch.float64)
    for part in chunks(*logits.shape):
        piece = logits.rows(part).float()
        label = piece.gather(-1, labels[part, None].to(piece.device)).squeeze(-1)
        nats[part] = (piece.logsumexp(-1) - label).double().cpu()
    return nats


def _tell_of_other_text(model: Any, encodings: Sequence[Encoding], size: int) -> None:
    """Warn where a model with another tokenizer may not be measured on the same text."""
    cut = [encoding for encoding in encodings if encoding.truncated]
    unknown = [one for one in encodings if one.rows and not one.truncated and _unknown(model, one)]
    told = [
        f"{len(some)} of {len(encodings)} held-out samples {what}"
        for some, what in ((cut, "are cut at its `max_length`"), (unknown, "hold unknown tokens"))
        if some
    ]
    if told:
        tell_once(
            f"bits_per_byte of {model.name}, over {size} bytes: {' and '.join(told)}; a model with "
            "another tokenizer may have been measured on other text"
        )


def _unknown(model: Any, encoding: Encoding) -> bool:
    """Whether a learnt token of a sample stands for text that its tokenizer does not know."""
    view: View = model.collate([encoding])
    starts, ends = view.offsets.flatten(0, 1)[view.rows + 1].unbind(-1)
    return bool(((starts != NO_OFFSET) & (ends == NO_OFFSET)).any())


def learnt_bytes(encoding: Encoding) -> int:
    """Bytes of text that the learnt tokens stand for.

    Each unbroken run of learnt tokens counts from its first start to its last end, because the
    tokens of one character share its offsets and some tokenizers leave a space out of them.
    """
    total, start, end = 0, NO_OFFSET, NO_OFFSET
    learn = [False, *encoding.learn[1:], False]  # the first token has no prefix; the last flushes
    for token, learnt in enumerate(learn):
        if not learnt:
            total += max(0, end - start) if start != NO_OFFSET else 0
            start = end = NO_OFFSET
        elif encoding.starts[token] != NO_OFFSET:
            start = encoding.starts[token] if start == NO_OFFSET else start
            end = max(end, encoding.ends[token])
    return total


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
