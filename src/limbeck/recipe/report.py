"""What a run found: kept as `report.json` for programs and `report.md` for people.

Every figure is one that was measured; what was not is None here, null in JSON and a dash on the
page.
"""

import contextlib
import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from limbeck.core.errors import DataError
from limbeck.core.files import write_json, write_text
from limbeck.evals.score import Better, Interval, Score, finite, finite_interval

if TYPE_CHECKING:  # a report can be read without what trains
    from limbeck.recipe.schema import Recipe
    from limbeck.train.loop import State
    from limbeck.train.prepare import Preparation

ARMS = ("teacher", "before", "control", "after")
"""The teacher; the student before training; trained on labels alone; and distilled."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model's name and its number of parameters."""

    name: str | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class AgreementFigures:
    """How one arm of the student agrees with the teacher on n held-out rows.

    `kl_nats` is the mean KL(teacher || student) of a row, `top1` the share of rows with the same
    most likely token; `intervals` holds a 95% interval for each.
    """

    kl_nats: float | None = None
    top1: float | None = None
    n: int | None = None
    intervals: Mapping[str, Interval | None] = field(default_factory=dict[str, Interval | None])

    @classmethod
    def of(cls, scores: Mapping[str, Score]) -> "AgreementFigures":
        """Of a suite's scores; what is absent there is None here."""
        found = {name: scores[name] for name in ("kl_nats", "top1") if name in scores}
        return cls(
            **{name: finite(score.value) for name, score in found.items()},
            n=next((score.n for score in found.values()), None),
            intervals={name: finite_interval(score.interval95) for name, score in found.items()},
        )


@dataclass(frozen=True, kw_only=True)
class AgreementArms:
    """Agreement before and after training; `control` is None where there was no such arm."""

    before: AgreementFigures = AgreementFigures()
    after: AgreementFigures = AgreementFigures()
    control: AgreementFigures | None = None


@dataclass(frozen=True, kw_only=True)
class EvalFigures:
    """One score of all arms.

    Attributes:
        retention: after / teacher, for scores where higher is better.
        n: units it is over, for the distilled student.
        interval95: of `after`; those of the other arms are in `intervals`.
    """

    teacher: float | None = None
    before: float | None = None
    after: float | None = None
    control: float | None = None
    retention: float | None = None
    n: int | None = None
    interval95: Interval | None = None
    intervals: Mapping[str, Interval | None] = field(default_factory=dict[str, Interval | None])
    better: Better = "higher"
    unit: str = "share"

    @classmethod
    def of(cls, arms: Mapping[str, Score]) -> "EvalFigures":
        """Of one score, by arm (see `ARMS`)."""
        some = arms["after"] if "after" in arms else next(iter(arms.values()))
        values = {arm: finite(score.value) for arm, score in arms.items()}
        teacher, after = values.get("teacher"), values.get("after")
        retention = None
        if some.better == "higher" and teacher and after is not None:
            retention = after / teacher
        ends = {arm: finite_interval(arms[arm].interval95) for arm in ARMS if arm in arms}
        interval95 = ends.pop("after", None)
        return cls(
            **values,
            retention=retention,
            n=some.n if "after" in arms else None,
            interval95=interval95,
            intervals=ends,
            better=some.better,
            unit=some.unit,
        )

    def interval(self, arm: str) -> Interval | None:
        """The 95% interval of one arm."""
        return self.interval95 if arm == "after" else self.intervals.get(arm)


@dataclass(frozen=True, kw_only=True)
class Arms:
    """What `run_suite` found for each arm; `control` is None where there was no such arm."""

    teacher: Mapping[str, Score] = field(default_factory=dict[str, Score])
    before: Mapping[str, Score] = field(default_factory=dict[str, Score])
    after: Mapping[str, Score] = field(default_factory=dict[str, Score])
    control: Mapping[str, Score] | None = None

    def agreement(self) -> AgreementArms:
        """The report's `agreement`."""
        return AgreementArms(
            before=AgreementFigures.of(self.before),
            after=AgreementFigures.of(self.after),
            control=None if self.control is None else AgreementFigures.of(self.control),
        )

    def evals(self) -> dict[str, EvalFigures]:
        """The report's `evals`: all scores but those of the agreement."""
        suites: dict[str, Mapping[str, Score]] = {a: getattr(self, a) or {} for a in ARMS}
        names = {name: None for suite in suites.values() for name in suite}
        return {
            name: EvalFigures.of({arm: suites[arm][name] for arm in ARMS if name in suites[arm]})
            for name in names
            if name not in ("kl_nats", "top1")
        }


