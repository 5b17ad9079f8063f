"""When a loop that is run until it settles has settled: light, so that --help need not wait.

For: the numbers. Not for: the rounds (`nn/decoder.py`), or evaluation with them (`evaluation.py`).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settled:
    """Rounds until none moves a token's state by more than `tolerance` of its length."""

    tolerance: float = 0.01
    cap: int = 64  # rounds at most
