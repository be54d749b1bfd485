"""What is known of generated rows: `card.json` for programs, `README.md` for people and the hub."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from limbeck.ledger.money import dollars
from limbeck.synth.rows import Row

FORMAT = 1


MARKS = ("step", "teacher", "question", "index", "finish", "part", "prompt_tokens", "usd")
"""Fields of an entry of `source` by which two entries are about the same reply."""

QUOTED = re.compile(r"""(?<!\w)(?<!ended by )(?<!ended with )(['"]).*?\1(?!\w)""")
"""What a failure quotes, such as an id; how a reply ended is one of a few words, and a reason."""


@dataclass
class Tally:
    """Counts of rows as they come out of the steps.

    Several rows may come of one reply, which was written and paid once.
    """

    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter[str])
    tokens: int = 0
    models: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    columns: Counter[str] = field(default_factory=Counter[str])
    servers: Collection[str] = ()
    usd: float | None = 0.0
    _paid: set[int] = field(default_factory=set[int], init=False, repr=False)
    _fit: set[int] = field(default_factory=set[int], init=False, repr=False)

    def add(self, row: Row, columns: Mapping[str, Any]) -> None:
        """Count one row."""
        marks = [hash(tuple(map(entry.get, MARKS))) for entry in row.source]
        for mark, entry in zip(marks, row.source, strict=True):
            if entry["teacher"] in self.servers and entry["finish"] and mark not in self._paid:
                self._paid.add(mark)
                self.usd = plus(self.usd, entry["usd"])
        if row.failure is not None:
            self.failures[kind_of(row.failure)] += 1
            return
        self.rows += 1
        self.columns.update(columns.keys())
        for mark, entry in zip(marks, row.source, strict=True):
            if mark not in self._fit:
                self._fit.add(mark)
                self.tokens += int(entry.get("completion_tokens") or 0)
                seen = self.models.setdefault(str(entry["teacher"]), Counter())
                seen[str(entry.get("model") or "unknown")] += 1


def plus(usd: float | None, more: float | None) -> float | None:
    """The sum of two costs; None where one is not known."""
    return None if usd is None or more is None else usd + more


def kind_of(failure: str) -> str:
    """A failure without what differs from row to row: its numbers, and the names that it quotes.

    >>> kind_of("only 0.25 of it is the teacher's own")
    "only … of it is the teacher's own"
    >>> kind_of("the connection failed (6 attempts)")
    'the connection failed'
    >>> kind_of("repeats 'what-is-gravity'")
    'repeats …'
    """
    plain = re.sub(r"\s*\([^()]*\d[^()]*\)", "", QUOTED.sub("…", failure))
    words = ["…" if any(c.isdigit() for c in word) else word for word in plain.split()]
    return " ".join(words)[:80]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Figures of a folder of generated rows.

    Attributes:
        fingerprint: of everything that decides the rows.
        data: SHA-256 of the files that they were made from; None where those are not on this
            machine's disk.
        rows: fit to train on.
        failed: rows that are not, by reason.
        counts: what the steps counted.
        figures: what they measured, such as means.
        tokens: of the replies that have a part in the rows that are fit, each counted once.
        teachers: by name: where it is asked, terms of use, how many replies each version gave
            that have a part in the rows that are fit.
        usd: what the replies cost that have a part in the rows, failed ones too, and what servers
            read; None where a price is not known. What was asked in vain, the ledger knows; and
            that equal questions of several rows were paid for once.
        seconds: that making them took this time.
    """

    fingerprint: str
    data: str | None
    rows: int
    failed: Mapping[str, int]
    counts: Mapping[str, int]
    figures: Mapping[str, float]
    tokens: int
    teachers: Mapping[str, Mapping[str, Any]]
    columns: Sequence[str]
    usd: float | None
    seconds: float
    recipe: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fields of `card.json`."""
        return {"format": FORMAT, **{k: getattr(self, k) for k in self.__dataclass_fields__}}

    def render(self) -> str:
        """A few lines for the screen."""
        lines = [f"{self.rows:,} rows, {sum(self.failed.values()):,} failed"]
        lines += [f"  {count:,} {reason}" for reason, count in self.failed.items()]
        told = {**self.counts, **self.figures}
        lines += [f"{name}: {value:,}" for name, value in told.items()]
        lines += [f"{self.tokens:,} tokens written; cost {dollars(self.usd)}"]
        return "\n".join(lines)

    def page(self) -> str:
        """The data's card in the hub's form."""
        terms = {name: str(facts["terms"]) for name, facts in self.teachers.items()}
        front = {
            "license": "other",
            "license_name": "see-below",
            "tags": ["synthetic", "limbeck"],
            "configs": [{"config_name": "default", "data_files": "rows.jsonl"}],
        }
        lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
        lines += ["# Generated rows", "", self.render().replace("\n", "  \n"), ""]
        lines += ["| teacher | asked at | versions that answered | terms of use |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, facts in self.teachers.items():
            seen = ", ".join(f"{v} ({c:,})" for v, c in facts["versions"].items()) or "none"
            lines.append(f"| {name} | {facts['at']} | {seen} | {terms[name]} |")
        if any(text == "unknown" for text in terms.values()):
            lines += ["", "Under which terms a teacher's answers may be used is not said here:"]
            lines += ["look them up before training on them or giving them away."]
        lines += ["", "Each row says in `source` which teacher, version, question and setting it"]
        lines += ["came from, and at what cost. Columns: " + ", ".join(self.columns) + ".", ""]
        lines += ["```python", "import datasets", 'datasets.load_dataset("FOLDER")', "```", ""]
        lines += ["Made by:", "", "```yaml"]
        lines += [yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True).strip()]
        return "\n".join([*lines, "```", ""])
