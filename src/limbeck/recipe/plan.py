"""What a run would do and take, found without loading a weight."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from transformers import AutoModelForCausalLM

from limbeck.core.specs import CachedTeacher, CausalStudent
from limbeck.models.load import with_adapters
from limbeck.recipe.check import Facts, check
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import dump
from limbeck.recipe.schema import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
QUANTIZED_BYTES = {"4bit": 0.5, "8bit": 1.0}
STATE_BYTES = 4 + 8
"""Of a trained parameter, always: its float32 weight and AdamW's two moments."""

GRADIENT_BYTES = 4
"""Of a trained parameter: its gradient, which is there from the backward pass to the step."""

COPY_BYTES = 12
"""Of a trained parameter: what a checkpoint copies to the CPU."""

LAYER_WIDTHS = 11
"""Floats that a layer keeps for the backward pass, per token and unit of width: input, normalised
and scaled input of both norms; query, key, value, attention's output and its copy for `o_proj`."""

LAYER_INNER = 4
"""The same per unit of feed-forward width: gate, its activation, the other half, their product."""

LOSS_COPIES = {
    "cross_entropy": 3,
    "forward_kl": 5,
    "reverse_kl": 5,
    "total_variation": 5,
    "logit_mse": 5,
    "skew_forward_kl": 8,
    "skew_reverse_kl": 8,
    "sorted_l1": 8,
    "sparse_kl": 5,
    "adaptive_kl": 10,
    "jensen_shannon": 12,
}
"""[n, v] float32 tensors that are alive at a loss's peak, besides the logits of the two models."""

OTHER_COPIES = 8
"""The same where a kind is not in the table."""


