"""Round after round: the student helps to make the data, trains on it, and makes the next data.

Each round is an ordinary `generate` and an ordinary `run` of the same recipe, with the student and
the folders put in. So everything that resumes there resumes here, and this module only says which
round is next.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.campaigns.rounds import Campaign, Round, read_json, read_round
from limbeck.core.errors import DataError, Interrupted, RecipeError
from limbeck.core.files import held, sweep, write_json, write_text
from limbeck.recipe.document import Document
from limbeck.recipe.generate import generate as make_rows
from limbeck.recipe.resolve import dump, resolve, training_sha256
from limbeck.recipe.run import run

WHICH_MODEL = ("name", "from", "layers", "config", "tokenizer", "revision")
"""Fields of a student that say where its weights come from."""

Generate = Callable[[Document], Any]


def iterate(
    document: Document,
    rounds: int,
    out: Path,
    *,
    restart: bool = False,
    generate: Generate | None = None,
) -> Campaign:
    """Make data and train on it, so many times; each round begins with the student of the last.

    Round k lies in `out/round-k`: its data in `data`, and beside it what any run leaves. A round
    with a report is finished and is not run again; one without goes on where it stopped.

    Args:
        document: of a recipe whose source is made by steps.
        rounds: how many; more may be asked for later.
        out: folder of all of them.
        restart: let the last student make the data, but train the recipe's own student each time,
            as STaR and ReST-EM do.
        generate: makes the data of a document's sources; by default `recipe.generate.generate`.

    Returns:
        The figures of all rounds, which are also in `out/rounds.json` and `out/rounds.md`.

    Raises:
        RecipeError: the recipe has no source that is made, or `out` holds another campaign.
        LimbeckError: a round failed; the message says what to do.
    """
    generate = generate or make_rows
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("", "iterate runs in one process, because it also makes the data")
    recipe = resolve(document)  # what is wrong with it should not be found after the first data
    if not any(_made(document.values["source"])):
        raise RecipeError(
            "source", "is not made anew in each round; give `kind: generated`, with `steps`"
        )
    out = out.resolve()
    with _claimed(out, {"recipe": training_sha256(recipe), "restart": restart}):
        finished: list[Round] = []
        for number in range(1, rounds + 1):
            folder = out / f"round-{number}"
            if not (folder / "report.json").exists():
                _round(document, number, out, restart, generate)
            finished.append(read_round(number, folder))
        campaign = Campaign(restart=restart, rounds=tuple(finished))
        campaign.write(out)
    return campaign


def _round(document: Document, number: int, out: Path, restart: bool, generate: Generate) -> None:
    """Make the data of one round, where that is not done, and train on it."""
    folder = out / f"round-{number}"
    last = out / f"round-{number - 1}" / "student" if number > 1 else None
    try:
        ready = folder / "recipe.yaml"
        training = round_document(document, folder, student=None if restart else last, made=True)
        if not ready.exists():
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            generate(round_document(document, folder, student=last, made=False))
            gc.collect()  # cycles would keep its models beside those that train
            _check_rows(folder)
            # It stands for finished data: from here on the round trains, and its data stay.
            write_text(ready, dump(resolve(training)))
        run(resolve(training), folder, True, training)
        gc.collect()
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"interrupted in round {number}; the same command goes on from where it stopped"
        ) from None


def round_document(
    document: Document, folder: Path, *, student: Path | None, made: bool
) -> Document:
    """The recipe of one round.

    Args:
        document: the whole campaign's.
        folder: of the round.
        student: folder of the weights to begin with; None keeps the recipe's own.
        made: for training: read the rows that lie in the folder as plain data. Which student wrote
            them does not matter then, and a round that restarts has another one.
    """
    values: dict[str, Any] = dict(document.values)
    if student is not None:
        own = {k: v for k, v in values["student"].items() if k not in WHICH_MODEL}
        values["student"] = {**own, "name": str(student)}
    values["source"] = _placed(values["source"], _places(folder, "data"), made)
    return Document(values, document.lines, document.file)


def _places(folder: Path, name: str) -> Iterator[Path]:
    """Where the sources of a round have their rows: most rounds have one."""
    yield folder / name
    number = 2
    while True:
        yield folder / f"{name}-{number}"
        number += 1


def _made(source: Any) -> Iterator[Mapping[str, Any]]:
    """The sources inside of one that steps make."""
    if isinstance(source, Mapping):
        if source.get("kind") == "generated":
            yield source
        else:
            yield from _made(source.get("of"))
    elif isinstance(source, list):
        for one in source:
            yield from _made(one)


def _placed(source: Any, places: Iterator[Path], made: bool) -> Any:
    """The same source with the round's folders in it."""
    if isinstance(source, list):
        return [_placed(one, places, made) for one in source]
    if not isinstance(source, Mapping):
        return source
    if source.get("kind") != "generated":
        return {k: _placed(v, places, made) if k == "of" else v for k, v in source.items()}
    place = next(places)
    if not made:  # its own first rows may be made, too
        of = _placed(source.get("of"), _places(place, "of"), made)
        return {**source, "path": str(place), "of": of}
    holdout = {"holdout": source["holdout"]} if "holdout" in source else {}
    return {"kind": "dataset", "path": str(place / "rows.jsonl"), **holdout}


def _check_rows(folder: Path) -> None:
    for data in sorted(folder.glob("data*")):
        rows = data / "rows.jsonl"
        if not rows.exists() or not rows.stat().st_size:
            raise DataError(
                f"{data}: no row was left to train on; {data / 'failed.jsonl'} says why"
            )


@contextmanager
def _claimed(out: Path, campaign: Mapping[str, Any]) -> Iterator[None]:
    """Hold `out` for this campaign alone.

    Raises:
        RecipeError: it holds something else, or another process is using it.
    """
    told = out / "campaign.json"
    if out.exists() and not out.is_dir():
        raise RecipeError("--out", f"{out} is a file, not a folder")
    strange = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if strange and not told.exists():
        raise RecipeError("--out", f"{out} is not empty and holds no rounds; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with held(out) as mine:
        if not mine:
            raise RecipeError("--out", f"{out} is in use by another process")
        sweep(out)
        if not told.exists():
            write_json(told, campaign)
        elif read_json(told) != campaign:
            raise RecipeError(
                "--out",
                f"{out} holds rounds of another recipe, or with another --restart; give another"
                " folder",
            )
        yield
