"""How well the verifiers agree with people's labels, and what a check takes.

    python benchmarks/verifiers.py

The labels are OpenAI's of four systems' answers to the 1,319 test problems of GSM8K
(`example_model_solutions.jsonl`): 5,276 answers, each marked right or wrong.
"""

import argparse
import json
import time
from pathlib import Path

from table import markdown

from limbeck.evals.verifiers import Verifier

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"


def labelled(path: Path) -> list[tuple[str, str, str, bool]]:
    """System, text, right answer, label."""
    found: list[tuple[str, str, str, bool]] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
        for system, said in row.items():
            if isinstance(said, dict) and "is_correct" in said:
                found.append((system, said["solution"], gold, bool(said["is_correct"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Verifiers beside people's labels.")
    parser.add_argument("--quick", action="store_true", help="the first 200 of each system")
    quick = parser.parse_args().quick
    if not DATA.exists():
        print(f"nothing to compare with: {DATA} is absent")
        return
    rows = labelled(DATA / "example_model_solutions.jsonl")
    systems = list(dict.fromkeys(row[0] for row in rows))
    lines: list[list[str]] = []
    for match in ("last_number", "math"):
        for system in systems:
            mine = [row for row in rows if row[0] == system][: 200 if quick else None]
            began = time.perf_counter()
            verdicts = Verifier(match=match).check_all(
                [row[1] for row in mine], [row[2] for row in mine]
            )
            seconds = time.perf_counter() - began
            agree = sum(v.right == row[3] for v, row in zip(verdicts, mine, strict=True))
            each = 1000 * seconds / len(mine)
            lines.append([match, system, f"{agree:,} of {len(mine):,}", f"{each:.2f}"])
        total = [line for line in lines if line[0] == match]
        agreed, of = (
            sum(int(line[2].replace(",", "").split(" of ")[k]) for line in total) for k in (0, 1)
        )
        lines.append([match, "all", f"{agreed:,} of {of:,}", ""])
    print(markdown(["verifier", "system", "agrees with the label", "milliseconds a check"], lines))


if __name__ == "__main__":
    main()