@dataclass(frozen=True, kw_only=True)
class TrainFigures:
    """What training took: tokens without padding, wall-clock seconds, peak memory of a device.

    `padding_share` is the share of the positions that the student computed which held no token.
    `skipped_steps` had a non-finite loss or gradient; `truncated_tokens` did not fit the longest
    length; `dropped_samples` had nothing left to learn; `unaligned_samples` could not be compared
    with a teacher of another tokenizer, counted once for each term. `warnings` say what taught
    nothing.
    """

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    padding_share: float | None = None
    peak_memory_bytes: int | None = None
    skipped_steps: int | None = None
    truncated_tokens: int | None = None
    dropped_samples: int | None = None
    unaligned_samples: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens written a second; `speedup` is student / teacher."""

    teacher_tokens_per_second: float | None = None
    student_tokens_per_second: float | None = None
    speedup: float | None = None

    @classmethod
    def of(cls, teacher: float | None, student: float | None) -> "Speed":
        """From both rates; None where one was not measured."""
        return cls(
            teacher_tokens_per_second=teacher,
            student_tokens_per_second=student,
            speedup=student / teacher if teacher and student else None,
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """US dollars for 1,000 written tokens, for the training, and for servers.

    `reduction` is the share saved, 1 - student / teacher; it is negative where the student costs
    more. `servers_usd` is what the accounts of the servers that taught have spent so far, earlier
    runs with the same ledger included; None where no server taught or a price is not known.
    """

    teacher_usd_per_1k_tokens: float | None = None
    student_usd_per_1k_tokens: float | None = None
    reduction: float | None = None
    training_usd: float | None = None
    servers_usd: float | None = None

    @classmethod
    def of(
        cls,
        speed: Speed,
        *,
        teacher_usd_per_hour: float | None,
        student_usd_per_hour: float | None,
        training_seconds: float | None = None,
        devices: int = 1,
        servers_usd: float | None = None,
    ) -> "Cost":
        """usd per 1k tokens = usd per hour / 3600 / tokens per second * 1000.

        Training holds both models, so it is charged at the dearer device, times `devices`; where
        one of the prices is not known, neither is that cost.
        """

        def per_1k(usd_per_hour: float | None, rate: float | None) -> float | None:
            return usd_per_hour / 3600 / rate * 1000 if usd_per_hour and rate else None

        teacher = per_1k(teacher_usd_per_hour, speed.teacher_tokens_per_second)
        student = per_1k(student_usd_per_hour, speed.student_tokens_per_second)
        training = None
        if teacher_usd_per_hour and student_usd_per_hour and training_seconds is not None:
            price = max(teacher_usd_per_hour, student_usd_per_hour)
            training = price * devices * training_seconds / 3600
        return cls(
            teacher_usd_per_1k_tokens=teacher,
            student_usd_per_1k_tokens=student,
            reduction=1 - student / teacher if teacher and student is not None else None,
            training_usd=training,
            servers_usd=servers_usd,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished run's figures; the fields are those of `report.json`."""

    recipe_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    teacher: ModelFacts = ModelFacts()
    student: ModelFacts = ModelFacts()
    agreement: AgreementArms = AgreementArms()
    evals: Mapping[str, EvalFigures] = field(default_factory=dict[str, EvalFigures])
    train: TrainFigures = TrainFigures()
    speed: Speed = Speed()
    cost: Cost = Cost()

    def to_json(self) -> dict[str, Any]:
        """JSON values; figures that are not finite are None."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Report":
        """Read a `report.json`; keys that this version does not know are left out.

        Raises:
            DataError: the file is missing or is not a report.
        """
        try:
            return TypeAdapter(cls).validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise DataError(f"{path}: not a report of limbeck: {where}: {first['msg']}") from None

    def to_markdown(self, plots: Sequence[str] = ()) -> str:
        """The page; `plots` are paths of images relative to it."""
        from limbeck.recipe.page import markdown  # the page imports the report, not the reverse

        clean = TypeAdapter(type(self)).validate_python(self.to_json())  # no NaN on the page
        return markdown(clean, plots)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `report.json` and `report.md`; the page shows what lies in `folder/plots`.

        Each file is complete or not there: it is written under another name and renamed.
        """
        folder = Path(folder)
        plots = [path.relative_to(folder).as_posix() for path in (folder / "plots").glob("*.png")]
        write_json(folder / "report.json", self.to_json())
        write_text(folder / "report.md", self.to_markdown(sorted(plots)))


def make_report(
    recipe: "Recipe",
    *,
    recipe_sha256: str,
    teacher: Mapping[str, Any] | None,
    student: Mapping[str, Any],
    arms: Arms,
    state: "State",
    preparation: "Preparation",
    speeds: Mapping[str, float | None],
    peak_memory_bytes: int | None,
    devices: int = 1,
    servers_usd: float | None = None,
    warnings: tuple[str, ...] = (),
) -> Report:
    """Put a run's figures together.

    Args:
        recipe: for its prices.
        recipe_sha256: of the resolved recipe.
        teacher: `name` and `parameters` of the first teacher.
        student: `name` and `parameters`.
        arms: what the evaluations found.
        state: where training ended.
        preparation: counts what was cut off and dropped.
        speeds: tokens written a second by `teacher` and `student`.
        peak_memory_bytes: of one device.
        devices: that trained.
        servers_usd: what servers were paid.
        warnings: what of the training taught nothing.
    """
    speed = Speed.of(speeds.get("teacher"), speeds.get("student"))
    return Report(
        recipe_sha256=recipe_sha256,
        versions=versions(),
        teacher=ModelFacts(**(teacher or {})),
        student=ModelFacts(**student),
        agreement=arms.agreement(),
        evals=arms.evals(),
        train=TrainFigures(
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / state.seconds if state.seconds > 0 else None,
            padding_share=1 - state.tokens / state.positions if state.positions else None,
            peak_memory_bytes=peak_memory_bytes,
            skipped_steps=state.skipped,
            truncated_tokens=preparation.truncated_tokens,
            dropped_samples=preparation.dropped_samples,
            unaligned_samples=state.unaligned,
            warnings=warnings,
        ),
        speed=speed,
        cost=Cost.of(
            speed,
            teacher_usd_per_hour=recipe.price.teacher_usd_per_hour,
            student_usd_per_hour=recipe.price.student_usd_per_hour,
            training_seconds=state.seconds,
            devices=devices,
            servers_usd=servers_usd,
        ),
    )


def versions() -> dict[str, str]:
    """What the run was made with. Names no machine, user or folder."""
    found = {"python": platform.python_version()}
    for package in ("limbeck", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["platform"] = f"{platform.system()} {platform.machine()}".strip()
    return found


def _plain(value: Any) -> Any:
    """JSON values with null for NaN and infinity, and for an interval that has one as its end."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items if None not in items else None
    return finite(value) if isinstance(value, float) else value
