"""Real rationales of a real teacher, parsed: PaLM-540B on CommonsenseQA and SVAMP.

    python benchmarks/palm_rationales.py
    python benchmarks/palm_rationales.py --write FOLDER     # rows to train on

The model wrote on into a next example, so a text ends before the first `Q:` of its own. The answer
is what stands behind the last "the answer is"; an answer that cannot be read counts as unparsed.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from table import markdown

from limbeck.evals.arithmetic import arithmetic
from limbeck.synth.rationales import split

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dss"
SETS = {"cqa": ("train", "test"), "svamp": ("train", "test")}
SAID = re.compile(r"[Tt]he answer is\s*(.*?)\.?\s*$", re.DOTALL)
LETTER = re.compile(r"answer is \(([a-e])\)\s*([^.]*)")


def texts(folder: Path, part: str) -> list[str]:
    """What the teacher wrote, in the order of the questions."""
    files = sorted(folder.glob(f"palm/{part}_CoT_*.json"), key=lambda f: int(f.stem.split("_")[-1]))
    return [text for file in files for text in json.loads(file.read_text())]


def own(text: str) -> str:
    """A text without the examples that the teacher went on to make up."""
    return re.split(r"\n+\s*Q:", text)[0].strip()


def questions(folder: Path, part: str, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}_{part}.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parsed(name: str, part: str) -> Iterator[tuple[dict[str, Any], str, str | None, bool]]:
    """Question, text, the answer that was read (None: unparsed), and whether it is right."""
    folder = DATA / name
    for question, raw in zip(questions(folder, part, name), texts(folder, part), strict=True):
        text = own(raw)
        read = _option(text) if name == "cqa" else _sum(text)
        gold = question["answer"] if name == "cqa" else arithmetic(question["label"])
        right = read is not None and (read == gold if name == "cqa" else arithmetic(read) == gold)
        yield question, text, read, right


def _option(text: str) -> str | None:
    found = LETTER.findall(text)
    return found[-1][1].strip() if found else None


def _sum(text: str) -> str | None:
    found = SAID.search(text)
    if found is None:
        return None
    return None if arithmetic(found[1]) is None else found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="PaLM's rationales, parsed.")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="rows to train on")
    folder = parser.parse_args().write
    if not DATA.exists():
        print(f"nothing to parse: {DATA} is absent")
        return
    lines: list[list[str]] = []
    for name, sets in SETS.items():
        for part in sets:
            found = list(parsed(name, part))
            unparsed = sum(read is None for _, _, read, _ in found)
            right = sum(ok for *_, ok in found)
            share = f"{right / len(found):.1%}"
            lines.append([name, part, f"{len(found):,}", f"{unparsed}", share])
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{name}-{part}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows(name, found)))
    print(markdown(["data", "part", "questions", "unparsed", "right"], lines))


def rows(name: str, found: list[tuple[dict[str, Any], str, str | None, bool]]) -> Iterator[Any]:
    """Right ones in two parts, as `limbeck` reads them."""
    for question, text, _, right in found:
        parts = split(text, "the_answer_is")
        if right and parts is not None:
            asked = question["question"] if name == "cqa" else question["input"]
            yield {"prompt": f"{asked}\n", "rationale": parts[0], "completion": parts[1]}


if __name__ == "__main__":
    main()
