"""Which units of a wide layer are kept, so that a narrow one can stand beside it.

What was chosen is stored with a fingerprint of all it was chosen from. A resumed run finds it
there: attribution needs the models as they were before training, and a pass over examples.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from limbeck.core.errors import RecipeError
from limbeck.core.files import write_bytes
from limbeck.core.protocols import Network, Scene
from limbeck.core.random import stream
from limbeck.core.types import Sample, View
from limbeck.objectives.layers import LayerPair, teacher_of
from limbeck.objectives.unit_plots import Panel, draw_scores

Select = Literal["attribution", "random", "pca"]

FILE, PICTURE = "selection.safetensors", "selection.png"
BATCH = 4
"""Samples read at a time."""

LABELS = {
    "attribution": "mean |d log p / d unit|",
    "pca": "variance along component",
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is to be made narrower.

    Attributes:
        whose: the wider model.
        site: the layer.
        width: of it.
        kept: how many numbers are to be left of it.
    """

    whose: Literal["student", "teacher"]
    site: str
    width: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was kept of a layer, one or the other.

    Attributes:
        units: [k] ascending.
        directions: [d, k], orthonormal.
        scores: [d], by which it was chosen.
    """

    units: Tensor | None = None
    directions: Tensor | None = None
    scores: Tensor | None = None


def select_units(
    scene: Scene, pairs: Sequence[LayerPair], method: Select, examples: int
) -> list[tuple[Cut, Selection]]:
    """For each pair of layers, what is kept of the wider one.

    Raises:
        RecipeError: there are fewer examples, or they have too few rows.
    """
    if examples > len(scene.samples):
        raise RecipeError(
            "examples", f"{examples} are more than the {len(scene.samples)} samples there are"
        )
    samples = scene.samples[:examples]
    cuts = [_cut(scene, pair) for pair in pairs]
    fingerprint = _fingerprint(scene, cuts, samples, method)
    path = scene.folder / FILE
    found = _stored(path, fingerprint)
    if found is None or not all(map(_fits, cuts, found)):
        found = [_select(scene, cut, samples, method) for cut in cuts]
        _store(path, found, fingerprint)
        panels = [
            Panel(f"{cut.whose}, layer {cut.site}", LABELS[method], chosen.scores, cut.kept)
            for cut, chosen in zip(cuts, found, strict=True)
            if chosen.scores is not None
        ]
        if panels:
            draw_scores(scene.folder / PICTURE, panels)
    return list(zip(cuts, found, strict=True))


def attribution(network: Network, samples: Sequence[Sample], site: str) -> Tensor:
    """[d] mean |d sum of log p(label) / d unit| over all learnt rows, float64.

    Raises:
        RecipeError: no row is learnt, or a gradient is not finite.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for view in _views(network, samples):
        size = network.attribution(view, site)
        total = total + size.double().cpu().sum(0)
        count += len(size)
    if not count:
        raise RecipeError("examples", "none of the examples has anything to learn")
    if not bool(total.isfinite().all()) or not bool(total.any()):
        raise RecipeError(
            "select",
            f"the gradient of {network.name} at {site!r} is not finite, or 0 everywhere; it ranks"
            " no units",
        )
    return total / count


def principal_components(
    network: Network, samples: Sequence[Sample], site: str, count: int
) -> tuple[Tensor, Tensor]:
    """[d, count] directions in which the states vary most, and [d] the variance along all of them.

    Each direction's largest number is positive, so that the same states give the same directions.

    Raises:
        RecipeError: there are too few rows to tell so many directions.
    """
    square, total, rows = torch.zeros((), dtype=torch.float64), torch.zeros(()), 0
    for view in _views(network, samples):
        with torch.no_grad():
            states = network.read(view, frozenset({f"hidden:{site}"})).hidden[site].double().cpu()
        square, total = square + states.T @ states, total + states.sum(0)
        rows += len(states)
    if rows <= count:
        raise RecipeError(
            "examples",
            f"the {len(samples)} examples have {rows} learnt rows, and {count} components need at"
            f" least {count + 1}; give more or longer ones",
        )
    mean = total / rows
    variance, directions = torch.linalg.eigh(square / rows - mean[:, None] * mean)
    directions = directions.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign(), variance.flip(0).clamp(min=0)


def _views(network: Network, samples: Sequence[Sample]) -> Iterator[View]:
    encodings = [network.encode(sample) for sample in samples]
    learnt = [encoding for encoding in encodings if encoding.rows]
    for first in range(0, len(learnt), BATCH):
        yield network.collate(learnt[first : first + BATCH])


def _cut(scene: Scene, pair: LayerPair) -> Cut:
    """The teacher is the one to be cut where both are as wide."""
    mine, theirs = scene.student.width(pair[0]), teacher_of(scene).width(pair[1])
    if mine > theirs:
        return Cut(whose="student", site=pair[0], width=mine, kept=theirs)
    return Cut(whose="teacher", site=pair[1], width=theirs, kept=mine)


def _select(scene: Scene, cut: Cut, samples: Sequence[Sample], method: Select) -> Selection:
    network = scene.student if cut.whose == "student" else teacher_of(scene)
    if method == "pca":
        directions, variance = principal_components(network, samples, cut.site, cut.kept)
        return Selection(directions=directions.float(), scores=variance.float())
    if cut.width == cut.kept:
        return Selection(units=torch.arange(cut.width))
    if method == "random":
        draws = stream(scene.seed, f"flex_kd {cut.whose} {cut.site}")
        return Selection(units=torch.randperm(cut.width, generator=draws)[: cut.kept].sort().values)
    scores = attribution(network, samples, cut.site)
    order = scores.argsort(descending=True, stable=True)
    return Selection(units=order[: cut.kept].sort().values, scores=scores.float())


def _fingerprint(
    scene: Scene, cuts: Sequence[Cut], samples: Sequence[Sample], method: Select
) -> dict[str, Any]:
    """All that decides what is kept, as JSON values."""
    texts = [
        [s.id, [[t.role, t.text, t.learn] for turns in (s.privileged, s.turns) for t in turns]]
        for s in samples
    ]
    networks = {"student": scene.student, "teacher": teacher_of(scene)}
    return {
        "method": method,
        "seed": scene.seed,
        "samples": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "cuts": [
            {
                **vars(cut),
                "model": networks[cut.whose].name,
                "vocabulary": networks[cut.whose].vocabulary,
            }
            for cut in cuts
        ],
    }


def _store(path: Path, chosen: Sequence[Selection], fingerprint: Mapping[str, Any]) -> None:
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, selection in enumerate(chosen)
        for name, value in vars(selection).items()
        if value is not None
    }
    write_bytes(path, save(tensors, metadata={"selection": json.dumps(fingerprint)}))


def _fits(cut: Cut, selection: Selection) -> bool:
    units, directions = selection.units, selection.directions
    if units is not None:
        return units.shape == (cut.kept,)
    return directions is not None and directions.shape == (cut.width, cut.kept)


def _stored(path: Path, fingerprint: Mapping[str, Any]) -> list[Selection] | None:
    """What was chosen before from the very same, or None."""
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {})["selection"]) != fingerprint:
                return None
            parts: list[dict[str, Tensor]] = [{} for _ in fingerprint["cuts"]]
            for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                index, _, name = key.partition(".")
                parts[int(index)][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError):  # not there, or not ours
        return None
    return [Selection(**part) for part in parts]
