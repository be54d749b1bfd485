"""`limbeck generate`: a recipe's steps over its first rows, once, into a folder.

All that a teacher says is recorded, so a run that was stopped is simply started again: it asks for
what is missing and arrives at the same rows.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.core.errors import DataError, Interrupted, RecipeError
from limbeck.core.exchange import Question, Reply
from limbeck.core.files import held, write_json, write_text
from limbeck.core.specs import ServerTeacher, TokenPrice
from limbeck.core.types import Sampling
from limbeck.ledger.money import dollars, prompt_tokens_upper, worst_case_usd
from limbeck.recipe.card import Card, Tally
from limbeck.recipe.desk import STUDENT, Teachers
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import Generation, describe, resolve_generation
from limbeck.sources.files import content_sha256
from limbeck.sources.generated import CARD, FAILED, PAGE, ROWS, Generated
from limbeck.synth.rows import UNREADABLE, Row, row_of, to_json
from limbeck.synth.step import Desk, asks_of, files_of, reads_of, through
from limbeck.teachers.probe import remembered
from limbeck.teachers.wire import written_out

log = logging.getLogger(__name__)
SHOWN_PROMPTS = 3


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
        "of": {name: value for name, value in describe(source.of).items() if name not in idle},
        "data": data,
        "steps": [describe(step) for step in source.steps],
        "files": sorted(hashlib.sha256(_content(file)).hexdigest() for file in files),
        "teachers": {name: _identity(job, name) for name in sorted(named)},
        "seed": job.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _data(source: Generated, card: Mapping[str, Any]) -> str | None:
    """Hash of the files that the rows begin with, or what the card says where they are gone."""
    of = source.of
    path = of.folder / ROWS if isinstance(of, Generated) else getattr(of, "path", None)
    found = None if path is None else content_sha256(str(path))
    return found or card.get("data")


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
        _write(folder, rows, tally)
        card = Card(
            fingerprint=mark,
            data=data,
            rows=tally.rows,
            failed=dict(tally.failures.most_common()),
            counts={**desk.counts, **desk.figures},
            tokens=tally.tokens,
            teachers=_facts(job, source, tally),
            columns=sorted(tally.columns),
            usd=tally.usd,
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


def _first_rows(source: Generated, seed: int) -> Iterator[Row]:
    """The rows of `of`, all once and in their order."""
    of = source.of
    if hasattr(of, "holdout"):  # nobody is evaluated on them: it is the rows made that are held out
        of = replace(of, holdout=0)
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


def _write(folder: Path, rows: Iterable[Row], tally: Tally) -> None:
    """Rows and failures as they come, aside; they get their names when all are there."""
    failed: list[str] = []
    aside = folder / f".{ROWS}.tmp"
    with aside.open("w", encoding="utf-8") as good:
        for row in rows:
            if row.failure is None and not row.readable:
                row = row.failed(UNREADABLE)
            values = to_json(row)
            tally.add(row, values)
            # In ASCII: UTF-8 cannot write half a character.
            line = json.dumps(values, allow_nan=False) + "\n"
            if row.failure is None:
                good.write(line)
            else:
                failed.append(line)
    # When a failure comes out depends on how far a writer has read ahead.
    write_text(folder / FAILED, "".join(sorted(failed)))
    aside.replace(folder / ROWS)
    _parquet(folder)


def _parquet(folder: Path) -> None:
    """The same rows for those who like columns; nothing where there is no row."""
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    if (folder / ROWS).stat().st_size:
        try:
            table = pyarrow.json.read_json(folder / ROWS)
        except pyarrow.ArrowInvalid:  # a column of several types has no place in a table
            return
        pyarrow.parquet.write_table(table, folder / "rows.parquet")


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


@dataclass
class Asked:
    """What a dry run saw: the first prompts, and bounds of tokens."""

    teacher: str
    sampling: Sampling
    n: int
    questions: int = 0
    prompt_tokens: int = 0
    worst_usd: float | None = 0.0
    first: tuple[Question, ...] = ()


class DryWriter:
    """Counts what it would be asked, and answers nothing.

    Args:
        name: of the teacher.
        spec: its specification; one that is no server costs nothing.
        seen: where what is asked is noted.
    """

    def __init__(self, name: str, spec: Any, seen: list[Asked]) -> None:
        self.name, self.seen = name, seen
        self.price, self.extra, self.together = TokenPrice(input=0.0, output=0.0), (), True
        if isinstance(spec, ServerTeacher):
            known = remembered(spec)
            self.price, self.extra = spec.price, written_out(spec.extra)
            self.together = known is not None and known.n

    def answers(
        self, questions: Iterable[Question], sampling: Sampling, n: int = 1
    ) -> Iterator[Sequence[Reply]]:
        """n failures for each question."""
        asked = Asked(self.name, sampling, n)
        self.seen.append(asked)
        requests, answers = (1, n) if self.together else (n, 1)
        for question in questions:
            asked.questions += 1
            texts = [turn.text for turn in question.prompt]
            tokens = prompt_tokens_upper([*texts, question.prefix, *self.extra])
            asked.prompt_tokens += requests * tokens
            worst = worst_case_usd(self.price, tokens, sampling.max_tokens, answers)
            known = asked.worst_usd is not None and worst is not None
            more = requests * (worst or 0.0)
            asked.worst_usd = (asked.worst_usd or 0.0) + more if known else None
            if len(asked.first) < SHOWN_PROMPTS:
                asked.first += (question,)
            yield [Reply(question=question.id, index=k, failure="dry run") for k in range(n)]


def dry_run(document: Document) -> str:
    """The first prompts as they would be sent, and the most that asking all could cost.

    Nothing is sent and nothing is written. What a later step asks depends on answers, so only the
    first that asks is shown.
    """
    job = resolve_generation(document)
    lines: list[str] = []
    for source in generated_in(job.source):
        seen: list[Asked] = []

        def writer(name: str, seen: list[Asked] = seen) -> DryWriter:
            return DryWriter(name, job.teachers.get(name), seen)

        with ExitStack() as stack:
            teachers = Teachers(job.teachers, job.student, source.folder, job.seed, stack)
            desk = Desk(seed=job.seed, writer=writer, reader=teachers.reader, folder=home(job))
            if isinstance(source.of, Generated):
                lines.append(f"{source.path}: begins with rows that {source.of.path} is to have")
                continue
            for _ in through(source.steps, _first_rows(source, job.seed), desk):
                pass
        lines += _told(source, [asked for asked in seen if asked.questions])
    return "\n".join(lines)


def _told(source: Generated, seen: Sequence[Asked]) -> list[str]:
    lines = [f"{source.path}:"]
    for asked in seen[:1]:
        for question in asked.first:
            lines.append(f"--- {asked.teacher}, {question.id}")
            lines += [f"[{turn.role or 'text'}] {turn.text}" for turn in question.prompt]
        sampling = asked.sampling
        lines += [
            "---",
            f"{asked.questions:,} questions, {asked.n} answers each, temperature"
            f" {sampling.temperature:g}, at most {sampling.max_tokens:,} tokens an answer",
            f"at most {asked.prompt_tokens:,} prompt tokens and"
            f" {asked.questions * asked.n * sampling.max_tokens:,} answer tokens: at most"
            f" {dollars(asked.worst_usd)}",
        ]
    later = [step.kind for step in source.steps if asks_of(step)][1:]
    if later:
        lines.append(f"further steps that ask: {', '.join(later)}; what depends on the answers")
    if not seen:
        lines.append("no step asks a teacher")
    return lines
