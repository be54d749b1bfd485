"""A sequence of tasks, learnt one after the other: what is kept of the earlier ones?

    average      mean_j A[K][j]
    forgetting   mean_{j < K} (max_{i < K} A[i][j] - A[K][j])
    transfer     mean_{j > 1} (A[j-1][j] - A[0][j])            to tasks that are yet to come

with A[i][j] the accuracy on task j after the i-th was learnt, and A[0] before any.

Source of the measures: Lopez-Paz and Ranzato, "Gradient Episodic Memory" (NeurIPS 2017), and
Chaudhry et al., "Riemannian Walk" (ECCV 2018).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from limbeck.campaigns.rounds import read_json
from limbeck.core.errors import DataError, RecipeError
from limbeck.core.files import write_json, write_picture, write_text
from limbeck.recipe.document import Document
from limbeck.recipe.report import Report
from limbeck.recipe.resolve import resolve, training_sha256
from limbeck.recipe.run import run
from limbeck.sources.files import content_sha256


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One task: rows to learn, and problems to test with (see `evals.task.Task`)."""

    name: str
    train: str
    test: str


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Accuracies of one arm.

    Attributes:
        tasks: names, in the order in which they were learnt.
        accuracy: a line for each state of the student, before any task and after each; in it a
            number for each task.
    """

    tasks: Sequence[str]
    accuracy: Sequence[Sequence[float]]

    @property
    def average(self) -> float:
        """Over all tasks, after the last."""
        return mean(self.accuracy[-1])

    @property
    def forgetting(self) -> float | None:
        """How far the earlier tasks are below their best; None with one task."""
        *before, last = self.accuracy
        earlier = range(len(self.tasks) - 1)
        if not earlier:
            return None
        return mean(max(line[j] for line in before[1:]) - last[j] for j in earlier)

    @property
    def transfer(self) -> float | None:
        """What the earlier tasks did for those to come; None with one task."""
        later = range(1, len(self.tasks))
        if not later:
            return None
        return mean(self.accuracy[j][j] - self.accuracy[0][j] for j in later)

    def to_json(self) -> dict[str, Any]:
        """The matrix and its measures."""
        return {
            "tasks": list(self.tasks),
            "accuracy": [list(line) for line in self.accuracy],
            "average": self.average,
            "forgetting": self.forgetting,
            "transfer": self.transfer,
        }


def continual(
    arms: Mapping[str, Document],
    stages: Sequence[Stage],
    out: Path,
    *,
    test: Mapping[str, Any] | None = None,
    replay: Mapping[str, float] | None = None,
) -> dict[str, Matrix]:
    """Let each arm learn all tasks in order; leaves `continual.json`, `.md` and `.png` in `out`.

    A run that was stopped is simply started again: tasks that are done are not learnt again.

    Args:
        arms: recipes by name. In each, data, evaluations and, behind the first task, the student
            are replaced; everything else is the arm's own.
        stages: the tasks.
        out: a folder; each arm's runs lie in `out/ARM/K-TASK`.
        test: more fields of the evaluation, such as `match`.
        replay: for some arms, the share of earlier tasks' rows in a later one.

    Raises:
        RecipeError: a recipe cannot work, or an arm's folder holds runs of another one.
        LimbeckError: a run failed.
    """
    if len({stage.name for stage in stages}) < len(stages):
        raise RecipeError("--task", "two tasks have one name")
    if out.exists() and not out.is_dir():
        raise RecipeError("--out", f"{out} is a file, not a folder")
    found: dict[str, Matrix] = {}
    for name, document in arms.items():
        lines: list[list[float]] = []
        student: Path | None = None
        share = (replay or {}).get(name, 0.0)
        _claim(out / name, _made_with(document, stages, share, test or {}))
        for place, stage in enumerate(stages):
            values = stage_values(document, stages, place, student, share, test or {})
            folder = out / name / f"{place + 1}-{stage.name}"
            report = _learnt(Document(values, document.lines, document.file), folder)
            if not lines:
                lines.append(_scores(report, stages, "before", folder))
            lines.append(_scores(report, stages, "after", folder))
            student = folder / "student"
        found[name] = Matrix(tasks=[stage.name for stage in stages], accuracy=lines)
    write_json(out / "continual.json", {name: matrix.to_json() for name, matrix in found.items()})
    picture = draw(found, out / "continual.png")
    write_text(out / "continual.md", page(found) + f"\n![accuracies]({picture.name})\n")
    return found


def stage_values(
    document: Document,
    stages: Sequence[Stage],
    place: int,
    student: Path | None,
    share: float,
    test: Mapping[str, Any],
) -> dict[str, Any]:
    """The recipe's values for one task.

    Args:
        document: the arm's recipe.
        stages: all tasks.
        place: which of them, from 0.
        student: what the task before left; None for the first.
        share: of earlier tasks' rows among this one's.
        test: more fields of the evaluation.
    """
    values: dict[str, Any] = dict(document.values)
    if student is not None:
        kept = {k: v for k, v in values["student"].items() if k not in ("from", "layers", "config")}
        values["student"] = {**kept, "name": str(student)}
    paths = [stage.train for stage in stages[: place + 1]]
    values["source"] = _with_data(values["source"], paths[-1], paths[:-1], share)
    values["evals"] = [
        {"kind": "task", **test, "name": stage.name, "path": stage.test} for stage in stages
    ]
    return values


def _with_data(source: Any, path: str, earlier: Sequence[str], share: float) -> dict[str, Any]:
    """The source with this task's rows in the place of its own."""
    if isinstance(source, dict) and isinstance(source.get("of"), dict):
        return {**source, "of": _with_data(source["of"], path, earlier, share)}
    own = dict(source) if isinstance(source, dict) else {}
    new = {**own, "path": path}
    if not earlier or not share:
        return new
    old = [{**own, "path": other} for other in earlier]
    shares = [1 - share, *(share / len(old) for _ in old)]
    return {"kind": "mixture", "of": [new, *old], "shares": shares}


