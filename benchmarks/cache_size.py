"""Bytes per token of the teacher cache, beside what DistillKit and Megatron-LM store for the same.

    python benchmarks/cache_size.py             the two teachers that it makes itself
    python benchmarks/cache_size.py FOLDER ...  real causal models, in folders

Writes whole caches and divides the bytes of all their files by the rows in them; a sample has 256
rows. Each line also has the error of the log-probabilities that are read back, on the same rows.

How much a row takes depends on how a teacher's likeliest tokens repeat from row to row. The two
teachers have 151,936 tokens:

- **text**: an interpolated trigram model of real text (WikiText-2, TinyStories, GSM8K) under the
  GPT-NeoX tokenizer, to whose logits a random but smooth function of the last tokens is added, as
  the last layer of a network is. Without it all rows would share their unlikely tokens. The
  tokenizer's ids are dealt to the 151,936 columns at random, so that their order helps nobody.
- **uniform ids**: the same probabilities on tokens drawn anew for each row. It is the worst case:
  as good as nothing repeats.

Real models read the same texts, with their own vocabularies. Data and tokenizer are read from the
folder `shared` beside the checkout.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, installed
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.teachers.codec import (
    pack_draws,
    pack_floats,
    pack_topk,
    unpack_draws,
    unpack_floats,
    unpack_topk,
)
from limbeck.teachers.store import Record, Shards, Store, token_hash

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
RESULTS = Path(__file__).with_name("results")
VOCABULARY = 151_936
ROWS = 256
SAMPLES_PER_TEXT = 8

SMOOTH_NATS = 1.6
"""Standard deviation of the smooth part of the text teacher's logits."""

SMOOTH_WIDTH = 24

DISTILLKIT = {128: (16, (0, 1, 2, 3, 4, "sqrt")), 50: (1, (0, 1, "sqrt"))}
"""k: (values kept in bfloat16, terms fitted to the others), its two recommended settings."""


@dataclass(frozen=True)
class Read:
    """What a teacher said of one sample, most likely tokens first."""

    name: str
    ids: np.ndarray
    logp: np.ndarray
    draws: np.ndarray
    mean_logp: np.ndarray
    hidden: np.ndarray | None = None


def main() -> None:
    """Measure, write the results, print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="*", help="folder of a causal model with its tokenizer")
    folders = [Path(name) for name in parser.parse_args().model]
    if not SHARED.exists():
        print("skipped: the folder of shared assets is absent")
        return
    tables = {}
    if folders:
        for folder in folders:
            tables[folder.name] = measure(*real_teacher(folder))
    else:
        reads = list(text_teacher())
        tables["text"] = measure(reads, VOCABULARY)
        tables["uniform ids"] = measure(uniform(reads), VOCABULARY)
    body = environment()
    body["versions"] |= {name: installed(name) for name in ("numpy", "pyarrow", "tokenizers")}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("cache_size_models.json" if folders else "cache_size.json")
    path.write_text(json.dumps({"environment": body, "teachers": tables}, indent=2) + "\n")
    for name, table in tables.items():
        size = f"V = {table['vocabulary']:,}; {table['samples']} samples of {ROWS} rows"
        print(f"\n### {name} ({size})\n")
        print_table(table["lines"])


def measure(reads: list[Read], vocabulary: int) -> dict[str, Any]:
    """All lines of a teacher's table."""
    lines: list[dict[str, Any]] = []
    for k, same_error in ((128, 1), (50, -1)):
        theirs = distillkit_bytes(k, vocabulary)
        for name, precision in (
            ("DistillKit, fitted in float64", torch.float64),
            ("DistillKit, fitted in float32 as by its own capture", torch.float32),
        ):
            errors = [distillkit_error(read.logp[:, :k], precision) for read in reads]
            lines.append(line(f"top-{k}", name, theirs, errors))
        lines += [topk_line(reads, vocabulary, k, bits, theirs) for bits in (0, same_error)]
    errors = [megatron_error(read.logp[:, :64]) for read in reads]
    lines.append(line("top-64", "Megatron-LM, which ends at V = 131,072", 5.0 * 64, errors))
    lines += [topk_line(reads, vocabulary, 64, bits, 5.0 * 64) for bits in (0, 6)]
    for draws in (12, 50):
        lines.append(line(f"{draws} draws", "limbeck", draws_bytes(reads, vocabulary, draws), None))
    if reads[0].hidden is not None:
        width = reads[0].hidden.shape[1]
        lines.append(line(f"{width} hidden units", "plain bfloat16", 2.0 * width, None))
        lines.append(line(f"{width} hidden units", "limbeck, bfloat16", hidden_bytes(reads), None))
    return {"vocabulary": vocabulary, "samples": len(reads), "lines": lines}


