"""Which layer of the student stands beside which of the teacher."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from limbeck.align.spans import pair
from limbeck.core.errors import RecipeError
from limbeck.core.files import write_json
from limbeck.core.protocols import Network, Scene
from limbeck.core.types import Needs, Signals
from limbeck.losses.features import FEWEST_ROWS, unbiased_gram

Layer = int | str
"""A decoder layer's number, from 0 or from the end (-1), or the name of a module."""

LayerPair = tuple[str, str]
"""Two sites (see `core.types.Needs`), the student's first."""

LAST = re.compile("last-[1-9][0-9]{0,3}")
WORDS = "last, last-K (such as last-3), uniform, cka, or pairs such as [[3, 7], [5, 11]]"
BATCH = 4
"""Samples read at a time to compare layers."""

ROWS = 512
"""Of these samples, that are compared; the others add little to the estimate."""


def _shape(given: Any) -> Any:
    """Says what is wanted, which pydantic's own words about a union of types would not."""
    pairs = isinstance(given, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(layer, int | str) for layer in pair)
        for pair in given
    )
    if not isinstance(given, str) and not pairs:
        raise RecipeError("", f"{given!r:.60} is none of: {WORDS}")
    return given


Layers = Annotated[str | tuple[tuple[Layer, Layer], ...], BeforeValidator(_shape)]
"""How a recipe names layer pairs: [student, teacher] each, or a word.

- `last`: the last of both.
- `last-K`: the last K of both, in order.
- `uniform`: each of the student's layers beside the teacher's at the same share of its depth.
- `cka`: each of the student's layers beside the teacher's most similar one, before training.
"""


def check_layers(layers: Layers) -> None:
    """What can be said of `layers` before models are known.

    Raises:
        RecipeError: it is no word that is known, or a list that is empty or has a pair twice.
    """
    if isinstance(layers, str):
        if layers not in ("last", "uniform", "cka") and not LAST.fullmatch(layers):
            raise RecipeError("layers", f"{layers!r} is none of: {WORDS}")
    elif not layers or len(set(layers)) < len(layers):
        found = "a pair stands there twice" if layers else "there are no pairs"
        raise RecipeError("layers", f"{found}; give {WORDS}")


def layer_pairs(layers: Layers, scene: Scene) -> tuple[LayerPair, ...]:
    """The pairs that `layers` means for the models at hand.

    What `cka` chooses is kept as `layers.json` in the scene's folder, and read there when a run is
    resumed, since by then the student is no longer what it was.

    Raises:
        RecipeError: a layer does not exist; it names the range.
    """
    check_layers(layers)
    student, teacher = scene.student, teacher_of(scene)
    depths = student.depth, teacher.depth
    if layers == "last":
        layers = "last-1"
    if layers == "uniform":
        return uniform(*depths)
    if layers == "cka":
        return _kept(scene, depths)
    if isinstance(layers, str):
        count = int(layers.removeprefix("last-"))
        if count > min(depths):
            raise RecipeError(
                "layers",
                f"{layers!r} is more than there are: the student has {depths[0]} layers and the"
                f" teacher {depths[1]}",
            )
        return tuple((str(depths[0] - k), str(depths[1] - k)) for k in range(count, 0, -1))
    pairs = tuple(
        (_site(mine, student, "student"), _site(theirs, teacher, "teacher"))
        for mine, theirs in layers
    )
    check_layers(pairs)  # 3 and -1 may be the same
    return pairs


def teacher_of(scene: Scene) -> Network:
    """The teacher, into which one can look.

    Raises:
        RecipeError: it is not a model at hand.
    """
    if scene.teacher is None:
        raise RecipeError("", "the teacher must be a model at hand, not a cache of what it said")
    return scene.teacher


def number_of(site: str) -> int | None:
    """The layer's number where a site is one, None where it is the name of a module."""
    return int(site) if re.fullmatch(r"-?[0-9]+", site) else None


