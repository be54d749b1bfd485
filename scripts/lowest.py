"""The lowest versions that `pyproject.toml` allows, as constraints for pip: see `make lowest`."""

import tomllib
from pathlib import Path

EXTRAS = ("align", "api", "synth")
"""Those that can be installed anywhere; what only tests need may be of any version."""


def main() -> None:
    """Print a line for each package that limbeck imports."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *(bound for name in EXTRAS for bound in extras[name])]
    print("\n".join(sorted({bound.replace(">=", "==") for bound in bounds})))


if __name__ == "__main__":
    main()