def line(what: str, who: str, size: float, errors: list[np.ndarray] | None) -> dict[str, Any]:
    """One line of the table; errors are [n, k], in nats."""
    body = {"what": what, "who": who, "bytes_per_token": size}
    if errors is not None:
        body["mean_error_nats"] = float(np.mean([error.mean() for error in errors]))
        body["largest_error_nats"] = float(max(error.max() for error in errors))
    return body


def topk_line(
    reads: list[Read], vocabulary: int, k: int, extra_bits: int, theirs: float
) -> dict[str, Any]:
    """Our line beside theirs."""
    cells = [pack_topk(read.ids[:, :k], read.logp[:, :k], vocabulary, extra_bits) for read in reads]
    store, size = stored(reads, cells)
    errors = []
    for read, record in zip(reads, store, strict=True):
        ids, logp = unpack_topk(record.cells, ROWS, k)
        back, wanted = np.argsort(ids, 1), np.argsort(read.ids[:, :k], 1)
        order = (np.take_along_axis(a, o, 1) for a, o in ((ids, back), (read.ids[:, :k], wanted)))
        assert np.array_equal(*order)
        exact = np.take_along_axis(read.logp[:, :k], wanted, 1)
        errors.append(np.abs(np.take_along_axis(logp, back, 1) - exact))
    who = f"limbeck, {extra_bits:+d} bits" if extra_bits else "limbeck"
    return line(f"top-{k}", who, size, errors) | {"share_of_theirs": size / theirs}


def draws_bytes(reads: list[Read], vocabulary: int, draws: int) -> float:
    """Bytes per token of that many draws."""
    cells = [
        pack_draws(read.draws[:, :draws], read.mean_logp[:, :draws].mean(1), vocabulary)
        for read in reads
    ]
    store, size = stored(reads, cells)
    for read, record in zip(reads, store, strict=True):
        ids, counts, _ = unpack_draws(record.cells, ROWS)
        back = np.sort(np.repeat(ids.ravel(), counts.ravel()).reshape(ROWS, draws), 1)
        assert np.array_equal(back, np.sort(read.draws[:, :draws], 1))
    return size


def hidden_bytes(reads: list[Read]) -> float:
    """Bytes per token of hidden states in bfloat16."""
    store, size = stored(reads, [pack_floats(read.hidden, "bfloat16") for read in reads])
    for read, record in zip(reads, store, strict=True):
        wanted = torch.from_numpy(read.hidden).bfloat16().float().numpy()
        assert np.array_equal(unpack_floats(record.cells, ROWS, wanted.shape[1]), wanted)
    return size


