"""What tests of servers share."""

import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from contextlib import closing, contextmanager

import pytest

PATIENCE_SECONDS = 300


@pytest.fixture(scope="session")
def serving():
    """Runs a command as a server on this machine: (command, folder, environment) -> its URL."""

    @contextmanager
    def start(command, folder, **environment):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        with (folder / "log").open("w") as log:
            child = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
            )
        try:
            until = time.monotonic() + PATIENCE_SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    said = (folder / "log").read_text()[-3000:]
                    assert child.poll() is None, said
                    assert time.monotonic() < until, said
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    return start


@pytest.fixture
def ctrl_c():
    """Presses Ctrl-C; any thread may call it."""
    # A shell that runs in the background has its children ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ends(tmp_path):
    """How the requests in the ledger ended that were not the probe's, in their order."""

    def read():
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
            asked = "SELECT state FROM requests WHERE request NOT LIKE '% the sea.%' ORDER BY id"
            return [state for (state,) in ledger.execute(asked)]

    return read
