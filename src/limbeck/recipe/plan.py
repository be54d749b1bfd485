"""What a run would do and take, found without loading a weight."""

import os
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table

from limbeck.recipe.check import Facts, check
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import dump
from limbeck.recipe.schema import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
QUANTIZED_BYTES = {"4bit": 0.5, "8bit": 1.0}
MASTER_BYTES = 4 + 4 + 8
"""Of a trained parameter: float32 weight, its gradient, and AdamW's two moments."""

LAYER_WIDTHS = 16
"""Floats that a layer keeps for the backward pass, per token and unit of width: norms, query, key,
value, attention's output, residuals; its feed-forward part is counted apart."""

LOGIT_COPIES = 3
"""[n, v] float32 tensors alive at once for each model that gives logits: the logits, their
log-probabilities, and a temporary of the divergence or the gradient."""


@dataclass(frozen=True)
class Plan:
    """Figures of a run to come; bytes are per device.

    Attributes:
        trainable: parameters that an optimizer step changes.
        weights_bytes: student, gradients, optimizer and teachers.
        activations_bytes: of the largest micro-batch, logits included.
    """

    recipe: Recipe
    facts: Facts
    trainable: int
    weights_bytes: int
    activations_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.activations_bytes

    @property
    def tokens(self) -> int:
        """Tokens that all steps read."""
        return self.recipe.train.steps * self.recipe.train.batch_tokens

    def render(self) -> RenderableType:
        """Tables for the terminal."""
        train = self.recipe.train
        return Group(
            Syntax(dump(self.recipe), "yaml", background_color="default"),
            self._terms(),
            _table(
                ("models", "parameters", "trained"),
                [
                    ("student", f"{self.facts.student.parameters:,}", f"{self.trainable:,}"),
                    *((n, f"{f.parameters:,}", "0") for n, f in self.facts.teachers.items()),
                ],
            ),
            _table(
                ("memory of a device", "estimate"),
                [
                    ("weights, gradients, optimizer, teachers", _bytes(self.weights_bytes)),
                    ("activations and logits of a micro-batch", _bytes(self.activations_bytes)),
                    ("together", _bytes(self.memory_bytes)),
                ],
            ),
            f"{train.steps:,} steps of {train.batch_tokens:,} tokens: {self.tokens:,} tokens",
        )

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

        trained * 16 + frozen * bytes + teachers * bytes                          (weights)
        + tokens * layers * (16 d + 3 f) * 4 + rows * v * 4 * copies              (activations)

    for a micro-batch of `tokens = batch_tokens / (processes * accumulate)`, width d, feed-forward
    width f and vocabulary v, where every token is taken as a row. FSDP splits the weights.

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
    trainable = facts.student.parameters
    frozen_bytes = 0.0
    if student.lora is not None:
        trainable = _lora_parameters(facts.student.config, student.lora.rank)
        each = QUANTIZED_BYTES[student.quantize] if student.quantize else 4
        frozen_bytes = facts.student.parameters * each
    weights = trainable * MASTER_BYTES + frozen_bytes
    for name, teacher in recipe.teachers.items():
        each = (
            QUANTIZED_BYTES[teacher.quantize] if teacher.quantize else _stored(teacher, facts, name)
        )
        weights += facts.teachers[name].parameters * each
    if train.parallel == "fsdp":
        weights /= size
    tokens = train.batch_tokens / (size * train.accumulate)
    models = 1 + sum(1 for term in recipe.terms if term.teacher is not None)
    logits = tokens * facts.student.config.vocab_size * 4 * LOGIT_COPIES * models
    layers = _layer_bytes(facts.student.config, student.gradient_checkpointing)
    layers *= BYTES[student.dtype] / 4
    return Plan(recipe, facts, trainable, round(weights), round(tokens * layers + logits))


def _layer_bytes(config: Any, checkpointing: bool) -> float:
    """Bytes of activations that the layers keep for a token, in float32."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = inner or 4 * width
    one = (LAYER_WIDTHS * width + 4 * inner) * 4
    if checkpointing:  # only each layer's input stays, and one layer is computed again
        return config.num_hidden_layers * width * 4 + one
    return config.num_hidden_layers * one


def _lora_parameters(config: Any, rank: int) -> int:
    """Adapters on all linear layers of a decoder: rank times the sum of both widths of each."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head
    pairs = 2 * (width + heads * head) + 2 * (width + keys) + 3 * (width + inner)
    return rank * pairs * config.num_hidden_layers


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
