"""What a measurement was made on: machine, versions, date.

    python benchmarks/environment.py

prints it as JSON; the other scripts store it beside their figures.
"""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "limbeck")

PEERS = ("trl", "liger-kernel")

REPOSITORY = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Date, processor, GPU, memory, and the versions of what is measured (null: not there)."""
    return {
        "date": now(),
        "processor": processor(),
        "gpu": gpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes("MemTotal") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "limbeck_commit": commit(),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def load() -> float:
    """How many processes wanted a core in the last minute; a quiet machine says 0 to 1."""
    return round(os.getloadavg()[0], 2)


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo, such as `MemTotal` or `MemAvailable`."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def processor() -> str:
    """The processor's name, and the units for matrix products in low precision that it has."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    units = [u for u in ("avx512f", "avx512_bf16", "amx_bf16") if u in fields.get("flags", "")]
    return f"{fields.get('model name', platform.processor())} ({', '.join(units) or 'no avx512'})"


def gpu() -> str | None:
    """The first GPU's name, as its driver says it; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(said.splitlines()), None)


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def destination(asked: Path | None, usual: Path) -> Path | None:
    """Where figures go: as asked, or the usual place if every peer is here, or nowhere (None).

    Figures with the peers must not be lost to a run under a Python that has none.
    """
    missing = [name for name in PEERS if installed(name) is None]
    if asked is None and missing:
        print(f"not written without {' and '.join(missing)}; give --out to write it all the same")
        return None
    return asked or usual


def commit() -> str | None:
    """The commit of this checkout, with a `+` where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps(environment(), indent=2))