def stored(reads: list[Read], cells: list[dict[str, bytes]]) -> tuple[list[Record], float]:
    """A cache of them, read back from the disk, and its bytes per row with all files."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(folder, {"benchmark": "cache_size"}, 1)
        with shards.claim(0) as writer:
            assert writer is not None
            for read, mine in zip(reads, cells, strict=True):
                tokens = token_hash(read.ids[:, 0].tolist(), [True] * ROWS)
                writer.add(Record(read.name, tokens, ROWS, mine))
        store = Store(folder)
        records = [
            store.get(read.name, token_hash(read.ids[:, 0].tolist(), [True] * ROWS))
            for read in reads
        ]
        return records, store.size_bytes / store.rows


def distillkit_bytes(k: int, vocabulary: int) -> float:
    """Ids packed to whole bits, some values in bfloat16, and a float32 for each term."""
    exact, terms = DISTILLKIT[k]
    bits = (vocabulary - 1).bit_length()
    return float(-(-k * bits // 8) + 2 * exact + 4 * len(terms))


def distillkit_error(logp: np.ndarray, precision: torch.dtype) -> np.ndarray:
    """Error of a least-squares fit to the sorted curve, beside some values in bfloat16.

    What it computes, from its settings and code (arcee-ai/DistillKit a61c2e7, `README.md` and
    `compression/monotonic_logprobs.py`): an SVD whose singular values up to 1e-5 are left out, at
    places 0, 1, 2, ... that are not scaled, in the precision of the log-probabilities, which its
    capture holds in float32. Places to the fourth power are too much for that.
    """
    exact, terms = DISTILLKIT[logp.shape[1]]
    values = torch.from_numpy(logp)
    place = torch.arange(logp.shape[1] - exact, dtype=precision)
    basis = torch.stack([place.sqrt() if t == "sqrt" else place**t for t in terms], 1)
    u, singular, v = torch.linalg.svd(basis, full_matrices=False)
    inverse = torch.where(singular > 1e-5, 1 / singular, 0)
    found = (values[:, exact:].to(precision) @ u * inverse @ v).float()
    tail = found @ basis.T.float()
    return (torch.cat([values[:, :exact].bfloat16().float(), tail], 1) - values).abs().numpy()


def megatron_error(logp: np.ndarray) -> np.ndarray:
    """It stores float16 log-probabilities, two bytes of the id and one for its 17th bit."""
    return np.abs(logp.astype(np.float16).astype(np.float32) - logp)


def text_teacher() -> Iterator[Read]:
    """The trigram model's reading of texts it was not counted on."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "neox20b")
    generator = np.random.default_rng(0)
    columns = generator.permutation(VOCABULARY)

    def encode(text: str) -> np.ndarray:
        return columns[np.array(tokenizer(text, add_special_tokens=False)["input_ids"])]

    model = Trigrams(np.concatenate([encode(text) for text in texts("train").values()]), generator)
    for name, text in texts("test").items():
        ids = encode(text[: 8 * ROWS * SAMPLES_PER_TEXT])
        for sample in range(SAMPLES_PER_TEXT):
            piece = ids[sample * ROWS : (sample + 1) * ROWS + 2]
            yield take(f"{name}:{sample}", torch.from_numpy(model.logits(piece)))


class Trigrams:
    """Witten-Bell interpolation of three, two and one token, plus a smooth random function."""

    def __init__(self, tokens: np.ndarray, generator: np.random.Generator) -> None:
        counts = np.bincount(tokens, minlength=VOCABULARY)
        seen = (counts > 0).sum()
        self.unigram = (counts + seen / VOCABULARY) / (len(tokens) + seen)
        self.tables = []
        for order in (2, 3):
            windows = np.lib.stride_tricks.sliding_window_view(tokens, order)
            grams, counts = np.unique(windows, axis=0, return_counts=True)
            keys = grams[:, :-1] @ (VOCABULARY ** np.arange(order - 1))
            order_of_keys = np.argsort(keys, kind="stable")
            self.tables.append(
                (keys[order_of_keys], grams[order_of_keys, -1], counts[order_of_keys])
            )
        shape = (VOCABULARY, SMOOTH_WIDTH)
        self.reads, self.writes = (generator.normal(size=shape).astype(np.float32) for _ in "rw")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """[n, v] for each token of `ids` after the first two, given all before it."""
        rows = []
        state = np.zeros(SMOOTH_WIDTH, np.float32)
        for place in range(2, len(ids)):
            state = 0.7 * state + self.reads[ids[place - 1]]
            probability = self.unigram
            for order, (keys, tokens, counts) in zip((2, 3), self.tables, strict=True):
                context = ids[place - order + 1 : place]
                key = context @ (VOCABULARY ** np.arange(order - 1))
                first, last = np.searchsorted(keys, [key, key + 1])
                if first < last:
                    new = probability * (last - first)
                    new[tokens[first:last]] += counts[first:last]
                    probability = new / (counts[first:last].sum() + last - first)
            smooth = self.writes @ (state / np.linalg.norm(state))
            rows.append(np.log(probability) + SMOOTH_NATS * smooth)
        return np.array(rows, np.float32)