def _made_with(
    document: Document, stages: Sequence[Stage], share: float, test: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides an arm's figures, as JSON values: of files it is the content that counts."""
    nowhere = Stage(name="", train="", test="")
    values = {**stage_values(document, [nowhere], 0, None, 0.0, {}), "evals": []}
    made_with = {
        "recipe": training_sha256(resolve(Document(values, document.lines, document.file))),
        "replay": share,
        "test": dict(test),
        "tasks": [
            [stage.name, *(content_sha256(path) or path for path in (stage.train, stage.test))]
            for stage in stages
        ],
    }
    return json.loads(json.dumps(made_with))


def _claim(folder: Path, made_with: Mapping[str, Any]) -> None:
    """Note what an arm's runs are made with, before the first; see that it is the same later.

    Several processes of one campaign may do this at once.

    Raises:
        RecipeError: the folder holds something else.
    """
    told = folder / "campaign.json"
    strange = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if not told.exists():
        if strange:
            raise RecipeError(
                "--out", f"{folder} does not say what it was made with; give another folder"
            )
        write_json(told, made_with)
    elif read_json(told) != made_with:
        raise RecipeError(
            "--out",
            f"{folder} holds another recipe, --replay, --match, --max-tokens, or other tasks; give"
            " another folder",
        )


def _learnt(document: Document, folder: Path) -> Report:
    """The report of a run that is done, goes on, or begins."""
    if (folder / "report.json").exists():
        return Report.from_json(folder / "report.json")
    return run(resolve(document), folder, resume=(folder / "recipe.yaml").exists())


def _scores(report: Report, stages: Sequence[Stage], arm: str, folder: Path) -> list[float]:
    found = [getattr(report.evals.get(stage.name), arm, None) for stage in stages]
    if any(value is None for value in found):
        raise DataError(f"{folder}: the report has no accuracy {arm} of every task")
    return [float(value) for value in found if value is not None]


def page(found: Mapping[str, Matrix]) -> str:
    """A table of the arms, and each one's matrix."""
    lines = ["# One task after the other", ""]
    lines += ["| arm | average after all | forgetting | forward transfer |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, matrix in found.items():
        cells = (matrix.average, matrix.forgetting, matrix.transfer)
        lines.append(f"| {name} | " + " | ".join(_share(cell) for cell in cells) + " |")
    for name, matrix in found.items():
        lines += ["", f"## {name}", "", "| after | " + " | ".join(matrix.tasks) + " |"]
        lines += ["| --- " * (len(matrix.tasks) + 1) + "|"]
        for after, line in zip(("nothing", *matrix.tasks), matrix.accuracy, strict=True):
            lines.append(f"| {after} | " + " | ".join(_share(cell) for cell in line) + " |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def draw(found: Mapping[str, Matrix], path: Path) -> Path:
    """Each arm's matrix as a picture, side by side on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3 * len(found), 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (name, matrix) in zip(axes, found.items(), strict=True):
        axis.imshow(matrix.accuracy, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_title(name)
        axis.set_xticks(range(len(matrix.tasks)), matrix.tasks, rotation=30, ha="right")
        axis.set_yticks(range(len(matrix.tasks) + 1), ("before", *matrix.tasks))
        for i, line in enumerate(matrix.accuracy):
            for j, value in enumerate(line):
                colour = "black" if value > 0.6 else "white"
                axis.text(j, i, f"{value:.0%}", ha="center", va="center", color=colour)
    axes[0].set_ylabel("after")
    write_picture(path, figure)
    return path
