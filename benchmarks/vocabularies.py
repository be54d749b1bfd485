"""What two real vocabularies have in common, and what mapping one onto the other by spelling does.

    python benchmarks/vocabularies.py            # GPT-2's and Llama 2's tokens, both ways
    python benchmarks/vocabularies.py --quick    # two small vocabularies

Prints how many tokens have equal bytes, how long the map of nearest tokens takes on one core, and
how often it copies the token that it copies most. Needs the folder of shared assets.
"""

import argparse
import time
from pathlib import Path

from table import markdown
from transformers import AutoTokenizer

from limbeck.align.vocabulary import nearest, shared_tokens
from limbeck.models.tokens import token_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared"
PAIRS = {False: ("tokenizers/gpt2", "tokenizers/llama2"), True: ("models/stories260K",) * 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    first, second = PAIRS[parser.parse_args().quick]
    if not SHARED.exists():
        print(f"left out: {SHARED} is absent")
        return
    lines: list[list[str]] = []
    for teacher, student in ((first, second), (second, first)):
        loaded = [AutoTokenizer.from_pretrained(SHARED / name) for name in (teacher, student)]
        theirs, mine = (token_bytes(tokenizer, len(tokenizer)) for tokenizer in loaded)
        began = time.process_time()
        columns = nearest(theirs, mine)
        seconds = time.process_time() - began
        copies = columns[columns >= 0].bincount()
        most = theirs[int(copies.argmax())]
        equal = len(shared_tokens(theirs, mine)[0])
        lines.append(
            [
                f"{Path(teacher).name} ({len(theirs):,})",
                f"{Path(student).name} ({len(mine):,})",
                f"{equal:,}",
                f"{seconds:.1f}",
                f"{most!r}, {int(copies.max()):,} times",
            ]
        )
    header = ["teacher", "student", "equal tokens", "seconds for the map", "copied most"]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
