"""How long a step would take on this machine, from a few steps of much shallower models.

Models of one and of two layers, with random weights but the real widths, vocabulary, data and
micro-batch, run through the real loop; a step of the real depths follows in a straight line. No
weight is loaded.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from limbeck.core.protocols import Reader, Source
from limbeck.core.random import seeded
from limbeck.core.specs import CachedTeacher, EnsembleTeacher, ServerTeacher
from limbeck.core.term import Term
from limbeck.models.causal import CausalModel
from limbeck.models.facts import ModelFacts, cut_config
from limbeck.models.head import head_of
from limbeck.models.load import as_student
from limbeck.objectives import CrossEntropy
from limbeck.recipe.check import Facts
from limbeck.recipe.ready import ready_terms
from limbeck.recipe.schema import Recipe
from limbeck.sources.speakers import StudentSpeaker
from limbeck.teachers.ensemble import Ensemble
from limbeck.train.batches import Batches
from limbeck.train.loop import Trainer, trained_parameters
from limbeck.train.mesh import Mesh
from limbeck.train.optim import adamw

WARM_STEPS, TIMED_STEPS = 1, 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they go to.

    Attributes:
        fixed: embeddings, heads, losses, optimizer of what is not a layer, data.
        student_layer: a layer of the student, forward and backward, and its optimizer step.
        teacher_layer: the same for the layers of each teacher, forward alone.
        seconds: of a whole step.
    """

    fixed: float
    student_layer: float
    teacher_layer: Mapping[str, float]
    seconds: float

    def render(self, steps: int) -> str:
        """A line for people."""
        whole = timedelta(seconds=round(self.seconds * steps))
        return f"about {self.seconds:.3g} s a step on this machine; {steps:,} steps take {whole}"


def step_time(recipe: Recipe, facts: Facts) -> StepTime:
    """Time steps of shallow models on the recipe's device and data; takes seconds to minutes."""
    other = CachedTeacher | EnsembleTeacher | ServerTeacher
    live = {n: s for n, s in recipe.readers.items() if not isinstance(s, other)}
    with torch.random.fork_rng(), seeded(recipe.seed, "init"):
        base = _timed(recipe, facts, live, 1, dict.fromkeys(live, 1))
        deeper = _timed(recipe, facts, live, 2, dict.fromkeys(live, 1))
        teachers = {
            name: _timed(recipe, facts, live, 1, {**dict.fromkeys(live, 1), name: 2})
            for name in live
        }
    student = max(0.0, deeper - base)
    each = {name: max(0.0, seconds - base) for name, seconds in teachers.items()}
    layers = facts.student.config.num_hidden_layers
    total = base + (layers - 1) * student
    total += sum(
        (facts.teachers[name].config.num_hidden_layers - 1) * one for name, one in each.items()
    )
    return StepTime(base - student - sum(each.values()), student, each, total)


def _timed(
    recipe: Recipe,
    facts: Facts,
    live: Mapping[str, Any],
    student_layers: int,
    teacher_layers: Mapping[str, int],
) -> float:
    """Median seconds of a step of models with so many layers."""
    mesh = Mesh(device=recipe.train.device)
    student = _student(recipe, facts.student, student_layers, mesh.device)
    readers: dict[str, Reader] = {
        name: _shallow(facts.teachers[name], teacher_layers[name], recipe, mesh.device)
        for name in live
    }
    for name, spec in recipe.readers.items():
        if isinstance(spec, EnsembleTeacher) and readers.keys() >= spec.of.keys():
            readers[name] = Ensemble(spec, readers)
    spec = recipe.source
    if isinstance(recipe.teachers.get(recipe.speaker or ""), ServerTeacher):
        spec = replace(spec, speaker=StudentSpeaker())  # nobody is to be paid for an estimate
    source = spec.open(recipe.seed)
    if bind := getattr(source, "bind", None):
        bind(student, readers, mesh)
    terms = _terms(recipe, student, readers, source, mesh)
    train = recipe.train
    trainer = Trainer(
        student=student,
        readers=readers,
        batches=Batches(source, student, train.batch_tokens, recipe.seed),
        terms=terms,
        optimizer=adamw(trained_parameters(student.module, terms), rate=1e-6, decay=0.0),
        rate=lambda step: 1e-6,
        mesh=mesh,
        steps=WARM_STEPS + TIMED_STEPS,
        clip=train.clip,
        accumulate=train.accumulate,
        patience=WARM_STEPS + TIMED_STEPS,
        seed=recipe.seed,
        logits=train.logits,
    )
    student.module.train()
    seconds: list[float] = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        before = trainer.state.seconds
        trainer.step()
        seconds.append(trainer.state.seconds - before)
    return statistics.median(seconds[WARM_STEPS:])


def _terms(
    recipe: Recipe,
    student: CausalModel,
    readers: Mapping[str, Reader],
    source: Source,
    mesh: Mesh,
) -> Sequence[Term]:
    """The terms on shallow models, where layers that a recipe names need not exist."""
    terms: list[Term] = []
    for term in recipe.terms:
        objective: Any = term.objective
        if term.teacher is not None and term.teacher not in readers:
            # What reads a cache costs about as much.
            term = replace(term, teacher=None, objective=CrossEntropy(), name=term.label)
        elif hasattr(objective, "layers"):
            term = replace(term, objective=replace(objective, layers="last"))
        terms.append(term)
    with tempfile.TemporaryDirectory() as folder:
        simple = replace(recipe, terms=tuple(terms))
        return ready_terms(simple, student, readers, source, Path(folder), mesh)


def _student(recipe: Recipe, facts: ModelFacts, layers: int, device: torch.device) -> CausalModel:
    module = _random(facts, layers, torch.float32)
    spec = replace(recipe.student, quantize=None)  # there are no weights to quantize
    return as_student(module, spec, facts.tokenizer, "student", device, recipe.seed)


def _shallow(facts: ModelFacts, layers: int, recipe: Recipe, device: torch.device) -> CausalModel:
    dtype = getattr(facts.config, "dtype", None) or torch.float32
    module = _random(facts, layers, dtype).requires_grad_(False).eval().to(device)
    return CausalModel(
        module,
        facts.tokenizer,
        name="teacher",
        max_length=recipe.student.max_length,
        head=head_of(module),
    )


def _random(facts: ModelFacts, layers: int, dtype: torch.dtype) -> Any:
    deepest = facts.config.num_hidden_layers
    config = cut_config(facts.config, tuple(min(layer, deepest - 1) for layer in range(layers)))
    module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return module
