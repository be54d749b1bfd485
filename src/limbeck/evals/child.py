"""What a process of ours is told of the surroundings."""

import os

KEPT = (
    *("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL"),
    *("SYSTEMROOT", "TEMP", "TMP", "TMPDIR"),
)


def bare_environment() -> dict[str, str]:
    """What Python needs of the environment to start, and nothing else: no key is handed on."""
    return {name: os.environ[name] for name in KEPT if name in os.environ}
