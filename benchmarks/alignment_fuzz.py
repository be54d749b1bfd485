"""Aligns random documents under every ordered pair of real tokenizers, and looks for faults.

A document is a slice of real text with random characters of all of Unicode strewn in, cut into
prompt and completion anywhere. Half of the batches are cut off at a random number of tokens, for
each tokenizer another. What must hold:

- tokens:  in a text that a tokenizer writes again as it was, each token covers just the bytes that
           it writes (a space put before the text apart);
- cover:   what tokens cover has no hole and no overlap, unless they share a stretch;
- bytes:   the groups of both sides cover the same bytes, and within a group there is no hole;
- once:    each row is in one group at most, in the order of the text;
- lost:    where both have read all and know all, only rows before a sample's first group are in no
           group;
- alone:   with itself, a tokenizer has a group for each row.

    python benchmarks/alignment_fuzz.py [--documents 10000] [--seed 0] [--quick]

Tokenizers and data are read from the folder `shared` beside the checkout.
"""

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from itertools import permutations
from pathlib import Path

import torch
from environment import environment
from transformers import AutoTokenizer

from limbeck.align.spans import pair
from limbeck.core.types import NO_OFFSET, Sample, Spans, Turn, View
from limbeck.models.encode import Encoder
from limbeck.models.tokens import token_bytes

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
RESULT = Path(__file__).parent / "results" / "alignment_fuzz.json"
NAMES = "gpt2 llama2 neox20b smollm_like tinystories_bpe2k stories260K babyllama105".split()
BATCH = 16
LONGEST_CHARACTERS = 400
ODD = "\u200d\ufe0f\u0301\u0327\u0344\u00ad\u200b\ufeff\u2028\u00a0\u3000\r\n\t ▁Ġ<>|"
BLOCKS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF)]
BLOCKS += [(0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x2BFF)]
BLOCKS += [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFD)]
BLOCKS += [(0x10000, 0x1F9FF), (0x20000, 0x2FA1F), (0, 0x10FFFF)]


def real_text(shared: Path) -> str:
    """All prose at hand, one after the other."""
    data = shared / "data"
    parts = [file.read_text() for file in sorted((data / "text").glob("*.txt"))]
    parts.append((data / "wikitext-2" / "valid.txt").read_text())
    for file in ("stories/valid.jsonl", "gsm8k/test.jsonl"):
        for line in (data / file).read_text().splitlines():
            parts += [value for value in json.loads(line).values() if isinstance(value, str)]
    return "\n".join(parts)


def odd_text(draw: random.Random) -> str:
    """Up to eight characters of one block, or of those that make trouble."""
    if draw.random() < 0.4:
        return "".join(draw.choices(ODD, k=draw.randint(1, 4)))
    first, last = draw.choice(BLOCKS)
    points = [draw.randint(first, last) for _ in range(draw.randint(1, 8))]
    return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)


def document(number: int, prose: str, draw: random.Random) -> Sample:
    """A sample with prompt and completion."""
    begin = draw.randrange(len(prose))
    text = prose[begin : begin + draw.randint(0, LONGEST_CHARACTERS)]
    for _ in range(draw.choice([0, 1, 3, 10])):
        at = draw.randint(0, len(text))
        text = text[:at] + odd_text(draw) + text[at:]
    cut = draw.randint(0, len(text))
    turns = (Turn(text=text[:cut]), Turn(text=text[cut:], learn=True))
    return Sample(id=f"document {number}", turns=turns)


class Seen:
    """A batch as one tokenizer sees it."""

    def __init__(self, name: str, encoder: Encoder, table: list[bytes | None], batch: list[Sample]):
        self.name, self.table = name, table
        self.encodings = [encoder.encode(sample) for sample in batch]
        self.view: View = encoder.collate(self.encodings)
        offsets = self.view.offsets.flatten(0, 1)[self.view.rows + 1]
        self.start, self.end = offsets.T
        self.sample = self.view.sample_of(self.view.rows)
        cut = torch.tensor([encoding.truncated > 0 for encoding in self.encodings])
        dark = torch.zeros(len(batch), dtype=torch.bool)
        dark[self.view.sample_of((self._silent()).nonzero().flatten())] = True
        self.plain = ~cut & ~dark  # documents that it has read wholly and knows wholly

    def _silent(self) -> torch.Tensor:
        start, end = self.view.offsets.flatten(0, 1).T
        return (start != NO_OFFSET) & (end == NO_OFFSET)

    def faults(self, batch: list[Sample]) -> Counter[str]:
        """What is wrong with the offsets, and how many tokens are told apart."""
        found: Counter[str] = Counter()
        for sample, encoding in zip(batch, self.encodings, strict=True):
            text = "".join(turn.text for turn in sample.turns).encode()
            spans = list(zip(encoding.starts, encoding.ends, strict=True))
            pieces = [self.table[token] or b"" for token in encoding.ids]
            written = b"".join(pieces)
            again = not encoding.truncated and written in (text, b" " + text)
            found["documents_written_again"] += again
            shared, reached = Counter(spans), 0
            for place, ((start, end), piece) in enumerate(zip(spans, pieces, strict=True)):
                if NO_OFFSET in (start, end) or start == end:
                    continue
                found["tokens"] += 1
                found["apart"] += shared[start, end] == 1
                found["cover"] += start != reached and spans[place - 1] != (start, end)
                reached = end
                before = b"" if start else b" "  # what may have been put before the text
                wrong = piece not in (text[start:end], before + text[start:end])
                found["wrong"] += again and wrong and (start > 0 or shared[start, end] == 1)
        return found


