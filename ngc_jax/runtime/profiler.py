"""A trace of some updates of a run: where time goes, on the host and on the devices.

For: `train.profile`. Not for: reading a trace (`pip install xprof; xprof --port=8791 DIR/profile`).
"""

from typing import Any

import jax

from ngc_jax.runtime import multihost
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import Path, in_bucket


def traceable(updates: str) -> bool:
    """Whether this names updates to trace: "first:last" with 1 <= first <= last, or "" for none."""
    first, _, last = updates.partition(":")
    return not updates or (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last))


class Profile:
    """Traces updates "first:last" ("": none) of the first process; `home` must be in no bucket."""

    def __init__(self, updates: str, home: Path):
        if updates and in_bucket(home):
            raise UserError(f"train.profile={updates!r}: must be '' where {home} is in a bucket")
        traced = updates if updates and multihost.first() else "1:0"
        self._first, self._last = map(int, traced.split(":"))
        self._home, self._tracing = home, False

    def turn(self, step: int, state: Any) -> None:
        """Begins or ends the trace where it is due after `step` updates, which made `state`."""
        wanted = self._first - 1 <= step < self._last
        if wanted != self._tracing:
            jax.block_until_ready(state)
            if wanted:
                jax.profiler.start_trace(str(self._home))
            else:
                jax.profiler.stop_trace()
            self._tracing = wanted

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self.turn(self._last, None)