@dataclass(frozen=True)
class Plan:
    """Figures of a run to come; bytes are per device.

    Attributes:
        trainable: parameters that an optimizer step changes.
        weights_bytes: student, optimizer and teachers, which are there all the time.
        gradients_bytes: gradients; on a CPU also the copies that a checkpoint makes.
        activations_bytes: of the largest micro-batch, logits included.
    """

    recipe: Recipe
    facts: Facts
    trainable: int
    weights_bytes: int
    gradients_bytes: int
    activations_bytes: int

    @property
    def memory_bytes(self) -> int:
        """The peak. Gradients grow as activations go, unless they wait for more micro-batches."""
        if self.recipe.train.accumulate > 1:
            return self.weights_bytes + self.gradients_bytes + self.activations_bytes
        return self.weights_bytes + max(self.gradients_bytes, self.activations_bytes)

    @property
    def tokens(self) -> int:
        """Tokens that all steps read."""
        return self.recipe.train.steps * self.recipe.train.batch_tokens

    def render(self) -> RenderableType:
        """Tables for the terminal."""
        train = self.recipe.train
        return Group(
            Syntax(dump(self.recipe), "yaml", background_color="default", word_wrap=True),
            self._terms(),
            _table(
                ("models", "parameters", "trained"),
                [
                    ("student", f"{self.facts.student.parameters:,}", f"{self.trainable:,}"),
                    *((n, f"{f.parameters:,}", "0") for n, f in self.facts.teachers.items()),
                ],
            ),
            *self._caches(),
            _table(
                ("memory of a device", "estimate"),
                [
                    ("weights, optimizer, teachers", _bytes(self.weights_bytes)),
                    ("gradients", _bytes(self.gradients_bytes)),
                    ("activations and logits of a micro-batch", _bytes(self.activations_bytes)),
                    ("peak", _bytes(self.memory_bytes)),
                ],
            ),
            f"{train.steps:,} steps of {train.batch_tokens:,} tokens: {self.tokens:,} tokens",
        )

    def _caches(self) -> list[Table]:
        rows = [
            (name, spec.path, f"{spec.keep}{_settings(spec)}", _on_disk(spec))
            for name, spec in self.recipe.teachers.items()
            if isinstance(spec, CachedTeacher)
        ]
        return [_table(("cached teacher", "folder", "keeps", "on disk"), rows)] if rows else []

    def _terms(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for term in self.recipe.terms:
            needs = ", ".join(sorted(term.objective.needs)) or "nothing"
            offers = "-"
            if term.teacher is not None:
                offers = ", ".join(sorted(self.recipe.teachers[term.teacher].offers))
            rows.append((term.label, f"{term.weight:g}", needs, term.teacher or "-", offers))
        return _table(("term", "weight", "needs", "teacher", "which offers"), rows)


def plan(recipe: Recipe, document: Document | None = None, processes: int | None = None) -> Plan:
    """Check the models of a recipe and estimate what it takes.

    Memory is estimated as

        trained * 12 + frozen * bytes + teachers * bytes                          (weights)
        + the larger of trained * 4                                               (gradients)
          and tokens * layers * (11 d + 4 f) * 4 + rows * v * 4 * copies          (activations)

    for a micro-batch of `tokens = batch_tokens / (processes * accumulate)`, width d, feed-forward
    width f and vocabulary v, where every token is taken as a row. With accumulation, gradients and
    activations are there together. FSDP splits weights and gradients. What the libraries take
    themselves (a CUDA context, a tokenizer) and fragmentation come on top.

    Args:
        recipe: checked for what its parts need.
        document: where errors are placed.
        processes: how many train together; by default what torchrun says, else 1.

    Raises:
        RecipeError, ModelError: see `check`.
    """
    facts = check(recipe, document)
    size = processes or int(os.environ.get("WORLD_SIZE", "1"))
    student, train = recipe.student, recipe.train
    trainable = whole = facts.student.parameters
    weights = 0.0
    if student.lora is not None:
        trainable = _adapter_parameters(student, facts)
        weights = whole * (QUANTIZED_BYTES[student.quantize] if student.quantize else 4)
    weights += trainable * STATE_BYTES
    for name, teacher in recipe.teachers.items():
        if isinstance(teacher, CachedTeacher):  # it is loaded for evaluations, and not to train
            continue
        each = (
            QUANTIZED_BYTES[teacher.quantize] if teacher.quantize else _stored(teacher, facts, name)
        )
        weights += facts.teachers[name].parameters * each
    gradients = trainable * GRADIENT_BYTES
    if train.parallel == "fsdp":
        weights, gradients = weights / size, gradients / size
    if student.dtype != "float32":  # autocast keeps a copy of each weight until the backward pass
        weights += whole * BYTES[student.dtype]
    if _on_cpu(train.device):
        gradients = max(gradients, trainable * COPY_BYTES)
    tokens = train.batch_tokens / (size * train.accumulate)
    layers = _layer_floats(facts.student.config, student.gradient_checkpointing)
    layers *= BYTES[student.dtype]
    activations = tokens * (layers + _logit_bytes(recipe, facts))
    return Plan(recipe, facts, trainable, round(weights), round(gradients), round(activations))


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _logit_bytes(recipe: Recipe, facts: Facts) -> int:
    """Bytes of a row: the logits of each model, and what the losses make of them."""
    kinds = [str(getattr(term.objective, "kind", "")) for term in recipe.terms]
    columns = facts.student.config.vocab_size
    # A further loss keeps one for the backward pass; the temporaries of two never meet.
    copies = max(LOSS_COPIES.get(kind, OTHER_COPIES) for kind in kinds) + len(kinds) - 1
    columns *= 1 + copies
    heard = {term.teacher for term in recipe.terms if term.teacher is not None}
    # The few tokens that a cache keeps of a row weigh nothing beside its logits.
    whole = {name for name in heard if "logits" in recipe.teachers[name].offers}
    return 4 * (columns + sum(facts.teachers[name].config.vocab_size for name in whole))


def _settings(spec: CachedTeacher) -> str:
    if "sparse" not in spec.offers:
        return ""
    return f", k {spec.k}" + (f", temperature {spec.temperature:g}" * (spec.temperature != 1))


def _on_disk(spec: CachedTeacher) -> str:
    files = [path for path in Path(spec.path).expanduser().rglob("*") if path.is_file()]
    if not files:
        return "nothing yet: limbeck cache RECIPE"
    return _bytes(sum(path.stat().st_size for path in files))


def _layer_floats(config: Any, checkpointing: bool) -> int:
    """Floats that the layers keep for a token."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    one = LAYER_WIDTHS * width + LAYER_INNER * (inner or 4 * width)
    if checkpointing:  # only each layer's input stays, and one layer is computed again
        return config.num_hidden_layers * width + one
    return config.num_hidden_layers * one


def _adapter_parameters(student: CausalStudent, facts: Facts) -> int:
    """What PEFT would train, counted on a model without storage."""
    assert student.lora is not None
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            facts.student.config, trust_remote_code=student.trust_remote_code
        )
        module = with_adapters(module, student.lora, quantized=False)
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _stored(teacher: Any, facts: Facts, name: str) -> float:
    if teacher.dtype != "auto":
        return BYTES[teacher.dtype]
    stored = str(getattr(facts.teachers[name].config, "dtype", "float32")).removeprefix("torch.")
    return BYTES.get(stored, 4)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*head, box=None, padding=(0, 3, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
