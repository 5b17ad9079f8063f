"""Being asked to stop: SIGTERM (a scheduler) and the first Ctrl-C set a flag that the loop reads
between updates and between the batches of an evaluation.

For: one process. Not for: stopping many at the same update (`processes.py`), or hangs
(`watchdog.py`).
"""

import signal
from types import FrameType, TracebackType
from typing import Any

# "try again later" (sysexits.h): a scheduler can tell it from success (0) and failure
EXIT_CODE = 75


class Asked(Exception):
    """Raised in the midst of something long, to abandon it."""


class Preemption:
    """`with Preemption() as asked: ... if asked: save and leave`. A second Ctrl-C interrupts at
    once.
    """

    def __enter__(self) -> "Preemption":
        self._asked = False
        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
