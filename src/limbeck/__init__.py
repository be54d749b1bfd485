"""limbeck distils large language models into small ones, and says honestly what was kept.

import limbeck
report = limbeck.distill(
    student={"from": "teacher", "layers": [0, 4, 8, 12]},
    teacher="path/to/big",
    data="rows.jsonl",
    out="runs/first",
)
print(report.to_markdown())
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck import losses, objectives
    from limbeck.api import distill, run
    from limbeck.core.errors import LimbeckError
    from limbeck.recipe.report import Report
    from limbeck.recipe.schema import Recipe, Term

__version__ = metadata.version("limbeck")
__all__ = ["LimbeckError", "Recipe", "Report", "Term", "distill", "losses", "objectives", "run"]

_HOMES = {
    "LimbeckError": "limbeck.core.errors",
    "Recipe": "limbeck.recipe.schema",
    "Report": "limbeck.recipe.report",
    "Term": "limbeck.recipe.schema",
    "distill": "limbeck.api",
    "run": "limbeck.api",
}


def __getattr__(name: str) -> Any:
    """Public names are found when first used, so `limbeck --help` need not load torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("losses", "objectives"):
        return import_module(f"limbeck.{name}")
    raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
