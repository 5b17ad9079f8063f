"""Many processes that train one model together: how they find each other, agree, and end.

For: one answer for all processes, at the same update. One alone passes through without a wait. Not
for: which part of an array or a batch is whose (`nn/mesh.py`).

Every process runs the same program and comes to the same exchanges in the same order. So whatever
differs between them (a signal, a clock, a file, an error) is exchanged before it decides anything.
Devices are at rest meanwhile: on CPUs two programs that communicate at once mix their messages.
"""

import contextlib
import glob
import importlib.util
import itertools
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


def cluster(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several: "TPU", "SLURM" or "Kubernetes", else None.

    A TPU host may be one of a slice of hosts; which one, jax asks the machine.
    """
    devices = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    tpu = "tpu" in environment.get("JAX_PLATFORMS", "tpu")
    if tpu and devices and importlib.util.find_spec("libtpu"):
        return "TPU"
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "SLURM"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def define_flags() -> Callable[[], None]:
    """Defines a command's flags for `join`, and returns the call of it with their values."""
    given: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if no cluster tells it."),
        flags.DEFINE_integer("processes", None, "How many there are; 1: alone, also in a cluster."),
        flags.DEFINE_integer("process", None, "Which of them this one is, from 0."),
        flags.DEFINE_float("join_minutes", 5.0, "How long to wait for others.", lower_bound=0.01),
        flags.DEFINE_integer(
            "lost_seconds", 100, "Silence after which one is lost.", lower_bound=5
        ),
    ]
    return lambda: join(*(flag.value for flag in given))


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    minutes: float = 5,
    lost: int = 100,
) -> None:
    """Finds the other processes of this run; called before anything asks jax for devices.

    `coordinator` is HOST:PORT of process 0. All three None: what `cluster` says, or alone;
    `processes` 1: alone. Where the others have not come after so many minutes, the process ends
    with a message. From then on a process that gives no sign of life for `lost` seconds ends all
    others, and all but the first are silent on stdout. Raises UserError for flags that contradict
    each other, and where jax cannot find the others.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    by_cluster = len(missing) == len(given)
    if processes == 1 or (by_cluster and not cluster(os.environ)):
        return
    if missing and not by_cluster:
        wants = f"all of {', '.join(given)}, or none of them"
        raise UserError(f"{', '.join(missing)} must be given too: {wants}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process={process}: must be from 0 to --processes - 1 = {processes - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        wants = "HOST:PORT of process 0, for instance host0:1234"
        raise UserError(f"--coordinator={coordinator!r}: must be {wants}")
    found = f"process {process} of {processes}, coordinator {coordinator}"
    if by_cluster:
        found = f"{cluster(os.environ)} says"
    others = {None: "one of them", 0: "one or more of the others"}
    missed = others.get(process, f"process 0 at {coordinator}, or another,")
    late = (
        "the processes of this run did not come together within "
        f"--join_minutes={minutes:g} ({found}): {missed} is missing; check that the same command "
        "was started on every host, that each can reach the coordinator's port, and that no "
        "process of an earlier start still runs"
    )
    about = f"({found}), at most {minutes:g} minutes"
    print(f"waiting for all processes of this run {about}", flush=True)
    deadline = threading.Timer(60 * minutes, _end, [late])  # jax's own aborts, and says less
    deadline.daemon = True
    deadline.start()
    try:
        # It would take SIGTERM from `preemption.py`.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if by_cluster else "deactivate",
            heartbeat_timeout_seconds=lost,
            initialization_timeout=round(60 * minutes) + 60,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run cannot find each other ({found}): {error}; give "
            "--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to train alone"
        ) from error
    finally:
        deadline.cancel()
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def first() -> bool:
    """Whether this is the process that writes and prints."""
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
    received = zip(messages, sizes, strict=True)
    return [json.loads(bytes(sent[:size]).decode()) for sent, size in received]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block in which a UserError of any process is raised in all of them."""
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
    """Raises UserError in each process where not all have the same values."""
    everyone = exchange(values)
    for name, (process, theirs) in itertools.product(values, enumerate(everyone)):
        if theirs[name] != everyone[0][name]:
            wants = "give all of them the same"
            raise UserError(f"process {process} has another {name} than process 0: {wants}")


def ballots(mesh: Mesh, *votes: bool) -> jax.Array | None:
    """This process's votes, a row for each of its devices: [devices, votes] bool; None if alone.

    A jitted function counts them by `tally`: a question rides on work that all do anyway.
    """
    if jax.process_count() == 1:
        return None
    by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))
    shape = (mesh.size, len(votes))
    return jax.make_array_from_callback(shape, by_device, lambda _: np.array([votes]))


def tally(cast: jax.Array | None) -> tuple[jax.Array, ...]:
    """For each question whether any process voted for it; () where there is one process."""
    return () if cast is None else tuple(cast.any(axis=0))


def leave(error: BaseException) -> None:
    """Ends this process at once for an error that the others do not share, so that they end too.

    The usual way out would wait for them, and they for this one. One process alone returns.
    """
    if jax.distributed.is_initialized():
        who = f"process {jax.process_index()} of {jax.process_count()}"
        told = str(error) or type(error).__name__
        _end(f"{who} failed, or lost another one, whose message then says more: {told}")


def _end(message: str) -> None:
    say(message)
    os._exit(1)
