"""The README's tables, from the figures in `benchmarks/results/`.

    python benchmarks/table.py

prints what the other scripts wrote, as Markdown; with `--readme` it puts the README's tables there,
with `--docs` those of the documentation.
"""

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fused_loss_table(results: dict[str, Any]) -> str:
    """Implementations down, cases across: speed and memory, then the gradient's error."""
    from implementations import IMPLEMENTATIONS

    present = [row for row in results["rows"] if not _absent(row)]
    tables: list[str] = []
    for divergence, title in (("forward_kl", "KL"), ("jensen_shannon", "Jensen-Shannon")):
        rows = [row for row in present if row["case"]["divergence"] == divergence]
        found = {(str(row["case"]), row["implementation"]): row for row in rows}
        cases = list({str(row["case"]): row["case"] for row in rows}.values())
        cases.sort(key=lambda c: (c["rows"], c["vocabulary"], c["dtype"] == "bfloat16"))
        columns = [f"{c['rows']:,} x {c['vocabulary']:,} {SHORT[c['dtype']]}" for c in cases]
        for what, cell in (
            ("share of the matmul rate, extra peak memory, time", _loss_cell),
            ("relative error of the head's gradient against float64", _error_cell),
        ):
            lines = [
                [one.title, *(cell(found.get((str(case), name))) for case in cases)]
                for name, one in IMPLEMENTATIONS.items()
                if any((str(case), name) in found for case in cases)
            ]
            if lines:
                tables.append(markdown([f"{title}: {what}", *columns], lines))
    absent = {row["implementation"] for row in results["rows"] if _absent(row)}
    return "\n\n".join(tables) + _note(IMPLEMENTATIONS[name].title for name in absent)


def _absent(row: dict[str, Any]) -> bool:
    return row.get("left_out") == "not installed"


def _note(titles: Iterable[str]) -> str:
    left_out = ", ".join(sorted(titles))
    return f"\n\nLeft out, not installed: {left_out}." if left_out else ""


def _loss_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "seconds" not in row:
        return row.get("left_out") or "failed"
    cell = f"{row['share_of_matmul_rate']:.0%}"
    if plain := row.get("share_of_plain_matmul_rate"):
        cell += f" ({plain:.0%})"
    cell += f", {row['extra_bytes'] / 1e6:,.0f} MB"
    seconds = row["median_seconds"]
    cell += f", {seconds:.1f} s" if seconds > 1 else f", {1e3 * seconds:.1f} ms"
    return cell if row["agrees"] else f"{cell} (inexact)"


def train_step_table(results: dict[str, Any]) -> str:
    """The trainers on given text."""
    from trainers import TRAINERS

    return _trainers_table(results, {name: title for name, (title, _) in TRAINERS.items()})


def on_policy_table(results: dict[str, Any]) -> str:
    """The trainers on what the student writes."""
    from on_policy import TRAINERS

    return _trainers_table(results, {name: title for name, (title, _) in TRAINERS.items()})


def _trainers_table(results: dict[str, Any], titles: dict[str, str]) -> str:
    """Trainers down, vocabularies across: steps a second, and the process's peak memory."""
    rows = [row for row in results["rows"] if not _absent(row)]
    sizes = sorted({row["size"]["vocabulary"] for row in rows})
    found = {(row["trainer"], row["size"]["vocabulary"]): row for row in rows}
    lines = [
        [title, *(_step_cell(found.get((name, size))) for size in sizes)]
        for name, title in titles.items()
        if any((name, size) in found for size in sizes)
    ]
    absent = {row["trainer"] for row in results["rows"] if _absent(row)}
    table = markdown(["trainer", *(f"V = {size:,}" for size in sizes)], lines)
    return table + _note(titles[name] for name in absent)


def _step_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "steps_per_second" not in row or "error" in row:
        return row.get("left_out") or "failed"
    rate = row["steps_per_second"]
    cell = f"{rate:.{0 if rate > 10 else 2}f} steps/s, {row['peak_bytes'] / 1e6:,.0f} MB"
    if row.get("beside_bytes"):
        cell += f" + {row['beside_bytes'] / 1e6:,.0f} MB"
    return cell + (f", writing {row['writing_share']:.0%}" if row.get("written_per_step") else "")


