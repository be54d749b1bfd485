"""`limbeck mock-teacher`: serve until Ctrl-C."""

import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Writer
from limbeck.core.specs import LocalTeacher
from limbeck.teachers.mock.faults import Faults
from limbeck.teachers.mock.http import MockTeacher
from limbeck.teachers.mock.minds import Canned

LONGEST_TEXT = 4096
"""Tokens that a served model reads."""


def serve(
    *,
    folder: Path | None,
    demo: bool,
    faults: Mapping[str, Any],
    port: int,
    latency_seconds: float,
    requests_per_minute: int | None,
    log_path: Path | None,
) -> None:
    """Serve until it is interrupted.

    Raises:
        RecipeError: the settings do not fit, or the port is taken.
    """
    if folder is not None and demo:
        raise RecipeError("--model", "and --demo are two models; give one")
    if "kinds" in faults and not faults.get("rate"):
        raise RecipeError("--faults", "happen at a rate; give one, such as --fault-rate 0.3")
    try:
        wrong = Faults(**faults)
    except ValueError as error:
        raise RecipeError("--faults", str(error)) from None
    mind: Any = Canned(wrong.seed)
    if folder is not None or demo:
        mind = _writer(folder)
    try:
        mock = MockTeacher(
            mind,
            faults=wrong,
            port=port,
            latency_seconds=latency_seconds,
            requests_per_minute=requests_per_minute,
            log_path=log_path,
        )
    except OSError as error:
        raise RecipeError("--log", f"{log_path}: {error.strerror}") from None
    ended = threading.Event()
    with mock:
        # Said here, because what a script starts in the background inherits an ignored Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        print(introduction(mock.url, chat=getattr(mock.mind, "chats", True)), flush=True)
        ended.wait()
        print(f"\n{len(mock.requests):,} requests were answered", flush=True)


def introduction(url: str, *, chat: bool = True) -> str:
    """How to try it: by hand, and from a recipe."""
    asks = '"messages": [{"role": "user", "content": "Hello"}]' if chat else '"prompt": "Hello"'
    path, api = ("chat/completions", "") if chat else ("completions", ", api: completions")
    body = f'{{"model": "mock-1", {asks}}}'
    return "\n".join(
        [
            f"serving at {url}; Ctrl-C ends it",
            f"  curl {url}/{path} -H 'content-type: application/json' -d '{body}'",
            "in a recipe:",
            "  teachers:",
            f"    api: {{kind: server, url: '{url}', model: mock-1{api}}}",
        ]
    )


def _writer(folder: Path | None) -> Writer:
    """A model as a writer: the embedded teacher where no folder is given."""
    import torch

    from limbeck.demo import model_path
    from limbeck.models.load import load_teacher
    from limbeck.teachers.local import LocalWriter

    name = str(folder or model_path("teacher"))
    spec = LocalTeacher(name=name)
    return LocalWriter(load_teacher(spec, torch.device("cpu"), LONGEST_TEXT), "mock-1")
