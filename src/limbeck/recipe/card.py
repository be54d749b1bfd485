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


@dataclass
class Tally:
    """Counts of rows as they come out of the steps."""

    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter[str])
    tokens: int = 0
    models: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    columns: Counter[str] = field(default_factory=Counter[str])
    servers: Collection[str] = ()
    costs: dict[tuple[str, ...], float | None] = field(default_factory=dict[Any, Any])

    @property
    def usd(self) -> float | None:
        """What the replies cost that have a part in the rows; None where a price is not known."""
        known = [cost for cost in self.costs.values() if cost is not None]
        return sum(known) if len(known) == len(self.costs) else None

    def add(self, row: Row, columns: Mapping[str, Any]) -> None:
        """Count one row."""
        for entry in row.source:
            answered = entry["teacher"] in self.servers and entry["finish"]
            if answered:  # several rows may come of one reply, which was paid once
                marks = ("step", "teacher", "question", "index", "finish")
                self.costs[tuple(str(entry[mark]) for mark in marks)] = entry["usd"]
        if row.failure is not None:
            self.failures[kind_of(row.failure)] += 1
            return
        self.rows += 1
        self.columns.update(columns.keys())
        for entry in row.source:
            self.tokens += int(entry.get("completion_tokens") or 0)
            seen = self.models.setdefault(str(entry["teacher"]), Counter())
            seen[str(entry.get("model") or "unknown")] += 1


def kind_of(failure: str) -> str:
    """A failure without what differs from row to row: its numbers.

    >>> kind_of("only 0.25 of it is the teacher's own")
    "only … of it is the teacher's own"
    >>> kind_of("the connection failed (6 attempts)")
    'the connection failed'
    """
    plain = re.sub(r"\s*\([^()]*\d[^()]*\)", "", failure)
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
        tokens: that teachers wrote for the rows that are fit.
        teachers: by name: specification (never a key), terms of use, versions that answered.
        usd: what the replies cost that have a part in the rows, failed ones too; None where a
            price is not known. What was asked in vain, the ledger knows.
        seconds: that making them took this time.
    """

    fingerprint: str
    data: str | None
    rows: int
    failed: Mapping[str, int]
    counts: Mapping[str, float]
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
        lines += [f"{name}: {value:,}" for name, value in self.counts.items()]
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
