"""What it costs to take one token for another: a table, token bytes, or embeddings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from limbeck.align.vocabulary import Tokens, as_array, edit_costs, edit_costs_of_pairs
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network
from limbeck.losses.semantic import Costs, Pricing

FIELD = "cost"
"""The objective's field that these are the values of, for messages."""

TABLE_ENTRIES = 2**27
"""Distances that are made before training and kept, 2 bytes each. Where all would be more, they are
found in each step for the tokens that are kept in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TableCosts:
    """Costs that are known for all tokens: [w, v] between, and maybe [w, w] and [v, v] within."""

    between: Tensor
    teacher: Tensor | None = None
    student: Tensor | None = None
    rest: float = 1.0

    def __call__(self, teacher: Tensor, student: Tensor) -> Costs:
        """The costs between the ids of each row."""

        def picked(table: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return table[first[:, :, None], second[:, None, :]]

        within = self.teacher is not None and self.student is not None
        return Costs(
            between=picked(self.between, teacher, student),
            teacher=picked(self.teacher, teacher, teacher) if within else None,  # pyright: ignore
            student=picked(self.student, student, student) if within else None,  # pyright: ignore
            rest=self.rest,
        )


@dataclass(frozen=True, eq=False)
class ByteCosts:
    """Edit distances, found as they are asked for: two large vocabularies have too many pairs.

    Attributes:
        teacher: its tokens.
        student: its tokens.
        ends: the teacher's and the student's end-of-text token, between which nothing is paid.
    """

    teacher: np.ndarray
    student: np.ndarray
    ends: tuple[int, int] | None

    def __call__(self, teacher: Tensor, student: Tensor) -> Costs:
        """The costs between the ids of each row."""
        between = self._distances(self.teacher, self.student, teacher, student)
        if self.ends is not None:
            ends = (teacher == self.ends[0])[:, :, None] & (student == self.ends[1])[:, None, :]
            between = between.masked_fill(ends, 0.0)
        return Costs(
            between=between,
            teacher=self._within(self.teacher, teacher),
            student=self._within(self.student, student),
        )

    def _within(self, tokens: np.ndarray, ids: Tensor) -> Tensor:
        costs = self._distances(tokens, tokens, ids, ids)
        return costs.masked_fill(ids[:, :, None] == ids[:, None, :], 0.0)

    def _distances(self, a: np.ndarray, b: np.ndarray, first: Tensor, second: Tensor) -> Tensor:
        shape = (*first.shape, second.shape[1])
        pairs = torch.stack(
            [first[:, :, None].expand(shape), second[:, None, :].expand(shape)], dim=-1
        )
        found = edit_costs_of_pairs(a, b, pairs.reshape(-1, 2).cpu().numpy())
        return torch.from_numpy(found).reshape(shape).to(first.device)


@dataclass(frozen=True, eq=False)
class EmbeddingCosts:
    """1 - cosine of two tokens' embeddings, [v, d] of length 1, of the one vocabulary."""

    directions: Tensor

    def __call__(self, teacher: Tensor, student: Tensor) -> Costs:
        """The costs between the ids of each row."""
        theirs, mine = self.directions[teacher], self.directions[student]
        return Costs(
            between=_apart(theirs, mine),
            teacher=_zero_diagonal(_apart(theirs, theirs)),
            student=_zero_diagonal(_apart(mine, mine)),
        )


def byte_costs(
    teacher: Tokens, student: Tokens, ends: tuple[int, int] | None, device: torch.device
) -> Pricing:
    """Edit distance of the tokens' bytes over the longer one's length, at most 1."""
    w, v = len(teacher), len(student)
    if w * v + w * w + v * v > TABLE_ENTRIES:
        return ByteCosts(as_array(teacher), as_array(student), ends)
    between = edit_costs(teacher, student)
    if ends is not None:
        between[ends] = 0.0
    return TableCosts(
        between=between.to(device),
        teacher=edit_costs(teacher, teacher).fill_diagonal_(0.0).to(device),
        student=edit_costs(student, student).fill_diagonal_(0.0).to(device),
    )


def embedding_costs(teacher: Network, student: Network) -> Pricing:
    """1 - cosine of the teacher's embeddings.

    Raises:
        RecipeError: the tokenizers differ, or the teacher is no single model at hand.
    """
    if not hasattr(teacher, "embeddings"):
        raise RecipeError(
            FIELD, "'embeddings' needs a single model as teacher, not a cache or an ensemble"
        )
    if teacher.vocabulary != student.vocabulary:
        raise RecipeError(
            FIELD,
            "'embeddings' needs one tokenizer for both models: the teacher has no embeddings of "
            "the student's tokens; use 'bytes', or a table of your own",
        )
    directions = torch.nn.functional.normalize(teacher.embeddings().float(), dim=-1)
    return EmbeddingCosts(directions.to(student.embeddings().device))


def table_costs(path: str, teacher: int, student: int, device: torch.device) -> Pricing:
    """Costs from a file: `cost` [w, v], and for a debiased loss `teacher` [w, w], `student` [v, v].

    Raises:
        RecipeError: there is no such file, or what it holds cannot be a cost.
    """
    try:
        tables = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(FIELD, f"cannot read {str(Path(path))!r}: {error}") from None
    if "cost" not in tables:
        held = ", ".join(sorted(tables)) or "nothing"
        raise RecipeError(FIELD, f"{path!r} has no tensor 'cost'; it has {held}")
    cost = tables["cost"]
    _check(cost, (teacher, student), f"{FIELD}: tensor 'cost'")
    if bool((cost == cost[:, :1]).all()):
        raise RecipeError(
            FIELD,
            "tensor 'cost' is the same for all of the student's tokens, so that no student is "
            "better than another; it must differ within its rows",
        )
    own = {name: tables[name] for name in ("teacher", "student") if name in tables}
    if len(own) == 1:
        raise RecipeError(FIELD, f"{path!r} has {list(own)[0]!r} but not the other side's table")
    for (name, table), width in zip(list(own.items()), (teacher, student), strict=False):
        _check(table, (width, width), f"{FIELD}: tensor {name!r}")
        rounding = 1e-5 * float(table.max())
        if bool(((table - table.T).abs() > rounding).any() or (table.diagonal() > rounding).any()):
            raise RecipeError(FIELD, f"tensor {name!r} must be symmetric with a zero diagonal")
        own[name] = ((table + table.T) / 2).fill_diagonal_(0.0)
    return TableCosts(
        between=cost.to(device),
        teacher=own["teacher"].to(device) if own else None,
        student=own["student"].to(device) if own else None,
        rest=float(cost.max()),
    )


def _check(table: Tensor, shape: tuple[int, int], field: str) -> None:
    if tuple(table.shape) != shape:
        raise RecipeError(
            field, f"must be {list(shape)}, [from tokens, to tokens]; it is {list(table.shape)}"
        )
    if not table.is_floating_point():
        raise RecipeError(field, f"must hold floating-point numbers; it is {table.dtype}")
    if not bool(table.isfinite().all()):
        raise RecipeError(field, "has entries that are NaN or infinite")
    if bool((table < 0).any()):
        raise RecipeError(field, f"must not be negative; its least entry is {float(table.min())}")


def _apart(first: Tensor, second: Tensor) -> Tensor:
    return (1 - first @ second.mT).clamp(min=0.0)


def _zero_diagonal(cost: Tensor) -> Tensor:
    same = torch.eye(cost.shape[-1], dtype=torch.bool, device=cost.device)
    return ((cost + cost.mT) / 2).masked_fill(same, 0.0)
