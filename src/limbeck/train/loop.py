"""The one loop. A method is a choice of source, readers and terms; nothing here asks which.

    draw samples -> encode -> pair -> count rows over all ranks -> read -> sum(w * loss) / count
    -> backward -> step -> listeners

Rows are counted before the forward pass, over all ranks and micro-batches, so the loss does not
depend on how a step is laid out.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.errors import DivergedError
from limbeck.core.protocols import Carried, Reader
from limbeck.core.random import seeded
from limbeck.core.term import Term
from limbeck.core.types import Needs, Signals, View
from limbeck.losses import pages
from limbeck.train.balance import EVERY_STEPS, Rule, by_gradient, by_uncertainty, shared_layer
from limbeck.train.batches import Batches
from limbeck.train.loss import fits_chunks, loss_of, rowwise
from limbeck.train.mesh import Mesh
from limbeck.train.optim import LossScale, gradient_norm
from limbeck.train.phases import phase
from limbeck.train.prepare import MicroBatch, Preparation

PROJECTION: Needs = frozenset({"projection"})


class Student(Reader, Protocol):
    """A reader whose module is trained. Losses may stand in for its `head`, where that is known."""

    module: nn.Module
    head: Any

    @property
    def transformer(self) -> Any:
        """The model inside of any distributed wrapper."""
        ...

    def at_head(
        self, view: View, needs: Needs, use: Callable[[Signals], tuple[Tensor, ...]]
    ) -> Any:
        """Run up to the output head, let `use` take its place, and return what it returns."""
        ...


@dataclass
class Step:
    """What listeners are told: the step's number from 1, and its figures, to which they may add."""

    number: int
    last: int
    metrics: dict[str, float] = field(default_factory=dict[str, float])


class Listener(Protocol):
    """Is told of each step."""

    def on_step(self, step: Step) -> None:
        """Look at the step, and perhaps add to its metrics."""
        ...


@dataclass
class State:
    """Where training stands; with weights, optimizer and batches it is all a resume needs."""

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    tokens: int = 0
    positions: int = 0  # tokens and padding
    seconds: float = 0.0
    unaligned: int = 0  # samples that a term could not learn from; see train/prepare.py
    scale: LossScale = field(default_factory=LossScale)
    balance: list[float] = field(default_factory=list[float])  # a scale for each term


