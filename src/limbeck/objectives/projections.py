"""Where a network's queries, keys and values come out, whatever its author called the place."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network
from limbeck.core.types import Signals

Relation = Literal["query", "key", "value"]
ORDER: tuple[Relation, ...] = ("query", "key", "value")

ATTENTION = ("self_attn", "attn", "attn.attention")
"""What decoder layers call their attention, where it has a projection each."""

GATED = ("qwen3_next", "qwen3_5", "qwen4_exp")
"""Architectures, or how their names begin, whose `q_proj` gives each head a query and a gate."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Vectors of one sort among what a projection gives.

    Attributes:
        site: the projection's name.
        width: numbers in a vector.
        start: where they begin.
        groups: how many times the projection repeats its layout; each group of `width / groups`
            numbers begins `stride` after the one before it.
        stride: from group to group.
    """

    site: str
    width: int
    start: int = 0
    groups: int = 1
    stride: int = 0

    def of(self, signals: Signals) -> Tensor:
        """[n, width]."""
        given = signals.hidden[self.site]
        size = self.width // self.groups
        if self.groups > 1:
            given = given.unflatten(-1, (self.groups, self.stride))
        return given[..., self.start : self.start + size].flatten(1)


def find_slice(network: Network, layer: int, relation: Relation) -> Slice:
    """Where the vectors of a layer are.

    Known are a projection each (`q_proj`, `k_proj`, `v_proj`: Llama, Qwen, Mistral, Gemma, OPT,
    GPT-J, GPT-Neo; Qwen3-Next and Qwen3.5 less the gates), `attn.c_attn` of GPT-2 and of
    GPT-BigCode with one head of keys, and Phi-3's `self_attn.qkv_proj` (one after the other), and
    GPT-NeoX's `attention.query_key_value` and `attn.c_attn` of GPT-BigCode with many (head by
    head).

    Raises:
        RecipeError: the layer has none of these.
    """
    prefix = network.layer_name(layer)
    place = ORDER.index(relation)
    for attention in ATTENTION:
        site = f"{prefix}.{attention}.{relation[0]}_proj"
        if (width := _width(network, site)) is not None:
            if relation == "query" and network.architecture().startswith(GATED):
                heads = network.heads()
                return Slice(site=site, width=width // 2, groups=heads, stride=width // heads)
            return Slice(site=site, width=width)
    site = f"{prefix}.attn.c_attn"
    if (width := _width(network, site)) is not None:
        # As wide as GPT-2's, and laid out otherwise.
        bigcode = network.architecture() == "gpt_bigcode"
        if bigcode and width == 3 * network.width(str(layer)):
            return _head_by_head(network, site, width, place)
        return _one_after_the_other(network, site, width, layer, relation)
    site = f"{prefix}.self_attn.qkv_proj"
    if (width := _width(network, site)) is not None:
        return _one_after_the_other(network, site, width, layer, relation)
    site = f"{prefix}.attention.query_key_value"
    if (width := _width(network, site)) is not None and width % (3 * network.heads()) == 0:
        return _head_by_head(network, site, width, place)
    raise _unknown(network, prefix)


def _head_by_head(network: Network, site: str, width: int, place: int) -> Slice:
    """Each head's query, key and value together."""
    heads = network.heads()
    size = width // (3 * heads)
    return Slice(site=site, width=width // 3, start=place * size, groups=heads, stride=3 * size)


def _one_after_the_other(
    network: Network, site: str, width: int, layer: int, relation: Relation
) -> Slice:
    """All queries, then all keys, then all values, of which there may be fewer heads."""
    queries, heads = network.width(str(layer)), network.heads()
    others, left = divmod(width - queries, 2)
    if others <= 0 or left or queries % heads or others % (queries // heads):
        raise _unknown(network, network.layer_name(layer))
    start = {"query": 0, "key": queries, "value": queries + others}[relation]
    return Slice(site=site, width=queries if relation == "query" else others, start=start)


def _width(network: Network, site: str) -> int | None:
    try:
        return network.width(site)
    except RecipeError:
        return None


def _unknown(network: Network, prefix: str) -> RecipeError:
    return RecipeError(
        "",
        f"the attention of {network.name!r} ({prefix}) makes its queries, keys and values in a way"
        " that is not known here; use `features` or, with one tokenizer, `attention_maps`",
    )
