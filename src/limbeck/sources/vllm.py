"""The student writes through vLLM, in the same process: much faster on a GPU than one's own loop.

The engine holds a second copy of the weights. Before it writes it is handed those of the student,
if a step has been taken since, and its prefix cache is emptied, which is of other weights. What it
then says of its own words is compared with what the student says of them, now and then: an engine
that has kept a part of its old weights would write as if nothing were wrong.
"""

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Speaking
from limbeck.core.registry import register
from limbeck.core.types import Encoding, Sample, Sampling
from limbeck.models.modes import evaluating
from limbeck.models.writing import Continuation
from limbeck.sources.speakers import ids_of

CHECKED = 4
"""Answers that are compared at a time."""

FAR_TIMES, FAR_NATS = 10.0, 0.05
"""How much farther apart than at first, and how far, log-probabilities of a token may lie."""


@register("speaker", "vllm")
@dataclass(frozen=True, kw_only=True)
class VLLMSpeaker:
    """The student alone, written by vLLM on the GPU that trains (`pip install 'limbeck[vllm]'`).

    Its draws are seeded, but those of one vLLM version on one kind of GPU: a resumed run is not
    promised to be bit-identical, as it is with the speaker `student`.

    Attributes:
        memory: share of the GPU's memory that the engine may take.
        every: steps for which it may write with the same weights.
    """

    memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    every: Annotated[int, Field(gt=0)] = 1

    def open(self, student: Any) -> "VLLMWriter":
        """Start the engine with the student's configuration.

        Raises:
            RecipeError: vLLM is not installed, or the student has adapters or is split.
        """
        return VLLMWriter(self, student)


class VLLMWriter:
    """A running engine.

    Args:
        spec: how it runs.
        student: whose weights it takes.
        engine: with the interface of `vllm.LLM`; made where none is given.
        parameters: with that of `vllm.SamplingParams`.
    """

    def __init__(
        self, spec: VLLMSpeaker, student: Any, engine: Any = None, parameters: Any = None
    ) -> None:
        adapted = hasattr(student.transformer, "peft_config")
        if adapted or isinstance(student.module, FSDPModule):
            how = "trains adapters" if adapted else "is split over processes"
            raise RecipeError(
                "source.speaker",
                f"vllm takes whole weights, and the student {how}; use the speaker `student`",
            )
        self.spec, self.student = spec, student
        self.engine, self.parameters = engine, parameters
        if engine is None:
            self.engine, self.parameters = _start(spec, student)
        self.steps = spec.every  # stale: it began with the weights of a file
        self.taken, self.apart = 0, 0.0

    def write(
        self,
        student: Speaking,
        teachers: Mapping[str, Any],
        prompts: Sequence[Sample],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Sequence[Continuation | None]:
        """Continue each prompt with the student's present weights; None where no word would fit."""
        del teachers
        fresh = self.steps >= self.spec.every
        if fresh:
            self._take_weights()
        lines = ids_of(student, prompts)
        fits = [place for place, ids in enumerate(lines) if len(ids) < _longest(self.student)]
        settings = [
            self.parameters(
                n=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=-1,
                max_tokens=sampling.max_tokens,
                seed=seeds[place] % 2**31,
                stop=list(sampling.stop) or None,
                logprobs=0,
                repetition_penalty=1.0,
                stop_token_ids=self.student.end_tokens,
            )
            for place in fits
        ]
        asked = [{"prompt_token_ids": lines[place]} for place in fits]
        heard = self.engine.generate(asked, settings, use_tqdm=False) if asked else []
        written = {
            place: _written(output.outputs[0]) for place, output in zip(fits, heard, strict=True)
        }
        if fresh and self.taken.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ... time
            some = fits[:CHECKED]
            self._compare([lines[place] for place in some], [written[place] for place in some])
        return [written.get(place) for place in range(len(lines))]

    def on_step(self) -> None:
        """A step was taken: the weights are others now."""
        self.steps += 1

    def _take_weights(self) -> None:
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        self.engine.reset_prefix_cache()
        self.steps = 0
        self.taken += 1

    @torch.no_grad()
    def _compare(self, prompts: Sequence[Sequence[int]], written: Sequence[Continuation]) -> None:
        """That it has the student's weights.

        Raises:
            RecipeError: it has not.
        """
        said = [logp for one in written for logp in one.logp or ()]
        if not said:
            return
        encodings = [
            Encoding.without_text(
                [*prompt, *one.ids], [False] * len(prompt) + [True] * len(one.ids)
            )
            for prompt, one in zip(prompts, written, strict=True)
        ]
        alone = copy.copy(self.student)
        alone.module = self.student.transformer  # DDP's would wait for all processes
        with evaluating(alone.module):
            own = alone.read(alone.collate(encodings), frozenset({"chosen"})).chosen
        apart = float((own.cpu() - torch.tensor(said)).abs().mean())
        if self.taken == 1:
            self.apart = apart
        elif not apart <= max(FAR_TIMES * self.apart, FAR_NATS):
            raise RecipeError(
                "source.speaker",
                f"vllm has not taken the student's weights: of its own words it is {apart:.2g} nats"
                f" a token away from the student, at first {self.apart:.2g}. Use another version of"
                " vllm, or the speaker `student`",
            )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.student.transformer.state_dict().items():
            yield name, value.detach()


def _start(spec: VLLMSpeaker, student: Any) -> tuple[Any, Any]:
    try:
        # The engine's own process could not be handed tensors without pickling functions.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it tells of each hand-over
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError(
            "source.speaker", "vllm is not installed: pip install 'limbeck[vllm]'"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        student.transformer.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        engine = vllm.LLM(
            model=folder,
            gpu_memory_utilization=spec.memory,
            max_model_len=_longest(student),
            dtype=str(student.autocast or torch.float32).removeprefix("torch."),
            enforce_eager=True,
        )
    return engine, vllm.SamplingParams


def _longest(student: Any) -> int:
    """Tokens of a text: as many as are kept of a sample, and the model has positions for."""
    config = student.transformer.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return min(student.encoder.max_length, positions or student.encoder.max_length)


def _written(output: Any) -> Continuation:
    ids = list(output.token_ids)
    logp = [float(row[token].logprob) for token, row in zip(ids, output.logprobs, strict=True)]
    return Continuation(text=output.text, ended=output.finish_reason == "stop", ids=ids, logp=logp)
