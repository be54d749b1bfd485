"""What tests of real servers share."""

import os
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

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
