"""A picture of how much each unit counts, and where the cut was made.

matplotlib is imported where it is used: a run that draws nothing does not wait for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck.core.files import write_picture

KEPT, DROPPED = "#0072B2", "#999999"  # of Okabe and Ito, which people of any colour vision can tell
PANEL_WIDTH, PANEL_HEIGHT = 6.0, 4.0
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One layer's units.

    Attributes:
        title: whose they are.
        label: what the scores are.
        scores: [d], not negative and not all 0.
        kept: how many of the highest were kept.
    """

    title: str
    label: str
    scores: Tensor
    kept: int


def draw_scores(path: Path, panels: Sequence[Panel]) -> None:
    """Sorted scores with the cut, on a logarithmic axis, one panel for each layer."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (PANEL_WIDTH * columns, PANEL_HEIGHT * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    write_picture(path, figure)


def _draw(axis: Any, panel: Panel) -> None:
    scores = panel.scores.sort(descending=True).values.double()
    share = float(scores[: panel.kept].sum() / scores.sum())
    positive = scores[scores > 0]
    bottom = 0.0
    if positive[0] > positive[-1]:
        bottom = float(positive[-1]) / 2
        axis.set_yscale("log")
    for first, last, colour in ((0, panel.kept, KEPT), (panel.kept, len(scores), DROPPED)):
        if first < last:
            edges = [rank + 0.5 for rank in range(first, last + 1)]
            heights = scores[first:last].clamp(min=bottom).tolist()
            axis.stairs(heights, edges, baseline=bottom, fill=True, color=colour)
    axis.set_ylim(bottom=bottom)
    axis.axvline(panel.kept + 0.5, color="black", linewidth=1.0)
    axis.annotate(
        f"kept: {panel.kept} of {len(scores)},\n{share:.0%} of the sum",
        (panel.kept + 0.5, float(scores[0])),
        xytext=(6, -2),
        textcoords="offset points",
        verticalalignment="top",
    )
    axis.set_xlim(0.5, len(scores) + 0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("units, highest first")
    axis.set_ylabel(panel.label)
    axis.set_title(panel.title, loc="left")
