"""A causal language model of transformers as Reader and Speaker."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from limbeck.core.random import stream_seed
from limbeck.core.types import Encoding, Needs, Sample, Sampling, Signals, View
from limbeck.losses.chosen import outcomes, outcomes_of
from limbeck.losses.projection import Projection
from limbeck.models.encode import Encoder
from limbeck.models.facts import vocabulary_fingerprint
from limbeck.models.head import Head, instead_of_head, rows_of_head
from limbeck.models.modes import evaluating
from limbeck.models.taps import (
    Seen,
    decoder_layers,
    gradients_at,
    inside,
    module_at,
    name_of,
    tapping,
)
from limbeck.models.tokens import token_bytes, word_beginnings
from limbeck.models.writing import Continuation, Draft, Shift, end_tokens, write

OUTCOMES: Needs = frozenset({"chosen", "boundary"})

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
        if self.encoder.pad >= len(self._embedding()):  # a token that only the tokenizer was given
            self.encoder.pad = self.encoder.eos or 0  # nobody looks at padding
        self.vocabulary = vocabulary_fingerprint(tokenizer)
        self.autocast, self.head = autocast, head
        self.packs_from = math.inf  # share of padding; see models/packing.py
        self._word_beginnings: Tensor | None = None

    @property
    def offers(self) -> Needs:
        """All signals it can give."""
        every = frozenset({"logits", "chosen", "boundary", "hidden", "attention", "text"})
        # A split student has its head together only within its forward pass.
        split = isinstance(self.module, FSDPModule) and self.trains
        return every if self.head is None or split else every | {"projection"}

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
        """Tokenize one sample; what a model with this tokenizer wrote is read as it wrote it."""
        if sample.written is not None and sample.written.vocabulary == self.vocabulary:
            return self.encoder.encode_written(sample, sample.written.ids)
        return self.encoder.encode(sample)

    def collate(self, encodings: Sequence[Encoding]) -> View:
        """Pad encodings into a batch, or pack them where so much would be padding."""
        lengths = [len(encoding.ids) for encoding in encodings]
        padding = 1 - sum(lengths) / max(1, len(lengths) * max(lengths, default=0))
        return self.encoder.collate(encodings, packed=padding >= self.packs_from)

    def read(self, view: View, needs: Needs) -> Signals:
        """What is asked of the view's rows only: the head never sees a prompt or padding."""
        if self.head is not None and ("logits" not in needs or "projection" in needs):
            return self.at_head(view, needs, lambda said: said)
        view = view.to(self.device)
        tapped = tapping(self.transformer, view, needs)
        with self._computing(), rows_of_head(self.transformer, view.rows), tapped as seen:
            output: Any = self.module(input_ids=view.ids, use_cache=False, **layout(view))
        logits: Tensor = output.logits
        said = replace(self._seen(view, seen), logits=logits if "logits" in needs else None)
        if needs & OUTCOMES:
            chosen, boundary = outcomes_of(logits, view.labels, self._ends_word(needs))
            return replace(said, chosen=chosen, boundary=boundary)
        return said

    def at_head(self, view: View, needs: Needs, use: Callable[[Signals], Answer]) -> Answer:
        """Run up to the output head, let `use` take its place, and return what it returns.

        It is given a `projection` instead of logits, and what else `needs` asks for.
        """
        assert self.head is not None
        view = view.to(self.device)

        def take(head: Projection) -> Answer:
            logits = head.logits() if "logits" in needs else None
            said = replace(self._seen(view, seen), projection=head, logits=logits)
            if needs & OUTCOMES:
                chosen, boundary = outcomes(head, view.labels, self._ends_word(needs))
                said = replace(said, chosen=chosen, boundary=boundary)
            return use(said)

        instead = instead_of_head(self.transformer, self.head, view.rows, self.autocast, take)
        tapped = tapping(self.transformer, view, needs)
        with self._computing(), tapped as seen, instead:
            return self.module(input_ids=view.ids, use_cache=False, **layout(view))

    def _seen(self, view: View, seen: Seen) -> Signals:
        of = view.sample_of(view.rows)
        return Signals(
            labels=view.labels,
            hidden=seen.hidden(),
            attention=seen.attention(),
            sample=of,
            group=None if view.groups is None else view.groups[of],
            score=None if view.scores is None else view.scores[of],
            behaviour=view.behaviour,
        )

    def _ends_word(self, needs: Needs) -> Tensor | None:
        """[v] which tokens say that a word, or the text, has ended before them."""
        if "boundary" not in needs:
            return None
        if self._word_beginnings is None:
            eos = [] if self.encoder.eos is None else [self.encoder.eos]
            flags = word_beginnings(self.token_bytes(), eos)
            self._word_beginnings = torch.tensor(flags, device=self.device)
        return self._word_beginnings

    @property
    def _config(self) -> Any:
        """The configuration of the language model; others have one of images beside it."""
        return inside(self.transformer).config.get_text_config()

    @property
    def depth(self) -> int:
        """How many decoder layers it has."""
        return len(decoder_layers(self.transformer))

    def heads(self) -> int:
        """How many attention heads a layer has."""
        return int(self._config.num_attention_heads)

    def architecture(self) -> str:
        """What transformers calls its kind of network, such as `llama`."""
        return str(self._config.model_type)

    def layer_name(self, layer: int) -> str:
        """The name of a decoder layer in the network, such as `model.layers.3`."""
        return name_of(self.transformer, module_at(self.transformer, str(layer)))

    def embedding_name(self) -> str:
        """The name of the input embedding in the network."""
        return name_of(self.transformer, inside(self.transformer).get_input_embeddings())

    def width(self, site: str) -> int:
        """How many numbers a hidden state has at a site.

        Raises:
            RecipeError: there is no such site; it names near ones.
        """
        module_at(self.transformer, site)  # an unknown one need not cost a forward pass
        eos = self.encoder.eos or 0
        asked = Encoding.without_text([eos] * 2, [True] * 2)
        with torch.no_grad():
            said = self.read(self.collate([asked] * 2), frozenset({f"hidden:{site}"}))
        return said.hidden[site].shape[1]

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has none."""
        return self.encoder.eos

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token id stands for; None for special ones and unused columns."""
        return token_bytes(self.tokenizer, self._config.vocab_size)

    def embeddings(self) -> Tensor:
        """[v, d] its input embeddings, detached."""
        weight = self._embedding().detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    def _embedding(self) -> Tensor:
        return inside(self.transformer).get_input_embeddings().weight

    def attribution(self, view: View, site: str) -> Tensor:
        """[n, d] |d sum of log p(label) / d hidden| at each row of a view.

        The sum is over all rows, so a row's state is credited for later ones too.
        """
        view = view.to(self.device)
        with evaluating(self.module):
            return gradients_at(self.transformer, site, view.rows, lambda: self._chosen(view))

    def _chosen(self, view: View) -> Tensor:
        chosen = self.read(view, frozenset({"chosen"})).chosen
        assert chosen is not None
        return chosen

    def speak(self, prompts: Sequence[Sample], sampling: Sampling) -> list[str]:
        """Continue each prompt until its end or `max_tokens`; see `models.writing.write`."""
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        seeds = [stream_seed(sampling.seed, f"speak/{','.join(map(str, line))}") for line in ids]
        return [written.text for written in self.write(ids, seeds, sampling)]

    def prompt_ids(self, prompt: Sample, prefix: str = "") -> list[int]:
        """Token ids of a prompt and the beginning of an answer, ready to be continued."""
        return self.encoder.prompt_ids(prompt, prefix)

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        shift: Callable[[Tensor], Shift] | None = None,
    ) -> list[Continuation]:
        """Continue token ids, each with draws of its own seed; see `models.writing.write`."""
        drafts = [Draft(ids=i, seed=s) for i, s in zip(prompts, seeds, strict=True)]
        with evaluating(self.module), self._computing():
            return write(
                self.transformer,
                self.tokenizer,
                drafts,
                sampling,
                pad=self.encoder.pad,
                shift=shift,
            )

    def token_text(self, token: int) -> str:
        """What a token adds to a text; its name where it is a special one.

        Bytes that are a part of a character are written as servers do: `bytes:\\xf0\\x9f`.
        """
        raw = self.encoder.table[token] if token < len(self.encoder.table) else None
        if raw is None:
            return str(self.tokenizer.decode([token]))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end what it writes."""
        return end_tokens(self.transformer, self.tokenizer)

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
