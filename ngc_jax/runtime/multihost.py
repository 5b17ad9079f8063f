"""Many processes that train one model together: how they find each other, agree, and end.

For: joining by flags or by what the cluster says, one process's word for all, and decisions that
all take at the same update. Not for: which part of an array or a batch is whose (`mesh.py`).

Every process runs the same program and must come to the same exchanges in the same order; so
whatever differs between them (a signal, a clock, a file, an error) is exchanged before it decides
anything. Devices must be at rest for an exchange: on CPUs two programs that communicate at once
take each other's messages. One process alone passes through all of this without a wait.
"""

import contextlib
import glob
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ngc_jax.runtime.errors import UserError, say

CHECK = (
    "check that the same command was started on every host, that each can reach the coordinator's port, and that "
    "no process of an earlier start still runs"
)


def cluster(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several: "TPU", "SLURM", "Kubernetes"; None where it
    is alone.

    A TPU host may be one of a slice of hosts: which, jax asks the machine.
    """
    tpu = importlib.util.find_spec("libtpu") and (
        glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    )
    if tpu and "tpu" in environment.get("JAX_PLATFORMS", "tpu"):
        return "TPU"
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "SLURM"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def define_flags() -> Callable[[], None]:
    """Define a command's flags for `join`; what is returned calls it with their values."""
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where the cluster does not tell."
    )
    processes = flags.DEFINE_integer(
        "processes", None, "How many processes there are; 1: alone, whatever the cluster."
    )
    process = flags.DEFINE_integer("process", None, "Which of them this one is, from 0.")
    minutes = flags.DEFINE_float(
        "join_minutes", 5.0, "How long to wait for the others to start.", lower_bound=0.01
    )
    lost = flags.DEFINE_integer(
        "lost_seconds", 100, "After how long without a sign one is lost.", lower_bound=5
    )
    return lambda: join(
        coordinator.value, processes.value, process.value, minutes.value, lost.value
    )


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    minutes: float = 5,
    lost: int = 100,
) -> None:
    """Find the other processes of this run; before anything asks jax for devices.

    `coordinator` is HOST:PORT of process 0. All three None: what `cluster` says, or alone;
    `processes` 1: alone. Raises UserError for flags that make no sense and where jax cannot find
    the others; ends the process with a message where they have not come after so many minutes. From
    then on one that gives no sign of life for `lost` seconds ends all the others, and all but the
    first are silent on stdout.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if processes == 1 or (len(missing) == len(given) and not cluster(os.environ)):
        return
    if missing and len(missing) < len(given):
        raise UserError(
            f"{', '.join(missing)} must be given too: all of {', '.join(given)}, or none of them"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process={process}: must be from 0 to --processes - 1 = {processes - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(
            f"--coordinator={coordinator!r}: must be HOST:PORT of process 0, for instance host0:1234"
        )
    found = (
        f"{cluster(os.environ)} says"
        if missing
        else f"process {process} of {processes}, coordinator {coordinator}"
    )

    def give_up() -> None:
        waited = f"the processes of this run did not come together within --join_minutes={minutes:g} ({found})"
        missed = (
            "one or more of the others"
            if process == 0
            else f"process 0 at {coordinator}, or another,"
        )
        _end(f"{waited}: {missed if process is not None else 'one of them'} is missing; {CHECK}")

    print(
        f"waiting for all processes of this run ({found}), at most {minutes:g} minutes", flush=True
    )
    deadline = threading.Timer(60 * minutes, give_up)  # jax's own deadline aborts, and says less
    deadline.daemon = True
    deadline.start()
    try:
        # it would take SIGTERM from `preemption.py`
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if missing else "deactivate",
            heartbeat_timeout_seconds=lost,
            initialization_timeout=round(60 * minutes) + 60,
        )
    except (ValueError, RuntimeError) as error:
        remedy = "give --coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to train alone"
        raise UserError(
            f"the processes of this run cannot find each other ({found}): {error}; {remedy}"
        ) from error
    finally:
        deadline.cancel()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """What each process has passed here, a JSON value, by process."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(message)))
    filled = np.zeros(sizes.max(), np.uint8)
    filled[: len(message)] = message
    messages = multihost_utils.process_allgather(filled)
    return [json.loads(bytes(sent[:size])) for sent, size in zip(messages, sizes, strict=True)]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What one process refuses, all refuse: a UserError raised in here by any of them is raised in
    each.
    """
    refused = None
    try:
        yield
    except UserError as error:
        refused = error
    for process, refusal in enumerate(exchange(refused and str(refused))):
        if refused:
            raise refused
        if refusal:
            raise UserError(f"process {process}: {refusal}")


def same(**values: str) -> None:
    """Raise UserError in each process where not all have the same values."""
    everyone = exchange(values)
    for name in values:
        others = [
            process for process, theirs in enumerate(everyone) if theirs[name] != everyone[0][name]
        ]
        if others:
            raise UserError(
                f"process {others[0]} has another {name} than process 0: give all of them the same"
            )


def ballots(mesh: Mesh, *votes: bool) -> jax.Array | None:
    """This process's votes, a row for each of its devices, [devices, votes] bool, to be counted by
    a jitted function.

    So a question rides on work that all do anyway, and nobody waits for the answer. None where
    there is one process.
    """
    if jax.process_count() == 1:
        return None
    lies = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))
    return jax.make_array_from_callback((mesh.size, len(votes)), lies, lambda _: np.array([votes]))


def tally(cast: jax.Array | None) -> tuple[jax.Array, ...]:
    """For each question whether any process voted for it; () where there is one process."""
    return () if cast is None else tuple(cast.any(axis=0))


def leave(error: BaseException) -> None:
    """End this process at once for an error that the others do not share, so that they end as well;
    alone, return.

    The usual way out would wait for them, and they would wait for this one.
    """
    if jax.distributed.is_initialized():
        place = f"process {jax.process_index()} of {jax.process_count()}"
        _end(
            f"{place} failed, or lost another one, whose message then says more: {error or type(error).__name__}"
        )


def _end(message: str) -> None:
    say(message)
    os._exit(1)
