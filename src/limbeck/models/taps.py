"""Reading a network from inside: hidden states and attention scores at named places.

Hooks and transformers' own table of attention functions do it, so no model's code is touched. Only
what is asked for is kept, and only until it has been handed over.
"""

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from limbeck.core.errors import ModelError, RecipeError
from limbeck.core.types import Needs, View, sites

NEAR = 5
"""Names that an error lists."""

TAPPED = "limbeck_tapped_"
"""What an attention's name in transformers begins with, once its scores can be read."""


def decoder_layers(module: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest list of modules in the model."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def inside(transformer: Any) -> Any:
    """The model of transformers inside of PEFT's wrapper."""
    return transformer.get_base_model() if hasattr(transformer, "peft_config") else transformer


def layer_of(transformer: Any, site: str) -> int:
    """The number of the decoder layer, from 0, that a site such as `3` or `-1` names.

    Raises:
        RecipeError: the model has no such layer.
    """
    count = len(decoder_layers(transformer))
    number = int(site)
    if not -count <= number < count:
        raise RecipeError("layers", f"no layer {number}; the model has 0 to {count - 1}")
    return number % count


def name_of(transformer: Any, module: nn.Module) -> str:
    """The name of a part within the model."""
    return next(name for name, part in inside(transformer).named_modules() if part is module)


def module_at(transformer: Any, site: str) -> nn.Module:
    """The part of the network whose output is the hidden state of a site.

    Raises:
        RecipeError: there is no such part; it names near ones.
    """
    if site.removeprefix("-").isdigit():
        return decoder_layers(transformer)[layer_of(transformer, site)]
    parts = dict(inside(transformer).named_modules())
    if site and site in parts:
        return parts[site]
    near = difflib.get_close_matches(site, list(parts), n=NEAR, cutoff=0.4)
    if not near:
        near = [name for name in parts if name.endswith(site.rpartition(".")[2])] or list(parts)[1:]
    raise RecipeError(
        "layers",
        f"no part {site!r} in {type(inside(transformer)).__name__}; near: "
        + ", ".join(near[:NEAR]),
    )


@dataclass
class Seen:
    """What the taps of one forward pass have seen; `hidden` and `attention` hand it over."""

    view: View
    states: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    looks: dict[str, "Look"] = field(default_factory=dict[str, "Look"])

    def hidden(self) -> dict[str, Tensor]:
        """[n, d] by site."""
        rows = self.view.rows
        return {s: x if len(x.shape) == 2 else _flat(x)[rows] for s, x in self.states.items()}

    def attention(self) -> dict[str, Tensor]:
        """[n, h, t] by site."""
        return {site: look.scores(self.view) for site, look in self.looks.items()}


@dataclass(frozen=True)
class Look:
    """Queries and keys of a layer as its attention function got them."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    soft_cap: float | None

    def scores(self, view: View) -> Tensor:
        """[n, h, t] scores of the view's rows, -inf where attention does not look."""
        rows, width = view.rows, view.ids.shape[1]
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = (self.query @ key.mT).float() * self.scaling
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        lines, places = rows // width, rows % width
        scores = scores[lines, :, places]  # [n, h, t]
        columns = torch.arange(width, device=rows.device)
        allowed = columns <= places[:, None]
        every = torch.arange(view.ids.numel(), device=rows.device)
        owner = view.sample_of(every).view(view.ids.shape)
        allowed &= owner[lines] == view.sample_of(rows)[:, None]
        if self.mask is not None and self.mask.ndim == 4:  # a window, or a mask of the model's own
            mask = self.mask.expand(len(view.ids), -1, -1, -1)[:, 0][lines, places]
            allowed &= mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return scores.masked_fill(~allowed[:, None], -torch.inf)


@contextmanager
def tapping(transformer: Any, view: View, needs: Needs) -> Iterator[Seen]:
    """Let what `needs` asks of hidden states and attention be seen in a forward pass on `view`.

    Raises:
        RecipeError: a site does not exist.
        ModelError: the model's attention does not go through transformers' table of functions.
    """
    seen = Seen(view)
    looking = sites(needs, "attention")
    with ExitStack() as stack:
        for site in sites(needs, "hidden"):
            hook = partial(_keep, seen, site)
            handle = module_at(transformer, site).register_forward_hook(hook)
            stack.callback(handle.remove)
        if looking:
            listen_to_attention(transformer)
            layers = decoder_layers(transformer)
            owners = {
                id(part): site
                for site in looking
                for part in layers[layer_of(transformer, site)].modules()
            }
            _listeners.append((owners, seen))
            stack.callback(_listeners.pop)
        yield seen
        if missing := [site for site in looking if site not in seen.looks]:
            raise ModelError(
                f"{type(transformer).__name__} does not show its attention (layer {missing[0]}):"
                " it has attention of its own; use attention_relations, which reads its projections"
            )


def _flat(hidden: Tensor) -> Tensor:
    return hidden.flatten(0, -2)


def _keep(seen: Seen, site: str, _: nn.Module, __: Any, output: Any) -> None:
    value = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(value, Tensor) or value.shape[:-1] != seen.view.ids.shape:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RecipeError("layers", f"{site!r} gives no hidden state [b, t, d]; it gives {shape}")
    # With a gradient, the rows are taken later: under activation checkpointing whatever is computed
    # here would be missed when the layer is run again.
    seen.states[site] = value if torch.is_grad_enabled() else _flat(value)[seen.view.rows]


_listeners: list[tuple[dict[int, str], Seen]] = []
"""Who looks at attention in the present forward pass: the sites of its modules, and where to."""


def listen_to_attention(transformer: Any) -> None:
    """Send a model's attention through a function that can be listened to; once is enough.

    The kernel stays what it was. Scores of the layers that are asked for are computed again from
    queries and keys, as no fast kernel gives them away.
    """
    model = inside(transformer)
    before = str(model.config._attn_implementation)
    if before.startswith(TAPPED):
        return
    name = TAPPED + before
    functions: Any = AttentionInterface._global_mapping  # pyright: ignore[reportPrivateUsage]
    masks: Any = AttentionMaskInterface._global_mapping  # pyright: ignore[reportPrivateUsage]
    if name not in functions:
        AttentionInterface.register(name, partial(_attend, functions.get(before)))
        if before in masks:
            AttentionMaskInterface.register(name, masks[before])
    model.set_attn_implementation(name)


@torch.compiler.disable
def _note(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, extra: Any) -> None:
    for owners, seen in _listeners:
        if id(module) in owners:
            scaling = extra.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            look = Look(query, key, mask, scaling, extra.get("softcap"))
            seen.looks[owners[id(module)]] = look


def _attend(
    base: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **extra: Any,
) -> Any:
    if _listeners:
        _note(module, query, key, attention_mask, extra)  # pyright: ignore[reportCallIssue]
    if base is None:  # `eager`, which each architecture has for itself, in the file of its layers
        base = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return base(module, query, key, value, attention_mask, **extra)


@contextmanager
def cut_at(transformer: Any, site: str) -> Iterator[list[Tensor]]:
    """Make the output of a site a leaf of the graph in the block; the list receives it.

    What is computed from it can then be differentiated, whatever of the model is frozen.
    """
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        leaf = (output[0] if several else output).detach().requires_grad_()
        leaves.append(leaf)
        return (leaf, *output[1:]) if several else leaf

    handle = module_at(transformer, site).register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def gradients_at(transformer: Any, site: str, rows: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """[n, d] |d sum run() / d hidden| at a site, for the flat positions `rows`."""
    with torch.enable_grad(), cut_at(transformer, site) as leaves:
        total = run().sum()
        (gradient,) = torch.autograd.grad(total, leaves[0])
    return _flat(gradient)[rows].abs()