def faults(left: Seen, right: Seen) -> Counter[str]:
    """What is wrong with the groups of a pair, and how many there are."""
    count = left.view.sample_count
    pairing = pair(left.view, right.view, [1.0] * count, same_vocabulary=False, unit="span")
    found: Counter[str] = Counter(groups=len(pairing.weight))
    covered: list[torch.Tensor] = []
    for side, spans in ((left, pairing.student), (right, pairing.teacher)):
        assert isinstance(spans, Spans)
        sample, start, end = side.sample[spans.rows], side.start[spans.rows], side.end[spans.rows]
        fresh = torch.ones_like(spans.span, dtype=torch.bool)
        fresh[1:] = spans.span[1:] != spans.span[:-1]
        last = fresh.roll(-1)
        shares = (start[1:] == start[:-1]) & (end[1:] == end[:-1])
        found["bytes"] += int((~(fresh[1:] | shares | (start[1:] == end[:-1]))).sum())
        found["once"] += int((spans.rows.diff() <= 0).sum() + (spans.span.diff() > 1).sum())
        covered.append(torch.stack([sample[fresh], start[fresh], end[last]]))
        first = torch.full((count,), 1 << 40).index_reduce(0, sample, start, "amin")
        grouped = torch.zeros(len(side.start), dtype=torch.bool)
        grouped[spans.rows] = True
        plain = (left.plain & right.plain)[side.sample]
        found["lost"] += int((plain & ~grouped & (side.start >= first[side.sample])).sum())
        found["rows"] += len(grouped)
        found["grouped"] += int(grouped.sum())
    found["bytes"] += int(not torch.equal(*covered))
    learnt, paired = left.sample.unique(), covered[0][0].unique()
    found["unaligned"] += len(learnt) - len(paired)
    return found


def alone(seen: Seen) -> int:
    """How many rows a tokenizer does not have to itself beside itself."""
    view = seen.view
    pairing = pair(view, view, [1.0] * view.sample_count, same_vocabulary=True, unit="span")
    assert isinstance(pairing.student, Spans)
    return int((pairing.student.span != torch.arange(len(view.rows))).sum())


def main() -> int:
    """Run, print and write what was found; 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="200 documents, nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    documents = 200 if options.quick else options.documents
    draw, prose = random.Random(options.seed), real_text(SHARED)
    tokenizers = {}
    for name in NAMES:
        folder = SHARED / "tokenizers" / name
        place = folder if folder.exists() else SHARED / "models" / name
        tokenizers[name] = AutoTokenizer.from_pretrained(place)
    tables = {name: token_bytes(t, len(t)) for name, t in tokenizers.items()}
    of_tokens = {name: Counter[str]() for name in NAMES}
    of_pairs = {pair_of: Counter[str]() for pair_of in permutations(NAMES, 2)}
    whole = {name: Encoder(t, 1 << 20) for name, t in tokenizers.items()}
    began = time.perf_counter()
    for first in range(0, documents, BATCH):
        numbers = range(first, min(first + BATCH, documents))
        batch = [document(number, prose, draw) for number in numbers]
        cut = draw.random() < 0.5
        seen: dict[str, Seen] = {}
        for name, tokenizer in tokenizers.items():
            encoder = Encoder(tokenizer, draw.randint(2, 200)) if cut else whole[name]
            seen[name] = Seen(name, encoder, tables[name], batch)
            of_tokens[name] += seen[name].faults(batch)
            of_tokens[name]["alone"] += alone(seen[name])
        for mine, theirs in of_pairs:
            of_pairs[mine, theirs] += faults(seen[mine], seen[theirs])
    seconds = time.perf_counter() - began
    wrong = sum(c[key] for c in of_pairs.values() for key in ("bytes", "once", "lost"))
    wrong += sum(c[key] for c in of_tokens.values() for key in ("cover", "wrong", "alone"))
    for name, counts in of_tokens.items():
        print(f"{name:18}", dict(counts))
    for (mine, theirs), counts in of_pairs.items():
        share = counts["grouped"] / max(1, counts["rows"])
        size = counts["grouped"] / 2 / max(1, counts["groups"])
        print(f"{mine:18} {theirs:18} in groups {share:.4f}, tokens a group {size:.2f}")
    print(f"{documents:,} documents, {len(of_pairs)} pairs, {seconds:.0f} s: {wrong} faults")
    if not options.quick:
        report = {
            "command": f"alignment_fuzz.py --documents {documents} --seed {options.seed}",
            "environment": environment(),
            "documents": documents,
            "faults": wrong,
            "seconds": seconds,
            "tokenizers": {name: dict(counts) for name, counts in of_tokens.items()},
            "pairs": [
                {"student": mine, "teacher": theirs, **counts}
                for (mine, theirs), counts in of_pairs.items()
            ],
        }
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
