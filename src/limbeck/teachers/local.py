"""A model on this machine as a writer."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from limbeck.core.exchange import Question, Reply, Scored
from limbeck.core.random import stream_seed
from limbeck.core.types import Sample, Sampling
from limbeck.models.causal import CausalModel
from limbeck.models.writing import Continuation

WINDOW = 256
"""Replies that are sorted by length together, which keeps batches without much padding."""


class LocalWriter:
    """Answers questions with a model's own words.

    Args:
        model: the model.
        name: what replies call it; by default the model's name.
    """

    def __init__(self, model: CausalModel, name: str | None = None) -> None:
        self.model, self.name = model, name or model.name

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """For each question, in their order, its n replies; see `core.exchange.Writer`."""
        waiting = iter(questions)
        while window := list(islice(waiting, max(1, WINDOW // n))):
            yield from self._window(window, sampling, n)

    def _window(
        self, questions: Sequence[Question], sampling: Sampling, n: int
    ) -> Iterator[Sequence[Reply]]:
        prompts = [Sample(id=question.id, turns=question.prompt) for question in questions]
        prefixes = [question.prefix for question in questions]
        ids = [self.model.prompt_ids(*pair) for pair in zip(prompts, prefixes, strict=True)]
        # The same question gets the same draws, whatever it is called and wherever it stands.
        seeds = [
            stream_seed(sampling.seed, f"write/{','.join(map(str, tokens))}", index)
            for tokens in ids
            for index in range(n)
        ]
        repeated = [tokens for tokens in ids for _ in range(n)]
        written = self.model.write(repeated, seeds, sampling)
        for place, question in enumerate(questions):
            mine = written[place * n : (place + 1) * n]
            yield [self._reply(question, k, one, len(ids[place])) for k, one in enumerate(mine)]

    def _reply(self, question: Question, index: int, written: Continuation, asked: int) -> Reply:
        return Reply(
            question=question.id,
            index=index,
            text=written.text,
            finish="stop" if written.ended else "length",
            model=self.name,
            prompt_tokens=asked,
            completion_tokens=len(written.ids),
            scores=self._scores(written),
        )

    def _scores(self, written: Continuation) -> tuple[Scored, ...] | None:
        """Of the tokens of the text, as APIs give them: without the one that ends it."""
        if written.logp is None:
            return None
        tops = written.top or [()] * len(written.ids)
        text = self.model.token_text
        return tuple(
            Scored(text=text(token), logp=logp, top=tuple((text(t), v) for t, v in top))
            for token, logp, top in zip(written.ids, written.logp, tops, strict=True)
            if token not in self.model.end_tokens
        )
