"""Compares mathematics with math-verify, in a process that may be killed; see `math_pool`.

Reads a line of JSON and writes one. Run as a file of its own, so that it starts without limbeck.
"""

import json
import logging
import math
import sys
from typing import Any

MEMORY_BYTES = 4 << 30
"""Address space of the process: a power tower must not take the machine's."""


def answer(question: dict[str, Any]) -> dict[str, str]:
    """What math-verify finds: `verdict`, and what it `found` in the text, or the `reason`."""
    from math_verify import parse, verify

    # Its own time limits are off: they work in one thread alone, and not against all that hangs.
    gold = parse(question["gold"], parsing_timeout=0)
    if not gold:
        return {"verdict": "unclear", "reason": "the known answer is no mathematics"}
    found = parse(question["text"], parsing_timeout=0)
    if not found:
        return {"verdict": "unclear", "reason": "it has no mathematics"}
    finer = max(_smallness(gold[0]), _smallness(found[0]))
    # Not symmetric: the known answer is first.
    right = verify(
        gold, found, float_rounding=6 + finer, numeric_precision=15 + finer, timeout_seconds=0
    )
    return {"verdict": "right" if right else "wrong", "found": str(found[-1])}


def _smallness(value: Any) -> int:
    """By how many decimals a number is smaller than a thousandth; 0 for all else.

    math-verify rounds to six decimals. A smaller number needs as many more for four of its own.
    """
    try:
        return max(0, -3 - math.floor(math.log10(abs(float(value)))))
    except Exception:  # 0, infinity, an unknown, a set, a text
        return 0


def limit(seconds: float) -> None:
    """Have the system end this process after so long; the caller may be gone by then."""
    try:
        import signal

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds))
    except (ImportError, AttributeError):  # not on this system
        return


def main() -> None:
    """Answer until there are no more questions."""
    said, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    logging.disable()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass
    try:
        import math_verify  # noqa: F401

        reply: dict[str, str] = {"ready": "yes"}
    except ImportError as error:
        reply = {"missing": str(error)}
    print(json.dumps(reply), file=said, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        limit(question["seconds"] + 1)
        try:
            reply = answer(question)
        except Exception as error:  # a parser of free text may fail in any way
            reply = {
                "verdict": "unclear",
                "reason": f"it cannot be compared: {type(error).__name__}",
            }
        limit(0)
        print(json.dumps(reply), file=said, flush=True)


if __name__ == "__main__":
    main()
