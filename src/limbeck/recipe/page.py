"""The page that people read of a report: `report.md`, made of the figures and nothing else."""

import math
from collections.abc import Sequence
from pathlib import Path

from limbeck.evals.score import Better, Interval
from limbeck.recipe.report import ARMS, AgreementFigures, EvalFigures, ModelFacts, Report

DASH = "–"
"""Stands for what was not measured."""


def markdown(report: Report, plots: Sequence[str] = ()) -> str:
    """The page; `plots` are paths of images relative to it."""
    parts = [
        f"# {_name(report.student, 'The student')}, distilled from "
        f"{_name(report.teacher, 'no teacher')}",
        f"**{_headline(report)}**",
        *_control_verdicts(report),
        "## Quality\n\n" + _quality(report),
        "## Size, speed and cost\n\n" + _price_of_use(report),
        "## Training\n\n" + _training(report),
    ]
    if warnings := _warnings(report):
        parts.append("## Warnings\n\n" + "\n".join(f"- {line}" for line in warnings))
    if plots:
        shown = [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
        parts.append("## Plots\n\n" + "\n\n".join(shown))
    made = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    sha = f"`{report.recipe_sha256}`" if report.recipe_sha256 else DASH
    parts.append(f"## Made with\n\n{made or DASH}\n\nRecipe (SHA-256): {sha}")
    return "\n\n".join(parts) + "\n"


def _name(model: ModelFacts, otherwise: str) -> str:
    return (model.name or otherwise).replace("|", "\\|")


def _amount(value: float | None, unit: str = "") -> str:
    """A figure with about three digits: 42.0%, 1.24 M, 0.0851."""
    if value is None or not math.isfinite(value):
        return DASH
    if unit == "share":
        return f"{100 * value:.1f}%"
    for size, mark in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            divided = value / (1e3 if size == 1e4 else size)
            return f"{divided:.3g}{mark}" if divided < 999.5 else f"{divided:.0f}{mark}"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:#,.{3 if abs(value) < 1000 else 4}g}"
    return text.removesuffix(".")


def _ranged(value: float | None, interval: Interval | None, unit: str) -> str:
    """A figure and its interval, as `42.0% [39.4, 44.7]`."""
    if value is None or interval is None or not all(map(math.isfinite, interval)):
        return _amount(value, unit)
    low, high = (_amount(end, unit).removesuffix("%") for end in interval)
    return f"{_amount(value, unit)} [{low}, {high}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns in which no row has anything."""
    kept = [0] + [
        column
        for column in range(1, len(head))
        if any(row[column] not in ("", DASH) for row in rows)
    ]
    lines = [[head[column] for column in kept], ["---"] + ["---:"] * (len(kept) - 1)]
    lines += [[row[column] for column in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(report: Report) -> dict[str, EvalFigures]:
    """All scores by their names on the page, agreement among them."""
    figures = dict(report.evals)
    arms = {
        "before": report.agreement.before,
        "control": report.agreement.control or AgreementFigures(),
        "after": report.agreement.after,
    }
    shown: list[tuple[str, str, Better, str]] = [
        ("same top token as the teacher", "top1", "higher", "share"),
        ("KL from the teacher", "kl_nats", "lower", "nats/token"),
    ]
    for name, key, better, unit in shown:
        values = {arm: getattr(figure, key) for arm, figure in arms.items()}
        if any(value is not None for value in values.values()):
            intervals = {arm: figure.intervals.get(key) for arm, figure in arms.items()}
            figures[name] = EvalFigures(
                **values,
                n=report.agreement.after.n,
                interval95=intervals.pop("after"),
                intervals=intervals,
                better=better,
                unit=unit,
            )
    return figures


def _headline(report: Report) -> str:
    student = _name(report.student, "The student")
    teacher = _name(report.teacher, "its teacher")
    sentence = f"{student} was trained; its quality was not measured"
    task = next((item for item in report.evals.items() if item[1].retention is not None), None)
    top1 = report.agreement.after.top1
    bits = report.evals.get("bits_per_byte")
    if task is not None:
        name, figures = task
        after, whole = (_amount(value, figures.unit) for value in (figures.after, figures.teacher))
        kept = _amount(figures.retention, "share")
        sentence = f"{student} keeps {kept} of {teacher}'s score on {name} ({after} of {whole})"
    elif top1 is not None:
        share = _amount(top1, "share")
        sentence = (
            f"{student} finds the same next token most likely as {teacher} in {share} of rows"
        )
    elif bits is not None and bits.after is not None:
        sentence = f"{student} predicts held-out text with {_amount(bits.after)} bits a byte"
    if size := _ratio(report.teacher.parameters, report.student.parameters):
        amounts = [_amount(model.parameters) for model in (report.student, report.teacher)]
        change = _times(size, "fewer", "more", "as many")
        sentence += f", with {change} parameters ({amounts[0]}; the teacher {amounts[1]})"
    clauses: list[str] = []
    if speedup := report.speed.speedup:
        clauses.append(f"writes {_times(speedup, 'faster', 'slower', 'as fast')}")
    if (saved := report.cost.reduction) is not None:
        clauses.append(f"costs {abs(saved):.0%} {'less' if saved >= 0 else 'more'} a token")
    if clauses:
        sentence += f"; it {' and '.join(clauses)}"
    return f"{sentence}."


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _times(ratio: float, more: str, less: str, same: str) -> str:
    """`3.1 times fewer` where the ratio is above 1, its inverse with the other word below."""
    times = f"{max(ratio, 1 / ratio):.2g}"
    return same if times == "1" else f"{times} times {more if ratio > 1 else less}"


def _differ(figures: EvalFigures, left: str, right: str) -> int | None:
    """1 where `left` is better beyond both intervals, -1 where `right` is, 0 where they overlap.

    None where a figure or an interval is missing. Intervals that overlap a little may still
    differ in a paired test, so 0 says only what these figures can show.
    """
    ends = figures.interval(left), figures.interval(right)
    if getattr(figures, left) is None or getattr(figures, right) is None or None in ends:
        return None
    (low, high), (other_low, other_high) = (end for end in ends if end is not None)
    above = (low > other_high) - (high < other_low)
    return above if figures.better == "higher" else -above


def _control_verdicts(report: Report) -> list[str]:
    """What the teacher added over the same training on labels alone, one line a score."""
    lines: list[str] = []
    for name, figures in _figures(report).items():
        if figures.control is None or figures.after is None:
            continue
        control, after = (_amount(v, figures.unit) for v in (figures.control, figures.after))
        better = figures.after > figures.control
        if figures.better == "lower":
            better = figures.after < figures.control
        found = _differ(figures, "after", "control")
        verdict = {
            1: f"distilled {after} is **better** than labels only {control}",
            -1: f"distilled {after} is **worse** than labels only {control}: the teacher did harm",
            0: f"distilled {after} and labels only {control} are **not distinguishable at 95%**"
            + ("" if better else ", and the control is equal or better"),
            None: f"distilled {after}, labels only {control} (no interval to judge by)",
        }[found]
        lines.append(f"- {name}: {verdict}")
    head = "Did the teacher help? Against the same student, data and steps on hard labels alone:"
    return [head + "\n\n" + "\n".join(lines)] if lines else []


def _quality(report: Report) -> str:
    figures = _figures(report)
    if not figures:
        return (
            "Nothing was measured: the recipe has no `evals`, or none of them found anything to"
            " measure; the log says why."
        )
    head = ("", "teacher", "student before", "labels only", "student after", "kept", "n")
    rows: list[list[str]] = []
    for name, figure in figures.items():
        unit = "" if figure.unit == "share" else f", {figure.unit}"
        label = f"{name}{unit} ({figure.better} is better)".replace("|", "\\|")
        cells = [_ranged(getattr(figure, arm), figure.interval(arm), figure.unit) for arm in ARMS]
        kept = _amount(figure.retention, "share")
        rows.append([label, *cells, kept, DASH if figure.n is None else f"{figure.n:,}"])
    note = "In brackets: 95% confidence intervals. Kept: student after / teacher."
    if "perplexity" in figures:
        note += " Perplexity compares models with one tokenizer only, bits per byte all."
    return _table(head, rows) + f"\n\n{note}"


def _price_of_use(report: Report) -> str:
    speed, cost = report.speed, report.cost
    teacher, student = report.teacher.parameters, report.student.parameters
    size = _ratio(teacher, student)
    saved = cost.reduction
    rows = [
        [
            "parameters",
            _amount(teacher),
            _amount(student),
            _times(size, "fewer", "more", "as many") if size else DASH,
        ],
        [
            "tokens per second",
            _amount(speed.teacher_tokens_per_second),
            _amount(speed.student_tokens_per_second),
            _times(speed.speedup, "faster", "slower", "as fast") if speed.speedup else DASH,
        ],
        [
            "USD per 1,000 tokens",
            _amount(cost.teacher_usd_per_1k_tokens),
            _amount(cost.student_usd_per_1k_tokens),
            DASH if saved is None else f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'}",
        ],
    ]
    return _table(("", "teacher", "student", "change"), rows)


def _training(report: Report) -> str:
    train = report.train
    memory = train.peak_memory_bytes
    rows = [
        ["steps", DASH if train.steps is None else f"{train.steps:,}"],
        ["tokens", _amount(train.tokens)],
        ["seconds", _amount(train.seconds)],
        ["tokens per second", _amount(train.tokens_per_second)],
        ["peak memory", DASH if memory is None else f"{memory / 2**30:.2f} GiB"],
        ["cost, USD", _amount(report.cost.training_usd)],
    ]
    if report.cost.servers_usd is not None:
        rows.append(["paid to servers so far, USD", _amount(report.cost.servers_usd)])
    return _table(("", "training"), rows)


def _warnings(report: Report) -> list[str]:
    """What a reader should know before trusting the figures."""
    train = report.train
    lines = list(train.warnings)
    if train.skipped_steps:
        lines.append(f"{train.skipped_steps:,} steps were skipped: loss or gradient not finite.")
    if train.truncated_tokens:
        lines.append(f"{train.truncated_tokens:,} tokens were cut off: raise `max_length`.")
    if train.dropped_samples:
        lines.append(f"{train.dropped_samples:,} samples were dropped: nothing in them to learn.")
    if train.unaligned_samples:
        lines.append(
            f"{train.unaligned_samples:,} samples could not be aligned with a teacher of another"
            " tokenizer; the log names the first."
        )
    for name, figures in _figures(report).items():
        if _differ(figures, "before", "after") == 1:
            lines.append(f"{name} is worse after training than before.")
    return lines
