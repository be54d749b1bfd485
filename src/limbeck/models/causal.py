"""A causal language model of transformers as Reader and Speaker."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from limbeck.core.random import seeded
from limbeck.core.types import Encoding, Needs, Sample, Sampling, Signals, View
from limbeck.losses.projection import Projection
from limbeck.models.encode import Encoder
from limbeck.models.facts import vocabulary_fingerprint
from limbeck.models.head import Head, instead_of_head, rows_of_head

Answer = TypeVar("Answer")


class CausalModel:
    """Reads and speaks. What trains is `module`; everything else is how text gets in and out.

    Args:
        module: the transformers model, perhaps wrapped by PEFT, DDP or FSDP2.
        tokenizer: its fast tokenizer.
        name: what reports call it.
        max_length: tokens kept of a sample.
        autocast: dtype the forward pass computes in, where it differs from the weights'.
        head: how it makes its logits, where that is known.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_length: int,
        autocast: torch.dtype | None = None,
        head: Head | None = None,
    ) -> None:
        self.module, self.tokenizer, self.name = module, tokenizer, name
        self.encoder = Encoder(tokenizer, max_length)
        self.vocabulary = vocabulary_fingerprint(tokenizer)
        self.autocast, self.head = autocast, head
        self.packs_from = math.inf  # share of padding; see models/packing.py

    @property
    def offers(self) -> Needs:
        """All signals it can give."""
        # A split student has its head together only within its forward pass.
        split = isinstance(self.module, FSDPModule) and self.trains
        if self.head is None or split:
            return frozenset({"logits", "chosen", "text"})
        return frozenset({"logits", "chosen", "text", "projection"})

    @property
    def trains(self) -> bool:
        """Whether any of its weights receives a gradient."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    @property
    def transformer(self) -> Any:
        """The model of transformers (or PEFT) inside of any distributed wrapper."""
        return getattr(self.module, "module", self.module)

    def encode(self, sample: Sample) -> Encoding:
        """Tokenize one sample."""
        return self.encoder.encode(sample)

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Pad encodings into a batch, or pack them where so much would be padding."""
        lengths = [len(encoding.ids) for encoding in encodings]
        padding = 1 - sum(lengths) / max(1, len(lengths) * max(lengths, default=0))
        return self.encoder.collate(encodings, packed=padding >= self.packs_from)

    def read(self, view: View, needs: Needs) -> Signals:
        """What is asked of the view's rows only: the head never sees a prompt or padding."""
        if "projection" in needs:
            return Signals(labels=view.labels, projection=self.at_head(view, lambda head: head))
        view = view.to(self.device)
        with self._computing(), rows_of_head(self.transformer, view.rows):
            output: Any = self.module(input_ids=view.ids, use_cache=False, **layout(view))
        logits: Tensor = output.logits
        chosen = None
        if "chosen" in needs:
            logp = logits.float().log_softmax(-1)
            chosen = logp.gather(-1, view.labels[:, None]).squeeze(-1)
        return Signals(
            labels=view.labels, logits=logits if "logits" in needs else None, chosen=chosen
        )

    def at_head(self, view: View, use: Callable[[Projection], Answer]) -> Answer:
        """Run up to the output head, let `use` take its place, and return what it returns."""
        assert self.head is not None
        view = view.to(self.device)
        instead = instead_of_head(self.transformer, self.head, view.rows, self.autocast, use)
        with self._computing(), instead:
            return self.module(input_ids=view.ids, use_cache=False, **layout(view))

    @torch.no_grad()
    def speak(self, prompts: Sequence[Sample], sampling: Sampling) -> list[str]:
        """Continue each prompt until its end-of-sequence token or `max_tokens`.

        Prompts are sorted by length and run in batches, padded on the left.
        """
        ids = [self.encoder.prompt_ids(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        answers = [""] * len(ids)
        training = self.module.training
        self.module.eval()
        try:
            for first in range(0, len(order), SPEAK_BATCH):
                chosen = order[first : first + SPEAK_BATCH]
                for index, text in zip(
                    chosen, self._continue([ids[i] for i in chosen], sampling, first), strict=True
                ):
                    answers[index] = text
        finally:
            self.module.train(training)
        return answers

    def _continue(self, prompts: list[list[int]], sampling: Sampling, batch: int) -> list[str]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.encoder.pad)
        attend = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attend[row, width - len(prompt) :] = 1
        settings: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:  # all set: a model's own defaults must not leak in
            settings = {"do_sample": True, "temperature": sampling.temperature}
            settings |= {"top_k": 0, "top_p": 1.0}
        with seeded(sampling.seed, "speak", batch), self._computing():
            output: Tensor = self.transformer.generate(
                input_ids=ids.to(self.device),
                attention_mask=attend.to(self.device),
                max_new_tokens=sampling.max_tokens,
                pad_token_id=self.encoder.pad,
                eos_token_id=self.encoder.eos,
                **settings,
            )
        return self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)

    def _computing(self) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def layout(view: View) -> dict[str, Tensor]:
    """What a transformer must be told of a view besides its tokens.

    Packed samples begin where positions start again. Padding needs no word: it is on the right, so
    no token looks at it, and attention without a mask has faster kernels.
    """
    return {} if view.positions is None else {"position_ids": view.positions}


SPEAK_BATCH = 64
"""Prompts that are continued together."""
