"""The errors a user can meet. Each says what is wrong, where, and what to do about it.

Every error is a `LimbeckError` and also the built-in error it resembles, so `except ValueError`
keeps working for those who do not know limbeck.
"""


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
        return " ".join(text.split())  # a key may hold a line break; an error is one line


class DataError(LimbeckError, ValueError):
    """Training or evaluation data cannot be read or holds nothing to learn."""


class ModelError(LimbeckError, ValueError):
    """A model folder is missing, unsafe or does not fit."""


class CheckpointError(LimbeckError, OSError):
    """A checkpoint could not be written or none that verifies could be read."""


class CacheError(LimbeckError, OSError):
    """A teacher's cache is absent, of another teacher, damaged, or could not be written."""


class DivergedError(LimbeckError, ArithmeticError):
    """Loss or gradient stayed non-finite; training stopped at the last good state."""


class Interrupted(LimbeckError, InterruptedError):
    """The user stopped the run; a checkpoint was written."""
