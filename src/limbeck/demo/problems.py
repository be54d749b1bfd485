"""Grade-school word problems with a rationale that a program can check.

A problem starts with a number of things, changes it in one to five steps (add, subtract, multiply,
divide, and perhaps a comparison at the end), and asks for the result. All numbers stay below 100.

Which split a question belongs to is decided by a hash of its text, so no test question can ever
be met in training, whatever the seeds.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limbeck.demo import phrasing
from limbeck.demo.phrasing import Phrasings

Split = Literal["train", "test", "phrasings", "chains"]
LARGEST = 99
TEST_SHARE = 10
"""One question in this many is kept for testing."""
EQUATION = re.compile(
    # Whole numbers only, and nothing that goes on before or after: not the `3 + 4 = 7` in
    # `-3 + 4 = 7`, `3 + 4 = 7.5` or `2 * 3 + 4 = 7 + 1`.
    r"(?<![-+*/.\d])(?<![-+*/=] )(\d+) ([-+*/]) (\d+) = (-?\d+)(?!\d|\.\d| [-+*/=])"
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, the steps to its answer, and the answer.

    `split` says where it may be used: `train`, `test` (same kind, other questions), `phrasings`
    (sentences never trained on) or `chains` (six or seven steps).
    """

    question: str
    rationale: str
    answer: int
    steps: int
    split: Split

    @property
    def prompt(self) -> str:
        """The question as a model is asked it; ends in a line break."""
        return self.question + "\n"

    @property
    def completion(self) -> str:
        """Rationale and answer, as a model should write them."""
        return f"{self.rationale} {phrasing.ANSWER.format(answer=self.answer)}"


def problems(seed: int, split: Split = "train", count: int | None = None) -> Iterator[Problem]:
    """Endless (or `count`) problems of a split; the same ones for the same seed.

    Args:
        seed: of the sequence.
        split: which kind; see `Problem`.
        count: how many, or None for endless.
    """
    draw = random.Random(f"limbeck/{split}/{seed}")
    made = 0
    while count is None or made < count:
        problem = _draw(draw, split)
        if problem is not None:
            made += 1
            yield problem


def verify(problem: Problem, text: str) -> bool:
    """Whether a text ends in the right answer: the last `The answer is N.` counts."""
    found = re.findall(r"The answer is (-?\d+)\.", text)
    return bool(found) and int(found[-1]) == problem.answer


def verify_rationale(text: str) -> bool:
    """Whether every `a op b = c` in a text is true, each starts from a result before, and the
    answer is the last result. Any `=` that is not part of such a step makes the text fail."""
    chain = EQUATION.findall(text)
    answer = re.findall(r"The answer is (\d+)\.", text)
    if not chain or len(chain) != text.count("=") or len(answer) != 1:
        return False
    previous = None
    for left, operation, right, result in chain:
        a, b, c = int(left), int(right), int(result)
        true = {
            "+": a + b == c,
            "-": a - b == c,
            "*": a * b == c,
            "/": b > 0 and b * c == a,
        }[operation]
        if not true or previous not in (None, a, b):
            return False
        previous = c
    return previous == int(answer[0])


def write_jsonl(path: Path, rows: Iterable[Problem]) -> int:
    """Write `{prompt, completion, answer, steps}` rows; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            fields = {"prompt": row.prompt, "completion": row.completion}
            file.write(json.dumps({**fields, "answer": str(row.answer), "steps": row.steps}) + "\n")
            count += 1
    return count


def _draw(draw: random.Random, split: Split) -> Problem | None:
    """One problem, or None where the draw belongs to another split."""
    steps = draw.randint(6, 7) if split == "chains" else draw.randint(1, 5)
    unseen = split == "phrasings"
    name, friend = draw.sample(phrasing.GIRLS + phrasing.BOYS, 2)
    girl = name in phrasing.GIRLS
    words = {
        "name": name,
        "friend": friend,
        "he": "she" if girl else "he",
        "him": "her" if girl else "him",
        "things": draw.choice(phrasing.THINGS),
    }
    value = draw.randint(3, 40)
    sentences = [_say(draw, phrasing.START, unseen, n=value, **words)]
    lines: list[str] = []
    compares = draw.random() < 0.2
    for _ in range(steps - compares):
        operation, k, result = _change(draw, value)
        kind = {
            "+": phrasing.ADD,
            "-": phrasing.SUBTRACT,
            "*": phrasing.MULTIPLY,
            "/": phrasing.DIVIDE,
        }[operation]
        holders = draw.choice(phrasing.HOLDERS)
        sentences.append(_say(draw, kind, unseen, k=k, holders=holders, **words))
        line = draw.choice(phrasing.STEP)
        lines.append(line.format(a=value, op=operation, b=k, c=result, **words))
        value = result
    ask = phrasing.ASK
    if compares:
        other = draw.choice([n for n in range(2, LARGEST) if n != value])
        sentences.append(_say(draw, phrasing.OTHER, unseen, k=other, **words))
        high, low = max(value, other), min(value, other)
        ask = phrasing.ASK_MORE if value > other else phrasing.ASK_FEWER
        lines.append(
            draw.choice(phrasing.COMPARE_STEP).format(a=high, b=low, c=high - low, **words)
        )
        value = high - low
    sentences.append(_say(draw, ask, unseen, **words))
    question = " ".join(sentences)
    if split in ("train", "test") and (split == "test") != is_test(question):
        return None
    rationale = " ".join(lines)
    return Problem(question=question, rationale=rationale, answer=value, steps=steps, split=split)


def is_test(question: str) -> bool:
    """Whether a question is kept from training; decided by its text alone."""
    return hashlib.sha256(question.encode()).digest()[0] % TEST_SHARE == 0


def _change(draw: random.Random, value: int) -> tuple[str, int, int]:
    """An operation that keeps the value a whole number from 1 to `LARGEST`."""
    options: list[tuple[str, int, int]] = []
    if value + 2 <= LARGEST:
        k = draw.randint(2, min(30, LARGEST - value))
        options.append(("+", k, value + k))
    if value >= 4:
        k = draw.randint(2, min(30, value - 1))
        options.append(("-", k, value - k))
    factors = [k for k in range(2, 6) if value * k <= LARGEST]
    if factors:
        k = draw.choice(factors)
        options.append(("*", k, value * k))
    divisors = [k for k in range(2, 7) if value % k == 0 and value > k]
    if divisors:
        k = draw.choice(divisors)
        options.append(("/", k, value // k))
    return draw.choice(options)


def _say(draw: random.Random, kind: Phrasings, unseen: bool, **words: object) -> str:
    text = draw.choice(kind.unseen if unseen else kind.known).format(**words)
    return text[0].upper() + text[1:]
