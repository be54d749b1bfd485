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
from typing import Protocol

import torch
from torch import Tensor, nn

from limbeck.align.spans import alone, pair
from limbeck.core.errors import DivergedError
from limbeck.core.protocols import Reader
from limbeck.core.random import seeded
from limbeck.core.term import Term
from limbeck.core.types import Needs, Pairing, View
from limbeck.train.batches import Batches, Item
from limbeck.train.mesh import Mesh
from limbeck.train.optim import LossScale, gradient_norm

TINY = torch.finfo(torch.float32).tiny
"""Stands for a count of 0: a term without rows in a step contributes 0, not NaN."""


class Student(Reader, Protocol):
    """A reader whose module is trained."""

    module: nn.Module


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
    seconds: float = 0.0
    scale: LossScale = field(default_factory=LossScale)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass works on: each participant's view, and each term's pairing."""

    views: Mapping[str | None, View]  # None is the student
    pairings: Sequence[Pairing]


@dataclass
class Trainer:
    """All that a step touches. `rate` gives the learning rate at a step."""

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
    listeners: Sequence[Listener] = ()
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.parameters = [parameter for _, parameter in self.named_parameters()]
        owned = [term.objective for term in self.terms if isinstance(term.objective, nn.Module)]
        self.projectors = [parameter for module in owned for parameter in module.parameters()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that trains, by names that do not depend on how the student is wrapped."""
        return trained_parameters(self.student.module, self.terms)

    def train(self) -> None:
        """Run to the last step, telling the listeners of each.

        Raises:
            DivergedError: `patience` steps in a row had a non-finite loss or gradient; the
                weights are those of the last good step.
        """
        self.student.module.train()
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

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its figures."""
        began = time.perf_counter()
        state, mesh = self.state, self.mesh
        mine = self.batches.next(mesh.size * self.accumulate)
        mine = mine[mesh.rank * self.accumulate : (mesh.rank + 1) * self.accumulate]
        micros = [self.prepare(items) for items in mine]
        counts = torch.stack([torch.stack([p.weight.sum() for p in m.pairings]) for m in micros])
        # A copy that only keeps a rank busy has weight 0.
        tokens = sum(len(i.encoding.ids) for items in mine for i in items if i.sample.weight > 0)
        totals = mesh.sum(torch.cat([counts.sum(0), torch.tensor([float(tokens)])]).to(mesh.device))
        counts = totals[:-1]
        sums = torch.zeros(len(self.terms), device=mesh.device)
        with seeded(self.seed, "dropout", state.step, mesh.rank):
            for index, micro in enumerate(micros):
                last = index == len(micros) - 1
                with mesh.accumulating(self.student.module, last=last):
                    sums += self.forward_backward(micro, counts)
        mesh.average_gradients(self.projectors)
        losses = mesh.sum(sums) / counts.clamp(min=TINY)
        weights = torch.tensor([term.weight for term in self.terms], device=mesh.device)
        loss = float((losses * weights).sum())
        rate = self.rate(state.step)
        norm = self.update(loss, rate)
        state.step += 1
        state.tokens += int(totals[-1])
        state.seconds += time.perf_counter() - began
        return {
            "loss": loss,
            **{
                f"loss/{term.label}": value
                for term, value in zip(self.terms, losses.tolist(), strict=True)
            },
            "tokens": state.tokens,
            "seconds": state.seconds,
            "learning_rate": rate,
            "grad_norm": norm,
            "skipped": state.skipped,
        }

    def prepare(self, items: Sequence[Item]) -> MicroBatch:
        """Views and pairings of a micro-batch; no model has run yet."""
        samples = [item.sample for item in items]
        view = self.student.collate([item.encoding for item in items])
        views: dict[str | None, View] = {None: view}
        plain = not any(sample.privileged for sample in samples)
        for name, reader in self.readers.items():
            if plain and reader.vocabulary == self.student.vocabulary:
                views[name] = view  # the same tokenizer says the same: encode once
            else:
                views[name] = reader.collate([reader.encode(sample) for sample in samples])
        pairings: list[Pairing] = []
        for term in self.terms:
            weights = [s.weight if term.channel in (None, s.channel) else 0.0 for s in samples]
            if term.teacher is None:
                pairings.append(alone(view, weights))
                continue
            same = self.readers[term.teacher].vocabulary == self.student.vocabulary
            unit = term.objective.unit
            pairings.append(
                pair(view, views[term.teacher], weights, same_vocabulary=same, unit=unit)
            )
        return MicroBatch(views, pairings)

    def forward_backward(self, micro: MicroBatch, counts: Tensor) -> Tensor:
        """One forward pass of every participant, one backward pass; returns each term's sum."""
        asks: Needs = frozenset().union(*(term.objective.asks for term in self.terms))
        heard = {}
        with torch.no_grad():
            for name, reader in self.readers.items():
                mine = [term.objective.needs for term in self.terms if term.teacher == name]
                if mine:
                    signals = reader.read(micro.views[name], frozenset().union(*mine))
                    heard[name] = signals.to(self.mesh.device)
        student = self.student.read(micro.views[None], asks)
        total = torch.zeros((), device=self.mesh.device)
        sums: list[Tensor] = []
        for term, pairing, count in zip(self.terms, micro.pairings, counts, strict=True):
            pairing = pairing.to(self.mesh.device)
            teacher = heard[term.teacher].select(pairing.teacher) if term.teacher else student
            rows = term.objective(student.select(pairing.student), teacher)
            # Not just a product: a row that does not count may be infinite, and 0 * inf is NaN.
            summed = (pairing.weight * torch.where(pairing.weight > 0, rows, 0.0)).sum()
            sums.append(summed.detach())
            total = total + term.weight * summed / count.clamp(min=TINY)
        # DDP and FSDP average gradients over ranks; the sum over ranks is what is wanted.
        (total * (self.mesh.size * self.state.scale.value)).backward()
        return torch.stack(sums)

    def update(self, loss: float, rate: float) -> float:
        """Clip and step; skip and count where loss or gradient is not finite. Returns the norm."""
        state = self.state
        norm = float(gradient_norm(self.parameters)) / state.scale.value
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
        self.optimizer.zero_grad(set_to_none=True)
        return norm


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
