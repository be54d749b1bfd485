"""Real rationales of a real teacher, parsed: PaLM-540B on CommonsenseQA and SVAMP.

    python benchmarks/palm_rationales.py
    python benchmarks/palm_rationales.py --write FOLDER     # rows to train on

The steps `split` and `verify` do the work, once with the patterns and comparisons of the paper's
code, once as limbeck's recipes would. The model wrote on into a next example, so a text ends before
the first `Q:` of its own.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from table import markdown

from limbeck.core.types import Turn
from limbeck.synth.rationales import Split
from limbeck.synth.rows import Row, to_json
from limbeck.synth.step import Desk, Step, through
from limbeck.synth.verify import Verify

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dss"

# What stands behind the first "(d)" of the last statement, up to another "(e)" or the end.
AN_OPTION = r"(?s)So the answer is(?:(?!\(.\)).)*\(.\)\s*(.*?)\s*(?:\(.\)|\.?\s*\Z)"
# From the first bracket to the last one.
A_SUM = r"(?s)The answer is(?!.*The answer is)[^(]*(\(.*\))"

READINGS: dict[str, dict[str, tuple[Step, ...]]] = {
    "of the paper": {
        "cqa": (
            Split(form="regex", pattern=AN_OPTION, answer="bare", stop=("Q:",)),
            Verify(match="exact"),
        ),
        "svamp": (
            Split(form="regex", pattern=A_SUM, answer="bare", stop=("Q:",)),
            Verify(match="arithmetic"),
        ),
    },
    "of limbeck": {
        "cqa": (Split(form="the_answer_is", stop=("Q:",)), Verify(match="choice")),
        "svamp": (Split(form="the_answer_is", stop=("Q:",)), Verify(match="arithmetic")),
    },
}


def given(name: str, part: str, folder: Path = DATA) -> Iterator[Row]:
    """Each question with its options, its known answer, and all that the teacher wrote."""
    lines = (folder / name / f"{name}_{part}.json").read_text(encoding="utf-8").splitlines()
    files = sorted(
        (folder / name / "palm").glob(f"{part}_CoT_*.json"),
        key=lambda file: int(file.stem.rpartition("_")[2]),
    )
    texts = [text for file in files for text in json.loads(file.read_text(encoding="utf-8"))]
    for number, (line, text) in enumerate(zip(lines, texts, strict=True)):
        question: dict[str, Any] = json.loads(line)
        yield Row(
            id=f"{name}-{part}-{number}",
            prompt=(Turn(text=_asked(question)),),
            completion=text,
            answer=question["answer"] if name == "cqa" else question["label"],
        )


def _asked(question: dict[str, Any]) -> str:
    if "input" in question:
        return f"{question['input']}\n"
    options = zip("abcde", question["choices"], strict=True)
    return "\n".join([question["question"], *(f"({a}) {text}" for a, text in options), ""])


def parsed(steps: Sequence[Step], rows: Iterator[Row]) -> tuple[list[Row], Desk]:
    """The rows in two parts, failed where they are wrong, and what was counted."""

    def nobody(name: str) -> Any:
        raise AssertionError(f"no step here asks {name}")

    desk = Desk(seed=0, writer=nobody, reader=nobody)
    return list(through(steps, rows, desk)), desk


def main() -> None:
    parser = argparse.ArgumentParser(description="PaLM's rationales, parsed.")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="rows to train on")
    folder = parser.parse_args().write
    if not DATA.exists():
        print(f"nothing to parse: {DATA} is absent")
        return
    lines: list[list[str]] = []
    for reading, by_data in READINGS.items():
        for name, steps in by_data.items():
            for part in ("train", "test"):
                rows, desk = parsed(steps, given(name, part))
                right = [row for row in rows if row.failure is None]
                unparsed = desk.counts["texts without a rationale and an answer"]
                unclear = desk.counts["answers that are unclear"]
                lines.append(
                    [reading, name, part, f"{len(rows):,}", str(unparsed), str(unclear)]
                    + [f"{len(right):,}", f"{100 * len(right) / len(rows):.2f}%"]
                )
                if folder is not None and reading == "of limbeck":
                    folder.mkdir(parents=True, exist_ok=True)
                    text = "".join(json.dumps(to_json(row)) + "\n" for row in right)
                    (folder / f"{name}-{part}.jsonl").write_text(text, encoding="utf-8")
    header = ["reading", "data", "part", "questions", "unparsed", "unclear", "right", "share"]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
