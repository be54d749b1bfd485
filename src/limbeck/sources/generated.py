"""Rows that `limbeck generate` has made with the help of teachers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from limbeck.core.errors import DataError
from limbeck.core.registry import register
from limbeck.core.text import one_line
from limbeck.sources.dataset import DatasetStream, Samples, open_samples
from limbeck.sources.files import CARD, FAILED, ROWS, open_rows

PAGE = "README.md"
"""Beside `ROWS`, `FAILED` and `CARD`: the data's card, for people and the hub."""

MAKE = "limbeck generate RECIPE"


@register("source", "generated")
@dataclass(frozen=True, kw_only=True)
class Generated:
    """Rows made by steps from other rows: `limbeck generate RECIPE` makes them, once.

    Attributes:
        path: the folder in which they lie.
        of: where the first rows come from: prompts, documents, seeds, or labelled data. All of
            them are taken; what is held out is some of the rows that were made.
        steps: what is done with them, in order.
        holdout: how many of the rows that were made to keep from training (whole groups), or the
            path of a file of held-out rows.
    """

    ahead: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {"of": "source", "steps": "steps"}

    path: Annotated[str, Field(min_length=1)]
    of: Any
    steps: tuple[Any, ...]
    holdout: Annotated[int, Field(ge=0)] | str = 64

    @property
    def folder(self) -> Path:
        """The folder."""
        return Path(self.path).expanduser()

    def card(self) -> Mapping[str, Any]:
        """What is known of the rows: see `recipe.card`.

        Raises:
            DataError: they have not been made.
        """
        try:
            return json.loads((self.folder / CARD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{self.path} holds no rows yet; make them first: {MAKE}") from None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}/{CARD} cannot be read ({one_line(error)}); run {MAKE}"
            ) from None

    def open(self, seed: int) -> DatasetStream:
        """Read and check every row, set held-out ones aside, and start the stream.

        Raises:
            DataError: the rows have not been made, or there are none.
        """
        self.card()
        path = self.folder / ROWS
        if not path.exists() or not path.stat().st_size:
            raise DataError(
                f"{self.path}: no row was fit to train on; {FAILED} there says why of each"
            )
        samples = Samples(open_rows(str(path), "train"), {})
        held: Any = self.holdout
        if isinstance(held, str):
            held = list(Samples(open_rows(held, "train"), {}))
        return open_samples(samples, held, seed)
