"""How long the filters of synthetic data take, what they hold in memory, and what MinHash misses.

    python benchmarks/duplicates.py            # 100,000 texts
    python benchmarks/duplicates.py --quick    # 3,000, in a few seconds

The texts are made up: words drawn with Zipf's frequencies from 20,000, 60 words a text. One in ten
is an earlier one with some of its words changed, so that there are pairs on both sides of the
threshold.
"""

import argparse
import json
import random
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from limbeck.core.types import Turn
from limbeck.synth.duplicates import Duplicates
from limbeck.synth.rows import Row
from limbeck.synth.self_instruct import Pool
from limbeck.synth.step import Desk
from limbeck.synth.words import words

VOCABULARY, LENGTH = 20_000, 60


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts, one in ten a changed copy of one of the hundred before it."""
    draw = random.Random(seed)
    names = [f"w{k}" for k in range(VOCABULARY)]
    shares = [1 / (k + 10) for k in range(VOCABULARY)]
    total = 0.0
    cumulative = [total := total + share for share in shares]
    recent: list[list[str]] = []
    for _ in range(count):
        if recent and draw.random() < 0.1:
            found = list(draw.choice(recent))
            for place in draw.sample(range(LENGTH), draw.randrange(1, 8)):
                found[place] = draw.choice(names)
        else:
            found = draw.choices(names, cum_weights=cumulative, k=LENGTH)
        recent = [*recent[-99:], found]
        yield " ".join(found)


def rows(count: int) -> Iterator[Row]:
    """The texts as prompts."""
    for number, text in enumerate(texts(count)):
        yield Row(id=str(number), prompt=(Turn(text=text),))


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dropped(by: str, count: int) -> tuple[set[str], dict[str, float]]:
    """Names of duplicates, and figures."""
    desk = Desk(seed=0, writer={}.__getitem__, reader={}.__getitem__)
    before, began = megabytes(), time.perf_counter()
    step = Duplicates(by=by)  # pyright: ignore
    found = {row.id for row in step.run(rows(count), desk) if row.failure}
    seconds = time.perf_counter() - began
    figures = {
        "texts": count,
        "duplicates": len(found),
        "seconds": round(seconds, 2),
        "texts_per_second": round(count / seconds),
        "megabytes_more": round(megabytes() - before, 1),
    }
    return found, figures


def pool(count: int) -> dict[str, float]:
    """How long a new instruction is compared with a pool of so many."""
    made = Pool(
        [Row(id=str(k), prompt=(Turn(text=t[:90]),)) for k, t in enumerate(texts(count, 1))]
    )
    new = [words(text[:90]) for text in texts(200, 2)]
    began = time.perf_counter()
    for found in new:
        made.nearest(found, 0.7)
    each = (time.perf_counter() - began) / len(new)
    return {"pool": count, "milliseconds_each": round(1000 * each, 3)}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    count = 3_000 if parser.parse_args().quick else 100_000
    # Each in a process of its own: what one has held would hide what the other one holds.
    with ProcessPoolExecutor(1, max_tasks_per_child=1, mp_context=get_context("spawn")) as alone:
        near, quick = alone.submit(dropped, "minhash", count).result()
        all_, exact = alone.submit(dropped, "ngrams", count).result()
    print(
        json.dumps(
            {
                "minhash": quick,
                "ngrams": exact,
                "found_by_minhash": round(len(near & all_) / len(all_), 4),
                "wrongly_called_duplicates": len(near - all_),
                "self_instruct": pool(1_000 if count < 10_000 else 10_000),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
