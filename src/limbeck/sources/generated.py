"""Rows that `limbeck generate` has made with the help of teachers."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from limbeck.core.registry import register


@register("source", "generated")
@dataclass(frozen=True, kw_only=True)
class Generated:
    """Rows made by steps from other rows: `limbeck generate RECIPE` makes them, once.

    Attributes:
        path: the folder in which they lie.
        of: where the first rows come from: prompts, documents, seeds, or labelled data.
        steps: what is done with them, in order.
        holdout: how many of the rows that were made to keep from training, or the path of a file
            of held-out rows.
    """

    ahead: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {"of": "source", "steps": "steps"}

    path: Annotated[str, Field(min_length=1)]
    of: Any
    steps: tuple[Any, ...]
    holdout: Annotated[int, Field(ge=0)] | str = 64
