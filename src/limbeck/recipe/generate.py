"""`limbeck generate`: a recipe's steps over its first rows, once, into a folder.

All that a teacher says is recorded, so a run that was stopped is simply started again: it asks for
what is missing and arrives at the same rows.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.core.errors import DataError, Interrupted, RecipeError
from limbeck.core.files import held, write_json, write_text
from limbeck.core.specs import ServerTeacher
from limbeck.recipe.card import Card, Tally, plus
from limbeck.recipe.desk import STUDENT, Teachers
from limbeck.recipe.document import Document
from limbeck.recipe.dry import rehearsed
from limbeck.recipe.output import write_rows
from limbeck.recipe.resolve import Generation, describe, resolve_generation
from limbeck.sources.files import content_sha256
from limbeck.sources.generated import CARD, PAGE, ROWS, Generated
from limbeck.synth.rows import Row, row_of
from limbeck.synth.step import Desk, asks_of, files_of, reads_of, through

log = logging.getLogger(__name__)


def generate(document: Document) -> list[Card]:
    """Make the rows of every `generated` source of a recipe that are not there yet.

    Raises:
        RecipeError: a step or a teacher cannot work as it is written.
        LimbeckError: a teacher could not be asked, or the budget is spent.
        Interrupted: Ctrl-C; requests that were under way were waited for and recorded.
    """
    made: list[Card] = []
    job = resolve_generation(document)
    for source in generated_in(job.source):
        try:
            made.append(_make(job, source))
        except RecipeError as error:
            raise document.error(error.field, error.reason) from None
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped before {source.path} was whole; give the same command again: what"
                " teachers have said is recorded and is not asked for again"
            ) from None
    return made


def generated_in(source: Any) -> list[Generated]:
    """The `generated` sources in a source, the innermost first: what others are made from."""
    inner = getattr(source, "of", None)
    parts = inner if isinstance(inner, tuple) else (inner,) if inner is not None else ()
    found = [one for part in parts for one in generated_in(part)]
    return [*found, source] if isinstance(source, Generated) else found


def fingerprint(job: Generation, source: Generated, data: str | None) -> str:
    """SHA-256 of all that decides the rows: where they begin, steps, templates, teachers, seed.

    `data` is the hash of the files they begin with; where those lie does not count.
    """
    named = {name for step in source.steps for name in (*asks_of(step), *reads_of(step))}
    files = sorted({home(job) / f for step in source.steps for f in files_of(step)})
    idle = ("holdout",) if data is None else ("holdout", "path")
    parts = {
        "of": _without(describe(source.of), idle),
        "data": data,
        "steps": [describe(step) for step in source.steps],
        "files": sorted(hashlib.sha256(_content(file)).hexdigest() for file in files),
        "teachers": {name: _identity(job, name) for name in sorted(named)},
        "seed": job.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without(source: Mapping[str, Any], idle: Sequence[str]) -> dict[str, Any]:
    """A source as a recipe writes it, without fields that do not count in it or in its parts."""
    kept = {name: value for name, value in source.items() if name not in idle}
    if isinstance(parts := kept.get("of"), list):
        kept["of"] = [_without(part, idle) for part in parts]
    return kept


def _data(source: Generated, card: Mapping[str, Any]) -> str | None:
    """Hash of the files that the rows begin with, or what the card says where they are gone."""
    return _content_of(source.of) or card.get("data")


def _content_of(of: Any) -> str | None:
    """Hash of the files of a source, or of all its parts; None where there are none."""
    if isinstance(parts := getattr(of, "of", None), tuple):
        found = [_content_of(part) for part in parts]
        named = [own or getattr(part, "path", None) for own, part in zip(found, parts, strict=True)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest() if any(found) else None
    path = of.folder / ROWS if isinstance(of, Generated) else getattr(of, "path", None)
    return None if path is None else content_sha256(str(path))


def home(job: Generation) -> Path:
    """Where a recipe's relative paths of templates start."""
    return Path(job.file).parent if job.file else Path()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RecipeError("source.steps", f"{file}: {error.strerror}") from None


def _identity(job: Generation, name: str) -> Any:
    """What of a teacher decides its words; not its price, say."""
    spec = job.student if name == STUDENT and name not in job.teachers else job.teachers.get(name)
    if isinstance(spec, ServerTeacher):
        return spec.identity
    return None if spec is None else describe(spec)


def check_generated(job: Generation) -> None:
    """That the rows of every `generated` source were made by this very recipe.

    Raises:
        DataError: they are absent, or were made by another one.
    """
    for source in generated_in(job.source):
        card = source.card()
        if card.get("fingerprint") != fingerprint(job, source, _data(source, card)):
            raise DataError(
                f"{source.path} holds rows that another recipe made (its steps, teachers, data or"
                " seed differ); give another `path`, or remove the folder and run: limbeck"
                " generate RECIPE"
            )


