"""When the steps of a trainer end, whoever made it, and what its student reads and writes."""

import time
from typing import Any


class Clock:
    """When each step ended, by wall and by processor, and what the student read and wrote in it.

    It writes where no gradient is kept, a token for each line that passes its embedding, and reads
    everywhere else. `writing` is the time from the first token that is written until the student,
    or a teacher, reads: with the choice of tokens, and what is made of them.
    """

    def __init__(self) -> None:
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
        self.times.append(time.perf_counter())
        self.processor_times.append(time.process_time())
        self.positions.append(0)
        self.written.append(0)
        self.writing.append(0.0)
