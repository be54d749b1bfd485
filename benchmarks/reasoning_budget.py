"""Is it worth choosing where to reason? Accuracy against tokens, between never and always.

    python benchmarks/reasoning_budget.py            # three seeds
    python benchmarks/reasoning_budget.py --quick    # few problems, nothing written

The embedded domain. A student learns direct answers and reasoning, each behind its tag (the rows
of `reasoning.py`); then it answers problems in both ways, greedily. On `FIT` problems that it was
not trained on a classifier learns from the question alone whether reasoning helps, that is, whether
the student is right only with it; the threshold is the best of a few on `CHOOSE` others, and all
figures are of `TEST` problems that had no part in either. Problems are of the kind trained on.

What is printed: the ends, the point at the threshold, the Brier score beside that of always saying
the mean, and whether the choice beats the chord and both ends. The whole curve and the reliability
table stand in `results/`.

This student is hardly ever right without reasoning, and reasoning helps it with short problems. So
what a choice can save here is the reasoning about problems that it gets wrong either way.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from comparison import REPOSITORY
from comparison_material import CPU, demo_model, once
from environment import environment, now
from reasoning import PROMPTS, QUICK_PROMPTS, QUICK_TESTS, TAGS, TESTS, TRAIN, demo
from table import markdown

import limbeck
from limbeck.core.exchange import Question
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.demo import Problem, problems
from limbeck.evals.matching import last_number
from limbeck.models.load import load_teacher
from limbeck.synth.budget import Curve, budget_curve
from limbeck.synth.complexity import brier_score, fit, reliability, text_features
from limbeck.teachers.local import LocalWriter

FIT, CHOOSE, TEST = 600, 300, 400
STEPS = 400
THRESHOLDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
RESULTS = Path(__file__).with_name("results") / "reasoning_budget.json"

Answers = tuple[list[bool], list[float]]


def main() -> None:
    """Every seed, then the table of all."""
    parser = argparse.ArgumentParser(description="Where reasoning is worth its tokens.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    folder = REPOSITORY / "runs" / "reasoning" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = (QUICK_PROMPTS, QUICK_TESTS) if arguments.quick else (PROMPTS, TESTS)
    rows = demo(folder, *sizes).rows.get("both kinds")
    if rows is None:
        raise SystemExit("the rows of both kinds could not be made; see above")
    counts = (60, 30, 40) if arguments.quick else (FIT, CHOOSE, TEST)
    steps = 2 if arguments.quick else STEPS
    found = [
        one_seed(seed, student(rows, seed, steps, folder), counts)
        for seed in range(1 if arguments.quick else arguments.seeds)
    ]
    values = {"environment": environment(), "date": now(), "seeds": found}
    print(table(values))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(values, indent=1) + "\n")
        plot(found, RESULTS.with_suffix(".png"))


def student(rows: str, seed: int, steps: int, folder: Path) -> Path:
    """One that was trained on both kinds of rows; made once."""
    recipe = {
        "student": {"name": str(demo_model("student")), "max_length": 256},
        "source": {"path": rows, "holdout": 0},
        "terms": [{"objective": "cross_entropy"}],
        "train": {**TRAIN, "steps": steps, "save_every": 100_000, "device": "cpu"},
        "seed": seed,
    }

    def make(aside: Path) -> None:
        run = aside.with_name(f"{aside.name}-run")
        shutil.rmtree(run, ignore_errors=True)
        limbeck.run(recipe, run)
        (run / "student").rename(aside)
        shutil.rmtree(run)

    return once(folder / f"both-{Path(rows).stem}-{steps}-{seed}", make)


def one_seed(seed: int, folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """All figures of one student."""
    writer = LocalWriter(load_teacher(LocalTeacher(name=str(folder)), CPU, 256))
    every = list(problems(5, "test", sum(counts)))
    edges = np.cumsum([0, *counts])
    parts = [every[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    direct, reasoned = (
        [answered(writer, part, tag) for part in parts]
        for tag in (TAGS["direct_tag"], TAGS["reason_tag"])
    )
    helps = [
        [b and not a for a, b in zip(d[0], r[0], strict=True)]
        for d, r in zip(direct, reasoned, strict=True)
    ]
    if sum(helps[0]) < 5 or sum(helps[0]) > len(helps[0]) - 5:
        return {"seed": seed, "nothing to choose": sum(helps[0]) / len(helps[0])}
    classifier = fit(text_features([p.prompt for p in parts[0]]), helps[0])
    p = [classifier.predict([one.prompt for one in part]) for part in parts]

    def curve(part: int, threshold: float, draws: int) -> Curve:
        sides = {"direct": direct[part], "reasoned": reasoned[part]}
        return budget_curve(p[part], **sides, threshold=threshold, draws=draws, seed=seed)

    # The one that is highest above a choice by lot of the same cost.
    threshold = max(THRESHOLDS, key=lambda one: curve(1, one, 2).above_chord)
    final = curve(2, threshold, 1000)
    share = sum(helps[2]) / len(helps[2])
    return {
        "seed": seed,
        "helps": share,
        "brier": brier_score(p[2], helps[2]),
        "brier_of_mean": share * (1 - share),
        "reliability": [asdict(one) for one in reliability(p[2], helps[2], 5)],
        "verdict": final.verdict,
        **{k: v for k, v in asdict(final).items() if k != "points"},
        "never": asdict(final.never),
        "always": asdict(final.always),
        "points": [[point.tokens, point.accuracy] for point in final.points],
    }


def answered(writer: LocalWriter, part: Sequence[Problem], tag: str) -> Answers:
    """Which problems are right behind a tag, and the tokens of each answer, the tag's too."""
    asked = [
        Question(id=str(i), prompt=(Turn(text=problem.prompt),), prefix=tag.strip())
        for i, problem in enumerate(part)
    ]
    replies = [one[0] for one in writer.answers(asked, Sampling(max_tokens=120))]
    right = [
        reply.whole and last_number(reply.text) == problem.answer
        for reply, problem in zip(replies, part, strict=True)
    ]
    return right, [float(1 + (reply.completion_tokens or 0)) for reply in replies]


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Each seed's curve from never to always, and the chord that a choice by lot moves along."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens an answer", ylabel="accuracy, %")
    for number, one in enumerate(one for one in found if "points" in one):
        tokens, right = zip(*one["points"], strict=True)
        (line,) = axes.plot(tokens, [100 * r for r in right], label=f"seed {one['seed']}")
        ends = [one[name] for name in ("never", "always")]
        axes.plot(
            [end["tokens"] for end in ends],
            [100 * end["accuracy"] for end in ends],
            color=line.get_color(),
            linestyle=":",
            label="by lot" if number == 0 else None,
        )
        chosen = one["chosen"]
        axes.plot(chosen["tokens"], 100 * chosen["accuracy"], "o", color=line.get_color())
    axes.set_title("Reasoning where a classifier of the question says that it helps")
    axes.legend()
    figure.savefig(path, dpi=150)