@dataclass
class Trainer:
    """All that a step touches.

    `rate` gives the learning rate at a step. `logits` says how the losses of logits are computed,
    and `balance` how terms are scaled; see `recipe.schema.Train`. `carried` is saved with the
    weights.
    """

    student: Student
    readers: Mapping[str, Reader]
    batches: Batches
    terms: Sequence[Term]
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    mesh: Mesh
    steps: int
    clip: float
    accumulate: int
    patience: int
    seed: int
    logits: str = "auto"
    balance: Rule = "fixed"
    listeners: Sequence[Listener] = ()
    carried: Mapping[str, Carried] = field(default_factory=dict[str, Carried])
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.parameters = [parameter for _, parameter in self.named_parameters()]
        owned = [term.objective for term in self.terms if isinstance(term.objective, nn.Module)]
        self.projectors = [parameter for module in owned for parameter in module.parameters()]
        self.state.balance = self.state.balance or [1.0] * len(self.terms)
        self.heard_names = [n for n in self.readers if any(t.teacher == n for t in self.terms)]
        self.asks: Needs = frozenset[str]().union(*(term.objective.asks for term in self.terms))
        self.at_head = (
            self.logits != "naive" and self.student.head is not None and fits_chunks(self.terms)
        )
        if self.at_head:
            self.asks -= {"logits"}
        # What inference mode makes cannot be kept for a backward pass, which all but the losses at
        # the head need.
        alone = self.at_head and all(rowwise(term.objective) for term in self.terms)
        quiet = alone and self.mesh.parallel != "fsdp"
        self.quiet = torch.inference_mode if quiet else torch.no_grad
        self.wanted = {name: self.wants(name) for name in self.heard_names}
        self.preparation = Preparation(
            self.student,
            {name: self.readers[name] for name in self.heard_names},
            self.terms,
            self.batches,
            wanted=self.wanted,
            rank=self.mesh.rank,
            processes=self.mesh.size,
            accumulate=self.accumulate,
            pin=self.mesh.device.type == "cuda",
            changing=self.changing,
        )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that trains, by names that do not depend on how the student is wrapped."""
        return trained_parameters(self.student.module, self.terms)

    def changing(self) -> Iterator[Tensor]:
        """The tensors that a step changes in place."""
        yield from self.parameters
        for kept in self.optimizer.state.values():
            yield from (value for value in kept.values() if isinstance(value, Tensor))

    def train(self) -> None:
        """Run to the last step, telling the listeners of each.

        Raises:
            DivergedError: `patience` steps in a row had a non-finite loss or gradient; the
                weights are those of the last good step.
        """
        self.student.module.train()
        try:
            while self.state.step < self.steps:
                metrics = self.step()
                step = Step(self.state.step, self.steps, metrics)
                for listener in self.listeners:
                    listener.on_step(step)
                if self.state.bad_in_a_row >= self.patience:
                    raise DivergedError(
                        f"step {self.state.step}: loss or gradient was not finite "
                        f"{self.patience} times in a row; the last good state was saved. Lower "
                        "train.learning_rate, or look at the rows of these steps"
                    )
        finally:
            self.preparation.close()
            pages.release()

    @phase("limbeck.step")
    def step(self) -> dict[str, float]:
        """One optimizer step; returns its figures."""
        began = time.perf_counter()
        state, mesh = self.state, self.mesh
        micros = self.preparation.next(more=state.step + 1 < self.steps)
        counts = torch.stack([torch.stack([p.weight.sum() for p in m.pairings]) for m in micros])
        tokens = sum(micro.tokens for micro in micros)
        positions = sum(micro.views[None].ids.numel() for micro in micros)
        unaligned = sum(self.preparation.unaligned.values())
        layout = torch.tensor([float(tokens), float(positions), float(unaligned)])
        totals = torch.cat([counts.sum(0), layout]).to(mesh.device, non_blocking=True)
        rows, layout = mesh.sum(totals).tensor_split([-3])
        counts = torch.where(rows > 0, rows, 1.0)  # a term without rows in a step contributes 0
        terms = [term.at(state.step / self.steps) for term in self.terms]
        if self.balance == "gradient" and state.step % EVERY_STEPS == 0:
            norms = self.gradient_norms(micros[0], terms, counts)
            state.balance = by_gradient(state.balance, norms)
        scaled = [t.weight * scale for t, scale in zip(terms, state.balance, strict=True)]
        weights = torch.tensor(scaled).to(mesh.device, non_blocking=True)
        sums = torch.zeros(len(terms), device=mesh.device)
        with seeded(self.seed, "dropout", state.step, mesh.rank):
            for index, micro in enumerate(micros):
                last = index == len(micros) - 1
                with mesh.accumulating(self.student.module, last=last):
                    sums += self.forward_backward(micro, terms, weights / counts)
        mesh.average_gradients(self.projectors)
        rate = self.rate(state.step)
        with phase("limbeck.update"):
            sums = mesh.sum(sums) / counts
            figures = torch.cat([sums, rows, layout, gradient_norm(self.parameters)[None]])
            # Only here does a step wait for a GPU.
            *found, tokens, positions, unaligned, norm = figures.tolist()
            losses, there = found[: len(terms)], found[len(terms) :]
            norm /= state.scale.value
            counted = [loss * scale for loss, scale in zip(losses, scaled, strict=True)]
            loss = sum(counted)
            self.update(loss, norm, rate)
        losses, counted = _known(losses, there), _known(counted, there)
        if self.balance == "uncertainty":
            state.balance = by_uncertainty(state.balance, losses)
        state.step += 1
        state.unaligned = int(unaligned)
        state.tokens += int(tokens)
        state.positions += int(positions)
        state.seconds += time.perf_counter() - began
        return {
            "loss": loss,
            **_by_label("loss", terms, losses),
            **(_by_label("scaled", terms, counted) if len(terms) > 1 else {}),
            "tokens": state.tokens,
            "padding": 1 - tokens / positions,
            "seconds": state.seconds,
            "learning_rate": rate,
            "grad_norm": norm,
            "skipped": state.skipped,
            **({"unaligned": state.unaligned} if state.unaligned else {}),
        }

    def forward_backward(self, micro: MicroBatch, terms: Sequence[Term], factors: Tensor) -> Tensor:
        """One forward pass of every participant, one backward pass; returns each term's sum."""
        device, view = self.mesh.device, micro.views[None]
        with phase("limbeck.teacher"):
            heard = {name: self.listen(name, micro).to(device) for name in self.heard_names}

        def use(said: Signals) -> tuple[Tensor, Tensor]:
            return loss_of(said, terms, micro.pairings, factors, heard, self.logits)

        with phase("limbeck.student"):
            if self.at_head:
                total, sums = self.student.at_head(view, self.asks, use)
            else:
                total, sums = use(self.student.read(view, self.asks))
        with phase("limbeck.backward"):
            # DDP and FSDP average gradients over ranks; the sum over ranks is what is wanted.
            (total * (self.mesh.size * self.state.scale.value)).backward()
        return sums

    def gradient_norms(
        self, micro: MicroBatch, terms: Sequence[Term], counts: Tensor
    ) -> list[float]:
        """The norm of each term's gradient, unscaled, at the last layer that all of them move."""
        layer = shared_layer(self.student.transformer, terms)
        inside = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        norms: list[float] = []
        for index in range(len(terms)):
            factors = torch.zeros_like(counts)
            factors[index] = 1 / counts[index]
            with seeded(self.seed, "dropout", self.state.step, self.mesh.rank):
                self.forward_backward(micro, terms, factors)
            norms.append(float(gradient_norm(inside)) / self.state.scale.value)
            self.optimizer.zero_grad(set_to_none=True)
        return norms

    def listen(self, name: str, micro: MicroBatch) -> Signals:
        """What one teacher says of a micro-batch."""
        if name in micro.heard:
            return micro.heard[name]
        with self.quiet():
            return self.readers[name].read(micro.views[name], self.wanted[name])

    def wants(self, name: str) -> Needs:
        """What all terms ask of a teacher; no logits where hidden states and head will do."""
        asked = [term.objective.needs for term in self.terms if term.teacher == name]
        needs: Needs = frozenset[Any]().union(*asked)
        if self.at_head and "logits" in needs and "projection" in self.readers[name].offers:
            needs = needs - {"logits"} | PROJECTION
        return needs

    def update(self, loss: float, norm: float, rate: float) -> None:
        """Clip and step; skip and count where loss or gradient is not finite."""
        state = self.state
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            factor = min(1.0, self.clip / (norm + 1e-6)) / state.scale.value
            if factor != 1.0:
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            state.bad_in_a_row = 0
        else:
            state.skipped += 1
            state.bad_in_a_row += 1
        if state.scale.update(finite):
            state.bad_in_a_row = 0  # an fp16 overflow that a smaller scale will cure
        for parameter in self.parameters:
            parameter.grad = None


def _known(values: Sequence[float], rows: Sequence[float]) -> list[float]:
    """NaN for a term without rows: what adds nothing to a step has no loss in it."""
    return [value if count else math.nan for value, count in zip(values, rows, strict=True)]


def _by_label(prefix: str, terms: Sequence[Term], values: Sequence[float]) -> dict[str, float]:
    return {f"{prefix}/{t.label}": x for t, x in zip(terms, values, strict=True)}


def trained_parameters(
    student: nn.Module, terms: Sequence[Term]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The student's parameters that train, and those of objectives that own a projector."""
    modules = {"": getattr(student, "module", student)}  # what DDP wraps
    for index, term in enumerate(terms):
        if isinstance(term.objective, nn.Module):
            modules[f"terms.{index}."] = term.objective
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield prefix + name, parameter