def uniform(student: int, teacher: int) -> tuple[LayerPair, ...]:
    """Layer i + 1 of m beside layer ceil((i + 1) * n / m) of n, so that the last ones meet.

    >>> uniform(2, 6)
    (('0', '2'), ('1', '5'))
    """
    return tuple((str(i), str(-(-(i + 1) * teacher // student) - 1)) for i in range(student))


def monotone(gain: Tensor) -> list[int]:
    """For each row of [m, n] a column, none before that of the row above, with the largest sum.

    >>> monotone(torch.tensor([[0.1, 0.9], [0.8, 0.5]]))
    [1, 1]
    """
    best, chosen = torch.zeros_like(gain[0]), list[Tensor]()
    for row in gain:
        best, origin = (best + row).cummax(0)
        chosen.append(origin)
    column, columns = gain.shape[1] - 1, list[int]()
    for origin in reversed(chosen):
        column = int(origin[column])
        columns.append(column)
    return columns[::-1]


def layer_similarity(scene: Scene) -> Tensor:
    """[m, n] debiased linear CKA of all layers of the student with all of the teacher, float64.

    HSIC is averaged over small batches, which leaves the debiased estimate unbiased: no more than a
    batch's hidden states are held.

    Raises:
        RecipeError: the samples have too few rows in common.

    Source: Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?" (arXiv 2010.15327).
    """
    ours, theirs = (
        frozenset(f"hidden:{layer}" for layer in range(network.depth))
        for network in (scene.student, teacher_of(scene))
    )
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(3)]  # of xy, xx, yy
    for said, heard in _read(scene, ours, theirs):
        x, y = _grams(said), _grams(heard)
        weight = 1 / (len(said.labels) - 3)  # HSIC is sum / (n (n - 3)), and counts n times
        totals[0] = totals[0] + weight * (x @ y.T)
        totals[1] = totals[1] + weight * x.square().sum(1)
        totals[2] = totals[2] + weight * y.square().sum(1)
    if not totals[0].ndim:
        raise RecipeError("layers", "`cka` found too little text to compare layers on; name pairs")
    scale = (totals[1][:, None] * totals[2]).sqrt()
    return torch.where(scale > 0, totals[0] / torch.where(scale > 0, scale, 1.0), 0.0)


def _grams(signals: Signals) -> Tensor:
    """[layers, n * n]: of each layer, the products of all rows."""
    states = [signals.hidden[str(layer)] for layer in range(len(signals.hidden))]
    return torch.stack([unbiased_gram(x.double().cpu()).flatten() for x in states])


def _read(scene: Scene, ours: Needs, theirs: Needs) -> Iterator[tuple[Signals, Signals]]:
    """What both say at some rows where they have read the same text, batch by batch."""
    student, teacher = scene.student, teacher_of(scene)
    same = student.vocabulary == teacher.vocabulary
    for first in range(0, len(scene.samples), BATCH):
        samples = scene.samples[first : first + BATCH]
        mine, other = (n.collate([n.encode(s) for s in samples]) for n in (student, teacher))
        pairing = pair(mine, other, [1.0] * len(samples), same_vocabulary=same)
        with torch.no_grad():
            said, heard = student.read(mine, ours), teacher.read(other, theirs)
        said = said.select(pairing.to(said.labels.device).student)
        heard = heard.select(pairing.to(heard.labels.device).teacher)
        step = -(-len(said.labels) // ROWS)
        if len(said.labels) >= FEWEST_ROWS:
            yield said.select(_every(step, said)), heard.select(_every(step, heard))


def _every(step: int, signals: Signals) -> Tensor:
    return torch.arange(0, len(signals.labels), step, device=signals.labels.device)


def _kept(scene: Scene, depths: tuple[int, int]) -> tuple[LayerPair, ...]:
    """The choice that was made before, or a new one."""
    path = scene.folder / "layers.json"
    models = {
        "student": [scene.student.name, depths[0]],
        "teacher": [teacher_of(scene).name, depths[1]],
    }
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not whole
        kept = {}
    if kept.get("models") == models:
        return tuple((str(mine), str(theirs)) for mine, theirs in kept["pairs"])
    gain = layer_similarity(scene)
    pairs = list(enumerate(monotone(gain)))
    write_json(path, {"models": models, "pairs": pairs, "similarity": gain.tolist()})
    return tuple((str(mine), str(theirs)) for mine, theirs in pairs)


def _site(layer: Layer, network: Network, whose: str) -> str:
    """The name under which a layer's signals come; numbers are counted from 0."""
    number = number_of(str(layer))
    if number is None:
        network.width(str(layer))  # raises where there is no such module
        return str(layer)
    if not -network.depth <= number < network.depth:
        raise RecipeError(
            "layers",
            f"the {whose} has no layer {number}; it has 0 to {network.depth - 1}, and -1 is the"
            " last",
        )
    return str(number % network.depth)