def table(results: dict[str, Any]) -> str:
    """A line for each seed, and what may be said."""
    found: Sequence[dict[str, Any]] = results["seeds"]

    def interval(one: dict[str, Any], name: str) -> str:
        low, high = one[f"{name}95"]
        return f"{one[name]:+.3f} ({low:+.3f} to {high:+.3f})"

    def point(one: dict[str, Any]) -> str:
        return f"{one['accuracy']:.1%}, {one['tokens']:.1f}"

    good = [one for one in found if "verdict" in one]
    header = ["seed", "never", "always", "chosen", "above the chord", "above both ends", "area"]
    lines = [
        [
            str(one["seed"]),
            *(point(one[name]) for name in ("never", "always", "chosen")),
            *(interval(one, name) for name in ("above_chord", "above_ends", "area")),
        ]
        for one in good
    ]
    said = [
        f"seed {one['seed']}: {one['verdict']} Brier score {one['brier']:.3f}, of the mean"
        f" {one['brier_of_mean']:.3f}; reasoning helps {one['helps']:.0%}."
        for one in good
    ]
    said += [
        f"seed {one['seed']}: reasoning helps {one['nothing to choose']:.0%} of the problems that"
        " the classifier would learn from, so there is nothing to choose."
        for one in found
        if "verdict" not in one
    ]
    return "Accuracy and tokens an answer:\n\n" + "\n\n".join([markdown(header, lines), *said])


if __name__ == "__main__":
    main()