def texts(part: str) -> dict[str, str]:
    """Three texts, `train` for counting and `test` for reading."""

    def rows(path: str, *fields: str) -> str:
        lines = (SHARED / "data" / path).read_text().splitlines()
        parsed = (json.loads(line) for line in lines)
        return "\n\n".join("\n".join(row[field] for field in fields) for row in parsed)

    train = part == "train"
    wikitext = SHARED / "data" / "wikitext-2" / ("valid.txt" if train else "test.txt")
    return {
        "wikitext": wikitext.read_text(),
        "stories": rows(f"stories/{'train' if train else 'valid'}.jsonl", "text"),
        "gsm8k": rows(f"gsm8k/{part}.jsonl", "question", "answer"),
    }


@torch.inference_mode()
def take(name: str, logits: torch.Tensor, hidden: np.ndarray | None = None) -> Read:
    """The 128 likeliest tokens and 50 draws of each row."""
    logp = logits.float().log_softmax(-1)
    best, ids = logp.topk(128)
    generator = torch.Generator().manual_seed(0)
    draws = logp.exp().multinomial(50, replacement=True, generator=generator)
    parts = (ids, best, draws, logp.gather(-1, draws))
    return Read(name, *(part.numpy() for part in parts), hidden)


def uniform(reads: list[Read]) -> list[Read]:
    """The same probabilities on tokens that have nothing to do with each other."""
    made = []
    for number, read in enumerate(reads):
        generator = np.random.default_rng(number)
        ids = np.stack([generator.choice(VOCABULARY, 178, replace=False) for _ in range(ROWS)])
        draws = np.empty_like(read.draws)
        for row in range(ROWS):
            _, which = np.unique(read.draws[row], return_inverse=True)
            draws[row] = ids[row, 128 + which]
        made.append(Read(read.name, ids[:, :128], read.logp, draws, read.mean_logp))
    return made


@torch.inference_mode()
def real_teacher(folder: Path) -> tuple[list[Read], int]:
    """A model's reading of the same texts, and its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    reads = []
    for name, text in texts("test").items():
        ids = tokenizer(text[: 8 * ROWS * SAMPLES_PER_TEXT], add_special_tokens=False)["input_ids"]
        for sample in range(SAMPLES_PER_TEXT):
            piece = ids[sample * ROWS : (sample + 1) * ROWS]
            out = model(torch.tensor([start + piece]), output_hidden_states=True)
            hidden = out.hidden_states[-1][0, -ROWS:].float().numpy()
            reads.append(take(f"{name}:{sample}", out.logits[0, -ROWS:], hidden))
    return reads, model.config.get_text_config().vocab_size


def print_table(lines: list[dict[str, Any]]) -> None:
    print("| kept | by | bytes per token | share | mean error, nats | largest error, nats |")
    print("|---|---|---|---|---|---|")
    for body in lines:
        share = f"{body['share_of_theirs']:.0%}" if "share_of_theirs" in body else ""
        errors = [
            f"{body[name]:.4f}" if name in body else ""
            for name in ("mean_error_nats", "largest_error_nats")
        ]
        columns = [body["what"], body["who"], f"{body['bytes_per_token']:.1f}", share, *errors]
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
