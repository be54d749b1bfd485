"""When the steps of a trainer end, whoever made it, and what its student reads and writes."""

import multiprocessing
import time
from typing import Any

from measure import private_bytes


class Clock:
    """When each step ended, by wall and by processor, and what the student read and wrote in it.

    It writes where no gradient is kept, a token for each line that passes its embedding, and reads
    everywhere else. `writing` is the time from the first token that is written until the student,
    or a teacher, reads: with the choice of tokens, and what is made of them. `beside_bytes` is the
    memory that processes of this one's have for themselves as the last step of the warm-up ends.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.beside_bytes = warm_up, 0
        self.times: list[float] = []
        self.processor_times: list[float] = []
        self.positions: list[int] = [0]
        self.written: list[int] = [0]
        self.writing: list[float] = [0.0]
        self._began: float | None = None

    def watch(self, student: Any, *teachers: Any) -> None:
        """Count what passes the student's embedding, and hear where a teacher begins to read."""
        import torch

        def count(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
            if torch.is_grad_enabled():
                self._read()
                self.positions[-1] += inputs[0].numel()
                return
            self._began = self._began or time.perf_counter()
            self.written[-1] += len(inputs[0])

        student.get_input_embeddings().register_forward_hook(count)
        for teacher in teachers:
            teacher.get_input_embeddings().register_forward_hook(lambda *_: self._read())

    def _read(self) -> None:
        if self._began is not None:
            self.writing[-1] += time.perf_counter() - self._began
            self._began = None

    def tick(self) -> None:
        """A step has ended, with all that belongs to it."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if len(self.times) + 1 == self.warm_up:
            children = multiprocessing.active_children()
            self.beside_bytes = sum(private_bytes(child.pid) for child in children)
        self.times.append(time.perf_counter())
        self.processor_times.append(time.process_time())
        self.positions.append(0)
        self.written.append(0)
        self.writing.append(0.0)
