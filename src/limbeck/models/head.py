"""A model's output head, seen from outside: what it reads, and its weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.losses.projection import Projection
from limbeck.models.modes import evaluating

log = logging.getLogger(__name__)

PROBE_TOKENS = 4

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What Gemma 2, RecurrentGemma and xLSTM call the cap of their logits."""


@dataclass(frozen=True)
class Head:
    """How a model makes logits of what its head reads; see `Projection`."""

    scale: float = 1.0
    soft_cap: float | None = None

    def project(self, module: Any, hidden: Tensor) -> Projection:
        """What `module`, a linear layer perhaps with adapters, would make of `hidden`."""
        linear = getattr(module, "base_layer", module)
        low_hidden = low_weight = None
        if linear is not module and not module.merged and not module.disable_adapters:
            (name,) = module.active_adapters
            low_hidden = module.lora_A[name](module.lora_dropout[name](hidden))
            low_hidden = low_hidden * module.scaling[name]
            low_weight = module.lora_B[name].weight
        return Projection(
            hidden=hidden,
            weight=linear.weight,
            bias=linear.bias,
            low_hidden=low_hidden,
            low_weight=low_weight,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )


def head_of(transformer: Any) -> Head | None:
    """How this model makes its logits, or None where it is not known.

    Architectures scale and cap their logits each in its own way and under its own name, so what
    the configuration says is tried on a few tokens, and believed only if the logits come out alike.
    """
    module = transformer.get_output_embeddings()
    linear = getattr(module, "base_layer", module)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return None
    if linear is not module and len(getattr(module, "active_adapters", ())) != 1:
        return None
    config = transformer.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    caps = (getattr(config, name, None) for name in SOFT_CAPS)
    head = Head(float(scale), next((float(cap) for cap in caps if cap is not None), None))
    if _is_true(head, transformer, linear):
        return head
    log.info(
        "%s makes its logits in a way that is not known here, so they are made in full",
        type(transformer).__name__,
    )
    return None


def _is_true(head: Head, transformer: Any, linear: nn.Linear) -> bool:
    ids = torch.arange(PROBE_TOKENS, device=linear.weight.device)[None] % linear.out_features
    try:
        with torch.no_grad(), evaluating(transformer):
            with reading(transformer) as seen:
                expected = transformer(input_ids=ids, use_cache=False).logits
            module = transformer.get_output_embeddings()
            got = head.project(module, seen[0]).logits()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        log.debug("the head could not be probed: %s", error)
        return False
    if got.shape != expected.shape:
        return False
    size, eps = expected.abs(), torch.finfo(expected.dtype).eps
    # In half precision 30 roundings may be all that a cap does. But there both round alike.
    tolerance = 30 * eps * size.max() if expected.dtype == torch.float32 else eps * size
    return bool(((got - expected).abs() <= tolerance).all())


@contextmanager
def reading(transformer: Any) -> Iterator[list[Tensor]]:
    """What the head reads in the block."""
    seen: list[Tensor] = []
    handle = transformer.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def rows_of_head(transformer: Any, rows: Tensor) -> Iterator[None]:
    """Let the head see only `rows`: logits come out [n, v], never [b, t, v].

    A hook on the head works for every architecture, keeps what the model does to its logits
    afterwards (soft caps, scales), and runs inside the sharded module under FSDP.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, -2)[rows], *inputs[1:])

    handle = transformer.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def instead_of_head(
    transformer: Any, head: Head, rows: Tensor, dtype: torch.dtype | None, use: Callable[..., Any]
) -> Iterator[None]:
    """Let `use` take the head's place: it is given the rows' `Projection`, and what it returns is
    what the whole module returns.

    It runs inside the module's forward pass, where FSDP has the head's weights together; and as
    its answer is the module's output, DDP and FSDP see where the backward pass begins. The head
    itself runs on no rows, so whatever the model does to its logits afterwards costs nothing.

    Args:
        transformer: the model inside of any distributed wrapper.
        head: how it makes its logits.
        rows: [n] flat positions that the head would see.
        dtype: what the head would compute in under autocast; None for its own.
        use: (Projection) -> tensors.
    """
    answers: list[Any] = []

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0].flatten(0, -2)[rows]
        answers.append(use(head.project(module, hidden if dtype is None else hidden.to(dtype))))
        return (hidden[:0], *inputs[1:])

    def answer(*_: Any) -> Any:
        return answers.pop()

    handles = [
        transformer.get_output_embeddings().register_forward_pre_hook(take),
        # Ahead of FSDP's own, which looks at the output.
        transformer.register_forward_hook(answer, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