def _make(job: Generation, source: Generated) -> Card:
    """Run the steps and write the folder."""
    began = time.perf_counter()
    folder = source.folder
    known = source.card() if (folder / CARD).exists() else {}
    data = _data(source, known)
    mark = fingerprint(job, source, data)
    if known and known.get("fingerprint") != mark:
        raise DataError(
            f"{source.path} holds the rows of another recipe; give another `path`, or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    servers = [n for n, s in job.teachers.items() if isinstance(s, ServerTeacher)]
    tally = Tally(servers=servers)
    with ExitStack() as stack:
        if not stack.enter_context(held(folder)):
            raise DataError(
                f"{source.path} is being made by another process; wait for its end, or stop it"
            )
        teachers = Teachers(job.teachers, job.student, folder, job.seed, stack)
        desk = Desk(
            seed=job.seed,
            writer=teachers.writer,
            reader=teachers.reader,
            folder=home(job),
        )
        rows = through(source.steps, _first_rows(source, job.seed), desk)
        write_rows(folder, rows, tally)
        card = Card(
            fingerprint=mark,
            data=data,
            rows=tally.rows,
            failed=dict(tally.failures.most_common()),
            counts=dict(desk.counts),
            figures=desk.figures,
            tokens=tally.tokens,
            teachers=_facts(job, source, tally),
            columns=sorted(tally.columns),
            usd=plus(tally.usd, teachers.read_usd),
            seconds=round(time.perf_counter() - began, 3),
            recipe={
                "source": describe(source),
                "teachers": {n: _identity(job, n) for n in job.teachers},
                "seed": job.seed,
            },
        )
        write_text(folder / PAGE, card.page())
        write_json(folder / CARD, card.to_json())  # last: a folder with a card is whole
    return card


def _whole(source: Any) -> Any:
    """A source, or several, with nothing held out.

    Nobody is evaluated on what steps begin with: it is the rows made that are held out.
    """
    if hasattr(source, "holdout"):
        return replace(source, holdout=0)
    if isinstance(parts := getattr(source, "of", None), tuple):
        return replace(source, of=tuple(map(_whole, parts)))
    return source


def _first_rows(source: Generated, seed: int) -> Iterator[Row]:
    """The rows of `of`, all once and in their order."""
    of = _whole(source.of)
    samples = getattr(of.open(seed), "training", None)
    if samples is None:
        raise RecipeError("source.of", f"{of.kind} has no end, so steps cannot go over it")
    seen: set[str] = set()
    for sample in samples:
        row = row_of(sample)
        if row.id in seen:
            raise DataError(f"two rows have the id {row.id!r}; give each its own, or none")
        seen.add(row.id)
        yield row


def _facts(job: Generation, source: Generated, tally: Tally) -> dict[str, Any]:
    """Who was asked, under which terms, and which versions answered."""
    facts: dict[str, Any] = {}
    for name in dict.fromkeys(name for step in source.steps for name in asks_of(step)):
        spec = job.teachers.get(name, job.student)
        server = isinstance(spec, ServerTeacher)
        terms = getattr(spec, "terms", None) or ("unknown" if server else "those of the model")
        if terms == "unknown":
            log.warning(
                "teacher %s: no `terms`, so the card says that it is not known how its answers may"
                " be used",
                name,
            )
        at = spec.url if isinstance(spec, ServerTeacher) else "this machine"
        versions = dict(tally.models.get(name, {}))
        facts[name] = {"at": at, "terms": terms, "versions": versions}
    return facts


def dry_run(document: Document) -> str:
    """The first prompts as they would be sent, and the most that they could cost.

    Nothing is sent, no teacher reads, no model is loaded, and nothing is written. See
    `recipe.dry` for what is told of steps whose questions depend on answers.

    Raises:
        RecipeError: a step or a teacher cannot work as it is written.
    """
    job = resolve_generation(document)
    lines: list[str] = []
    for source in generated_in(job.source):
        unmade = [one.path for one in generated_in(source.of) if not (one.folder / CARD).exists()]
        if unmade:
            lines.append(f"{source.path}: begins with rows that {unmade[-1]} is to have")
            continue
        rows = _first_rows(source, job.seed)
        teachers = Teachers(job.teachers, job.student, source.folder, job.seed, ExitStack())
        try:
            told = rehearsed(
                source.steps, rows, seed=job.seed, folder=home(job), spec_of=teachers.spec
            )
        except RecipeError as error:
            raise document.error(error.field, error.reason) from None
        lines += [f"{source.path}:", *told]
    return "\n".join(lines)
