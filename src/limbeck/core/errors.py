"""The errors a user can meet. Each says what is wrong, where, and what to do about it.

Every error is a `LimbeckError` and also the built-in error it resembles, so `except ValueError`
keeps working for those who do not know limbeck.
"""

from limbeck.core.text import one_line


class LimbeckError(Exception):
    """Root of all errors that limbeck raises on purpose."""


class RecipeError(LimbeckError, ValueError):
    """A recipe or an argument is wrong; the command line answers with exit code 2.

    Args:
        field: dotted path of the field, such as `terms.0.objective.beta`; empty for the whole.
        reason: what is wrong with it and what would be right.
        file: the recipe's file, when there is one.
        line: line in that file, counted from 1.
    """

    def __init__(
        self, field: str, reason: str, file: str | None = None, line: int | None = None
    ) -> None:
        super().__init__(field, reason, file, line)  # all of them, so that it survives pickling
        self.field, self.reason, self.file, self.line = field, reason, file, line

    def __str__(self) -> str:
        place = f"{self.file}:{self.line or 1}: " if self.file else ""
        text = f"{place}{self.field}: {self.reason}" if self.field else f"{place}{self.reason}"
        return one_line(text)  # a key may hold a line break; an error is one line


class DataError(LimbeckError, ValueError):
    """Training or evaluation data cannot be read or holds nothing to learn."""


class ModelError(LimbeckError, ValueError):
    """A model folder is missing, unsafe or does not fit."""


class CheckpointError(LimbeckError, OSError):
    """A checkpoint could not be written or none that verifies could be read."""


class CacheError(LimbeckError, OSError):
    """A teacher's cache is absent, of another teacher, damaged, or could not be written."""


class LedgerError(LimbeckError, OSError):
    """A ledger of requests is damaged, not one of ours, held by another, or the disk is full."""


class BudgetError(LimbeckError, RuntimeError):
    """What is about to be asked could cost more than is left of the budget; it was not asked.

    Args:
        account: whose budget it is.
        spent_usd: what its requests have cost.
        reserved_usd: the worst case of requests that are under way or whose cost is not known.
        asked_usd: the worst case of the request that was refused; None where no price is known.
        cap_usd: the budget.
    """

    def __init__(
        self,
        account: str,
        spent_usd: float,
        reserved_usd: float,
        asked_usd: float | None,
        cap_usd: float,
    ) -> None:
        super().__init__(account, spent_usd, reserved_usd, asked_usd, cap_usd)
        self.account, self.cap_usd = account, cap_usd
        self.spent_usd, self.reserved_usd, self.asked_usd = spent_usd, reserved_usd, asked_usd

    def __str__(self) -> str:
        if self.asked_usd is None:
            return (
                f"{self.account}: the worst case of a request has no known price, so the budget of"
                f" ${self.cap_usd:.6g} cannot be kept; give price.input and price.output"
            )
        return (
            f"{self.account}: the budget of ${self.cap_usd:.6g} is used up: spent"
            f" ${self.spent_usd:.6g}, reserved ${self.reserved_usd:.6g}, and the next request could"
            f" cost ${self.asked_usd:.6g}; raise budget_usd or lower max_tokens and start again"
            " (what was answered is kept)"
        )


class ServerError(LimbeckError, ConnectionError):
    """A teacher's server refuses to work with us at all: no key, no such model, no money left."""


class DivergedError(LimbeckError, ArithmeticError):
    """Loss or gradient stayed non-finite; training stopped at the last good state."""


class Interrupted(LimbeckError, InterruptedError):
    """The user stopped the run; a checkpoint was written."""