def _error_cell(row: dict[str, Any] | None) -> str:
    if row is None or "seconds" not in row:
        return "-"
    return f"{row['head_gradient_error']:.1e}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "fused_loss": fused_loss_table,
    "train_step": train_step_table,
    "on_policy": on_policy_table,
}


def cache_size_table(results: dict[str, Any]) -> str:
    """What a token takes on disk, ours beside theirs at the same k and about the same error.

    Where tokens do not repeat, which k of the v ids were kept cannot be said in fewer than
    log2 (v choose k) bits by anybody: the last lines.
    """
    rows: list[list[str]] = []
    for name, teacher in results["teachers"].items():
        for line in teacher["lines"]:
            share = line.get("share_of_theirs")
            mean = line.get("mean_error_nats")
            rows.append(
                [
                    name,
                    line["what"],
                    line["who"],
                    f"{line['bytes_per_token']:.1f}",
                    "" if share is None else f"{share:.0%}",
                    "" if mean is None else f"{mean:.4f}",
                ]
            )
    rare = results["teachers"].get("uniform ids", {"lines": []})
    theirs = {
        int(line["what"].removeprefix("top-")): line["bytes_per_token"]
        for line in rare["lines"]
        if line["who"].startswith("DistillKit")
    }
    for k, taken in theirs.items():
        bound = least_bytes(rare["vocabulary"], k)
        cells = ["uniform ids", f"which {k} ids, nothing else", "the least possible"]
        rows.append([*cells, f"{bound:.1f}", f"{bound / taken:.0%}", ""])
    header = ["teacher", "kept", "by", "bytes/token", "of theirs", "mean error, nats"]
    return markdown(header, rows)


def least_bytes(vocabulary: int, k: int) -> float:
    """Bytes of log2 (vocabulary choose k) bits."""
    sets = math.lgamma(vocabulary + 1) - math.lgamma(k + 1) - math.lgamma(vocabulary - k + 1)
    return sets / math.log(2) / 8


def cache_quality_table(results: dict[str, Any]) -> str:
    """Students of a live and of a cached teacher."""
    from cache_quality import table

    return table(results["rows"])


def white_box_table(results: dict[str, Any]) -> str:
    """All ways to learn from a teacher with the same tokenizer."""
    from white_box import table

    return table(results)


def cross_tokenizer_table(results: dict[str, Any]) -> str:
    """All ways to learn from a teacher with another tokenizer."""
    from cross_tokenizer import table

    return table(results)


def of_script(name: str) -> Callable[[dict[str, Any]], str]:
    """The table of a script that is only loaded when there is something to print."""
    return lambda results: importlib.import_module(name).table(results)


TABLES |= {
    "cache_size": cache_size_table,
    "cache_size_models": cache_size_table,
    "fused_loss_epyc": fused_loss_table,
    "fused_loss_h200": fused_loss_table,
    "train_step_gpu": train_step_table,
    "train_step_two_cores": train_step_table,
    "cache_quality": cache_quality_table,
    "white_box": white_box_table,
    "cross_tokenizer": cross_tokenizer_table,
    "chunk_rate": of_script("chunk_rate"),
    "own_words": of_script("own_words"),
    "reasoning": of_script("reasoning"),
    "reasoning_budget": of_script("reasoning_budget"),
    "server_load": of_script("server_load"),
    "continual": of_script("continual"),
}

BEGIN, END = "<!-- benchmarks/table.py writes from here -->", "<!-- to here -->"
DOCS_BEGIN, DOCS_END = "<!-- benchmarks/table.py {name} from here -->", "<!-- {name} to here -->"


def readme_section() -> str:
    """The README's part: its words and the figures."""
    parts: list[str] = []
    for name, words in README_PARTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            tables = TABLES[name](json.loads(path.read_text())).strip().split("\n\n")
            chosen = (
                tables if name != "cache_quality" else tables[tables.index("**stories**") + 1 :]
            )
            parts += [words, *(table for table in chosen if "relative error" not in table)]
    return "\n\n".join(parts)


