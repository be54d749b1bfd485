"""The report's pictures, drawn with matplotlib.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; arms also
differ by marker. Figures are objects of their own: pyplot's global state is not touched.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.core.files import sweep, write_picture
from limbeck.recipe.report import ARMS, EvalFigures, Report

Line = Mapping[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
ARM_STYLES = {
    "teacher": ("teacher", GREY, "s"),
    "before": ("student before", "#CC79A7", "v"),
    "control": ("labels only", "#D55E00", "D"),
    "after": ("student after", "#0072B2", "o"),
}
WIDTH, HEIGHT = 8.0, 4.5


def draw(
    folder: str | os.PathLike[str], report: Report, metrics_path: str | os.PathLike[str]
) -> list[Path]:
    """Draw what there is data for into `folder/plots` and say which files that were.

    `loss.png`: each term's loss over the steps; `agreement.png`: KL and top-1 over the steps;
    `quality_size.png`: quality against parameters for teacher and student. The control arm's
    metrics are looked for beside the run's, in `control/metrics.jsonl`.
    """
    metrics_path = Path(metrics_path)
    run = read_metrics(metrics_path)
    control = read_metrics(metrics_path.parent / "control" / "metrics.jsonl")
    drawn = {
        "loss.png": _loss(run, control),
        "agreement.png": _agreement(run, control),
        "quality_size.png": _quality_size(report),
    }
    target = Path(folder) / "plots"
    sweep(target)
    paths: list[Path] = []
    for name, figure in drawn.items():
        if figure is not None:
            write_picture(target / name, figure)
            paths.append(target / name)
    return paths


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics file in order of their steps; none where there is no such file.

    A resumed run writes some steps again: the last line of a step counts. A last line that a
    crash cut short is left out.
    """
    if not path.is_file():
        return []
    steps: dict[int, Line] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line: Any = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            steps[line["step"]] = {**steps.get(line["step"], {}), **line}
    return [steps[step] for step in sorted(steps)]


def _series(lines: Sequence[Line], key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one figure."""
    points = [
        (int(line["step"]), float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a fortieth of the steps; short series stay as they are."""
    reach = len(values) // 80
    parts = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def _figure(panels: int = 1) -> tuple[Any, list[Any]]:
    # Not at the top of the file: whoever draws nothing need not wait for it.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(WIDTH, HEIGHT), layout=layout)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _curve(axis: Any, lines: Sequence[Line], key: str, **style: Any) -> list[float]:
    """A smoothed curve over the faint one it was made from; gives the smoothed values."""
    steps, values = _series(lines, key)
    smooth = _smooth(values)
    if smooth != values:
        axis.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
    axis.plot(steps, smooth, linewidth=1.8, **style)
    return smooth


def _loss(run: Sequence[Line], control: Sequence[Line]) -> Any:
    if len(_series(run, "loss")[0]) < 2:
        return None
    figure, (axis,) = _figure()
    keys = {key: None for line in run for key in line if key.startswith("loss/")}
    terms = [key for key in keys if _series(run, key)[0]]
    curves = [(run, key, key.removeprefix("loss/"), "-") for key in terms]
    if len(terms) != 1:  # with one term the total says nothing new
        curves.insert(0, (run, "loss", "total", "-"))
    if _series(control, "loss")[0]:
        curves.append((control, "loss", "labels only (control arm)", "--"))
    values: list[float] = []
    colours = iter(COLOURS * (1 + len(curves) // len(COLOURS)))
    for lines, key, label, dash in curves:
        colour = GREY if label == "total" or dash == "--" else next(colours)
        values += _curve(axis, lines, key, color=colour, linestyle=dash, label=label)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per row)")
    axis.set_title("Training loss by term", loc="left")
    axis.legend(frameon=False)
    return figure


def _agreement(run: Sequence[Line], control: Sequence[Line]) -> Any:
    shown = [
        ("eval/kl_nats", "KL(teacher || student), nats per token", "Distance (lower is better)"),
        ("eval/top1", "rows with the same top token, %", "Same top token (higher is better)"),
    ]
    shown = [item for item in shown if len(_series(run, item[0])[0]) >= 2]
    if not shown:
        return None
    figure, axes = _figure(len(shown))
    for axis, (key, label, title) in zip(axes, shown, strict=True):
        factor = 100 if key.endswith("top1") else 1
        for arm, lines in (("after", run), ("control", control)):
            steps, values = _series(lines, key)
            if steps:
                _, colour, marker = ARM_STYLES[arm]
                name = "distilled" if arm == "after" else "labels only"
                axis.plot(
                    steps,
                    [factor * value for value in values],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.8,
                    label=name,
                )
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.set_title(title, loc="left", fontsize="medium")
        if factor == 1:
            axis.set_ylim(bottom=0)
    if any(_series(control, key)[0] for key, _, _ in shown):
        axes[0].legend(frameon=False)
    figure.suptitle("Agreement with the teacher on held-out text", x=0.01, ha="left")
    return figure


def _quality_size(report: Report) -> Any:
    name, quality = _first_quality(report)
    sizes = {
        arm: report.teacher.parameters if arm == "teacher" else report.student.parameters
        for arm in ARMS
    }
    points = [
        (arm, size) for arm, size in sizes.items() if size and _value(quality, arm) is not None
    ]
    if not any(arm == "after" for arm, _ in points) or len(points) < 2:
        return None
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, (axis,) = _figure()
    low, high = min(size for _, size in points), max(size for _, size in points)
    window = max(1.4 * math.log10(high / low), 0.6)  # decades that the axis shows
    middle = math.sqrt(low * high)
    # The student's arms have one size; they stand side by side so that no bar hides another.
    aside = {"teacher": 0.0, "before": -0.025, "control": 0.0, "after": 0.025}
    for arm, size in points:
        label, colour, marker = ARM_STYLES[arm]
        value = 100 * (_value(quality, arm) or 0.0)
        interval = quality.interval(arm)
        bars = None
        if interval is not None:
            bars = [[max(0.0, value - 100 * interval[0])], [max(0.0, 100 * interval[1] - value)]]
        axis.errorbar(
            [size * 10 ** (window * aside[arm])],
            [value],
            yerr=bars,
            color=colour,
            marker=marker,
            markersize=8,
            linestyle="none",
            capsize=4,
            label=f"{label}: {value:.1f}%",
        )
    axis.set_xscale("log")
    axis.set_xlim(middle / 10 ** (window / 2), middle * 10 ** (window / 2))
    axis.set_xticks(sorted({size for _, size in points}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("parameters (log scale)")
    axis.set_ylabel(f"{name}, %")
    axis.set_title("Quality against size (bars: 95% intervals)", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(points))
    return figure


def _first_quality(report: Report) -> tuple[str, EvalFigures]:
    """The first score that is a share, such as a task's accuracy; else top-1 agreement."""
    for name, figures in report.evals.items():
        if figures.unit == "share" and figures.after is not None:
            return name, figures
    agreement = report.agreement
    control = agreement.control
    return "same top token as the teacher", EvalFigures(
        teacher=1.0,  # it agrees with itself, by definition
        before=agreement.before.top1,
        after=agreement.after.top1,
        control=None if control is None else control.top1,
        interval95=agreement.after.intervals.get("top1"),
        intervals={
            "before": agreement.before.intervals.get("top1"),
            "control": None if control is None else control.intervals.get("top1"),
        },
    )


def _value(figures: EvalFigures, arm: str) -> float | None:
    value: float | None = getattr(figures, arm)
    return value if value is not None and math.isfinite(value) else None


def _count(value: float) -> str:
    for size, mark in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{mark}"
    return f"{value:.0f}"
