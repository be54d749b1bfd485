"""How much memory a run takes, estimated from shapes alone.

    peak = weights + the larger of gradients, and activations with what the loss takes

    weights      trained * 12 + frozen * bytes + teachers * bytes
    gradients    trained * 4, and v d * 4 more where the embedding is the head
    activations  tokens * layers * (11 d + 4 f) * 4
    loss         at the head, chunk by chunk: v d * 4 + a chunk of logits for each model
                 + tokens * d * 4 for each model's hidden states and the student's gradient;
                 with whole logits: rows * v * 4 * copies
    maps         tokens * length * heads * 4 * 3 for each model and layer whose attention is matched

for a micro-batch of `tokens = batch_tokens / (processes * accumulate)`, width d, feed-forward width
f and vocabulary v, where every token is taken as a row. With accumulation, gradients and
activations are there together. FSDP splits weights and gradients. What the libraries take
themselves (a CUDA context, a tokenizer) and fragmentation come on top.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from limbeck.core.specs import (
    CachedTeacher,
    CausalStudent,
    EnsembleTeacher,
    SelfTeacher,
    ServerTeacher,
)
from limbeck.core.types import without_sites
from limbeck.losses.chunks import sizes
from limbeck.models.load import with_adapters
from limbeck.recipe.check import Facts
from limbeck.recipe.schema import Recipe
from limbeck.teachers.itself import needs_copy
from limbeck.train.loss import fits_chunks

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

MAP_COPIES = 3
"""Tensors of the size of a layer's scores that each model has at the peak of a loss of maps."""


@dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        trainable: parameters that an optimizer step changes.
        weights_bytes: student, optimizer and teachers, which are there all the time.
        gradients_bytes: gradients; on a CPU also the copies that a checkpoint makes.
        activations_bytes: what the layers keep of the largest micro-batch.
        loss_bytes: what the loss takes beside it.
        maps_bytes: what attention scores take that are matched, of rows of full length.
        together: gradients are there while activations are.
    """

    trainable: int
    weights_bytes: int
    gradients_bytes: int
    activations_bytes: int
    loss_bytes: int
    maps_bytes: int
    together: bool

    @property
    def peak_bytes(self) -> int:
        """Gradients grow as activations go, unless they wait for more micro-batches."""
        passing = self.activations_bytes + self.loss_bytes + self.maps_bytes
        if self.together:
            return self.weights_bytes + self.gradients_bytes + passing
        return self.weights_bytes + max(self.gradients_bytes, passing)


def memory_of(recipe: Recipe, facts: Facts, processes: int) -> Memory:
    """The estimate for one of `processes` devices.

    Raises:
        ModelError: adapters are asked for where there is nothing to adapt.
    """
    student, train = recipe.student, recipe.train
    trainable = whole = facts.student.parameters
    weights = 0.0
    if student.lora is not None:
        trainable = _adapter_parameters(student, facts)
        weights = whole * (QUANTIZED_BYTES[student.quantize] if student.quantize else 4)
    weights += trainable * STATE_BYTES
    for name, teacher in recipe.readers.items():
        # A cache is loaded for evaluations, not to train; an ensemble has no weights of its own.
        if isinstance(teacher, CachedTeacher | EnsembleTeacher | ServerTeacher):
            continue
        if isinstance(teacher, SelfTeacher):
            copies = needs_copy(teacher, adapters=student.lora is not None)
            weights += 4 * whole * copies
            continue
        each = (
            QUANTIZED_BYTES[teacher.quantize] if teacher.quantize else _stored(teacher, facts, name)
        )
        weights += facts.teachers[name].parameters * each
    head = facts.student.config.vocab_size * facts.student.config.hidden_size * 4
    gradients = trainable * GRADIENT_BYTES
    if student.lora is None and facts.student.config.tie_word_embeddings:
        gradients += head  # it comes in two parts, which are then added
    if train.parallel == "fsdp":
        weights, gradients = weights / processes, gradients / processes
    if student.dtype != "float32":  # autocast keeps a copy of each weight until the backward pass
        weights += whole * BYTES[student.dtype]
    if _on_cpu(train.device):
        gradients = max(gradients, trainable * COPY_BYTES)
    tokens = train.batch_tokens / (processes * train.accumulate)
    layers = _layer_floats(facts.student.config, student.gradient_checkpointing)
    if train.logits != "naive" and fits_chunks(recipe.terms):
        loss = _chunked_bytes(recipe, facts, tokens) + (head if student.lora is None else 0)
    else:
        loss = tokens * _logit_bytes(recipe, facts)
    return Memory(
        trainable=trainable,
        weights_bytes=round(weights),
        gradients_bytes=round(gradients),
        activations_bytes=round(tokens * layers * BYTES[student.dtype]),
        loss_bytes=round(loss),
        maps_bytes=round(tokens * _map_bytes(recipe, facts)),
        together=train.accumulate > 1,
    )


def _chunked_bytes(recipe: Recipe, facts: Facts, tokens: float) -> float:
    """Hidden states of each model, the student's gradient, and the chunks in work."""
    heard = {term.teacher for term in recipe.terms if "logits" in term.objective.needs}
    each = BYTES[recipe.student.dtype]
    configs = [facts.student.config, *(facts.teachers[name or ""].config for name in heard)]
    widths = sum(config.hidden_size for config in configs) + facts.student.config.hidden_size
    most = sizes("cpu" if _on_cpu(recipe.train.device) else "gpu")
    rows = min(tokens, most.chunk_rows)
    chunks = sum(min(most.chunk_bytes, rows * config.vocab_size * each) for config in configs)
    ensembles = [n for n in heard if isinstance(recipe.teachers.get(n or ""), EnsembleTeacher)]
    # An ensemble has no one head, so its logits are made in full: the sum, and one member's.
    whole = sum(2 * 4 * facts.teachers[name or ""].config.vocab_size for name in ensembles)
    return tokens * (widths * each + whole) + chunks


def _map_bytes(recipe: Recipe, facts: Facts) -> int:
    """Bytes of a row whose attention is matched: its scores in each head of both models."""
    total = 0
    for term in recipe.terms:
        if term.teacher is None or "attention" not in without_sites(term.objective.asks):
            continue
        configs = (facts.student.config, facts.teachers[term.teacher].config)
        heads = sum(config.get_text_config().num_attention_heads for config in configs)
        total += heads * recipe.student.max_length * 4 * MAP_COPIES * _pairs(term, facts)
    return total


def _pairs(term: Any, facts: Facts) -> int:
    """How many pairs of layers an objective matches: it lists them, or says `last-K` or a rule."""
    layers: Any = getattr(term.objective, "layers", "last")
    if not isinstance(layers, str):
        return len(layers)
    if layers.startswith("last"):
        return int(layers.partition("-")[2] or 1)
    return facts.student.config.get_text_config().num_hidden_layers


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