README_PARTS = {
    "train_step": """Whole training steps beside TRL 1.16, one CPU thread, the same random two-layer
models and rows, 4 rows a step (`benchmarks/train_step.py`; peak is of the whole process; at
V = 1,000 the quickest of three turns, since the machine was shared):""",
    "on_policy": """The same where the student writes what it learns from: 4 prompts of 24 tokens a
step, answers of 40 (`benchmarks/on_policy.py`, earlier code, a slower day; "writing" is its share
of the time):""",
    "fused_loss": """A distillation loss from hidden states and heads, forward and backward, one
thread of a CPU with matrix units for bf16, student width 512, teacher width 1,024
(`benchmarks/fused_loss.py`): share of the machine's own rate on exactly the matrix products that
the loss needs, memory on top of the inputs with the gradients in it, and seconds. The rate is
measured beside each call, on a shared machine where it moves by a third: compare shares. It is that
of huge pages; in brackets is the share of the rate in memory as torch hands it out, measured for
limbeck's first row only, which is of one session. The peers' rows are of the one before, with
other work on the other core, and at 8,192 x 151,936 all but two cells of older ones and of a laxer
rate:""",
    "fused_loss_h200": """The same on an NVIDIA H200 at the widths of real models, 2,048 and 8,192
(`benchmarks/fused_loss_gpu.py`; `logits: chunked` is without our Triton kernel, and was measured
with chunks of half the size):""",
    "train_step_gpu": """Whole training steps on the H200: a teacher of 1.0 billion weights, a
student of 0.4, 8 rows of 1,024 tokens a step, bfloat16 (`benchmarks/train_step_gpu.py`; peak is of
the GPU's memory, and behind a plus what the process that prepares steps has of the host's; one run,
but the tiled trainer, which is of an earlier one on another machine):""",
    "cache_quality": """Students of a live and of a cached teacher: a 260 k-parameter story model
into one of four layers, three seeds, mean [lowest, highest] (`benchmarks/cache_quality.py`; the
last column is the speed beside plain fine-tuning, everything on one core):""",
}


def write_readme() -> None:
    """Put the section between its marks."""
    path = Path(__file__).resolve().parents[1] / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{readme_section()}\n\n{END}{after}")


COMPARISONS = {
    "cache_size": "cache.md",
    "cache_size_models": "cache.md",
    "fused_loss": "../benchmarks/README.md",
    "fused_loss_epyc": "../benchmarks/README.md",
    "fused_loss_h200": "../benchmarks/README.md",
    "chunk_rate": "../benchmarks/README.md",
    "train_step_two_cores": "../benchmarks/README.md",
    "cross_tokenizer": "methods.md",
    "white_box": "methods.md",
    "own_words": "methods/own_words.md",
    "reasoning": "dasd.md",
    "reasoning_budget": "adaptive.md",
    "server_load": "server.md",
    "continual": "continual.md",
}
"""The page on which each comparison's table stands."""


def write_docs(names: Iterable[str]) -> None:
    """Put the comparisons' tables between their marks in their pages."""
    for name in names:
        path = Path(__file__).resolve().parents[1] / "docs" / COMPARISONS[name]
        text = path.read_text()
        results = RESULTS / f"{name}.json"
        if not results.exists():
            continue
        begin, end = DOCS_BEGIN.format(name=name), DOCS_END.format(name=name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        shown = TABLES[name](json.loads(results.read_text()))
        path.write_text(f"{before}{begin}\n\n{shown}\n\n{end}{after}")


def main() -> None:
    """Print every table whose figures are there, or put the README's into it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write README.md's tables anew")
    parser.add_argument(
        "--docs",
        nargs="*",
        choices=COMPARISONS,
        help="write the documentation's tables anew, or those named alone",
    )
    arguments = parser.parse_args()
    if arguments.readme:
        write_readme()
    if arguments.docs is not None:
        write_docs(arguments.docs or COMPARISONS)
    if arguments.readme or arguments.docs is not None:
        return
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            results = json.loads(path.read_text())
            print(f"## {name} ({results['environment']['date']})\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
