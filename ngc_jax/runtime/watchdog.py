"""A watch over a run that may hang: where nothing finishes for too long, it prints all stacks.

For: a device, disk or partner that never answers. Not for: being asked to stop (`preemption.py`).
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from datetime import datetime

from ngc_jax.runtime.files import Path, no_follow

EXIT_CODE = 4


class Watchdog:
    """`with Watchdog(minutes, leave, report) as watchdog: ... watchdog.beat()` after each thing.

    After `minutes` (0: never) without a beat all stacks go to stderr and to the end of the file
    `report`, once for each hang. With `leave` the process then ends with EXIT_CODE.
    """

    def __init__(self, minutes: float, leave: bool, report: Path):
        self._seconds, self._leave, self._report = 60 * minutes, leave, report
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Notes that something has finished."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        told = 0.0  # the beat after which a hang was reported
        while not self._over.wait(max(0.01, min(1.0, self._seconds / 4))):
            if (last := self._last) != told and time.monotonic() - last > self._seconds:
                told = last
                self._tell()
                if self._leave:
                    os._exit(EXIT_CODE)

    def _tell(self) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        hung = f"nothing has finished for {self._seconds / 60:g} minutes"
        told = f"\n{now}: {hung}; where every thread stands:\n"
        with contextlib.suppress(OSError):  # the terminal is gone
            sys.stderr.write(told)
            sys.stderr.flush()
            faulthandler.dump_traceback(2)
        # A full disk may be what hangs.
        with (
            contextlib.suppress(OSError),
            open(self._report, "a", encoding="utf-8", opener=no_follow) as file,
        ):
            file.write(told)
            file.flush()
            faulthandler.dump_traceback(file)
