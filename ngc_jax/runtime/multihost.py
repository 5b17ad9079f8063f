"""Many processes that train one model together: how they find each other, agree, and end.

For: exchanging what differs (a signal, a clock, a file, an error) before it decides anything, in
the same order in all; devices are at rest meanwhile, since on CPUs two programs at once mix their
messages. Not for: whose a part of a batch is (`nn/mesh.py`).
"""

import contextlib
import glob
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ngc_jax.runtime import output
from ngc_jax.runtime.errors import UserError, end, end_soon


def cluster(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several: "TPU", "SLURM", "Kubernetes" or None."""
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
    integer, lost = flags.DEFINE_integer, "Silence after which one is lost."
    given: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if no cluster tells it."),
        integer("processes", None, "How many there are; 1: alone, also in a cluster."),
        integer("process", None, "Which of them this one is, from 0."),
        flags.DEFINE_float("join_minutes", 5.0, "How long to wait for others.", lower_bound=0.01),
        integer("lost_seconds", 100, lost, lower_bound=5, upper_bound=10**6),
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
    `processes` 1: alone. If the others have not come after so many minutes, the process ends with a
    message. Later one that gives no sign of life for `lost` seconds ends all. Only the first prints
    to stdout. Raises UserError for flags that contradict each other, and where jax finds no others.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    by_cluster = len(missing) == len(given)
    if processes == 1 or (by_cluster and not cluster(os.environ)):
        return
    if missing and not by_cluster:
        wants = f"must be given too: all of {', '.join(given)}, or none of them"
        raise UserError(f"{', '.join(missing)} {wants}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process={process}: must be from 0 to --processes - 1 = {processes - 1}")
    if not minutes <= 10**6:  # nor NaN
        raise UserError(f"--join_minutes={minutes:g}: must be at most 1,000,000, for instance 5")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        wants = "HOST:PORT of process 0, for instance host0:1234"
        raise UserError(f"--coordinator={coordinator!r}: must be {wants}")
    found = f"process {process} of {processes}, coordinator {coordinator}"
    found = f"{cluster(os.environ)} says" if by_cluster else found
    others = {None: "one of them", 0: "one or more of the others"}
    missed = others.get(process, f"process 0 at {coordinator}, or another,")
    late = (
        f"the processes of this run did not come together within --join_minutes={minutes:g} "
        f"({found}): {missed} is missing; check that the same command was started on every host, "
        "that each can reach the coordinator's port, and that no process of an earlier start runs"
    )
    every = "all processes of this run"
    print(f"waiting for {every} ({found}), at most {minutes:g} minutes", flush=True)
    deadline = end_soon(1, 60 * minutes, late)  # jax's own aborts, and says less
    how: dict[str, Any] = {"cluster_detection_method": None if by_cluster else "deactivate"}
    how |= {"heartbeat_timeout_seconds": lost, "initialization_timeout": round(60 * minutes) + 60}
    try:
        # It would take SIGTERM from `preemption.py`.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(coordinator, processes, process, **how)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run cannot find each other ({found}): {error}; give "
            "--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to train alone"
        ) from error
    finally:
        deadline.cancel()
    if not first():
        sys.stdout = output.nobody()


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
            other = f"another {name} than process 0: give all of them the same"
            raise UserError(f"process {process} has {other}")


def ballots(mesh: Mesh, *votes: bool) -> jax.Array | None:
    """This process's votes, a row for each of its devices, [devices, votes] bool; None if alone."""
    if jax.process_count() == 1:
        return None
    by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))
    shape = (mesh.size, len(votes))
    return jax.make_array_from_callback(shape, by_device, lambda _: np.array([votes]))


def tally(cast: jax.Array | None) -> tuple[jax.Array, ...]:
    """For each question whether any process voted for it; () where there is one process."""
    return () if cast is None else tuple(cast.any(axis=0))


def leave(error: BaseException) -> None:
    """Ends one of many processes at once for an error of its own: the usual way out would wait."""
    if jax.distributed.is_initialized():
        who = f"process {jax.process_index()} of {jax.process_count()}"
        told = str(error) or type(error).__name__
        end(1, f"{who} failed, or lost another one, whose message then says more: {told}")
