"""What `chaos.py` does to a training run: one function a fault; and the run itself.

For: a seeded random instant, the fault, and one line that says what was done. A fault returns ""
where the run had ended before. Not for: what must hold afterwards (`chaos.py`).
"""

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ngc_jax.runtime.checkpoint import MANIFEST
from ngc_jax.runtime.files import sha256

ROOT = pathlib.Path(__file__).parent.parent
Path = pathlib.Path
GONE, HUNG = 10, 300  # seconds from the last line to the end; without a line at all
TELLS = 15  # seconds without a sign after which one of several processes counts as lost


class Running:
    """A run of one or several processes: what they say, and when."""

    def __init__(self, flags: list[str], workdir: Path, processes: int = 1):
        line = [sys.executable, "launch.py", *flags, f"--workdir={workdir}"]
        together: list[list[str]] = [[]]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            group = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
            group.append(f"--lost_seconds={TELLS}")
            together = [[*group, f"--process={process}"] for process in range(processes)]
        self.workdir, self.began, self.last = workdir, threading.Event(), time.monotonic()
        self.first = self.last  # when the first update was told
        self.errors: list[list[str]] = [[] for _ in together]
        self.unsaved = 0  # saves that failed
        self.processes = [
            subprocess.Popen(
                [*line, *more],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for more in together
        ]
        self._readers = []
        for process, errors in zip(self.processes, self.errors, strict=True):
            for stream, kept in ((process.stdout, None), (process.stderr, errors)):
                reader = threading.Thread(target=self._read, args=(stream, kept), daemon=True)
                self._readers.append(reader)
                reader.start()

    def _read(self, stream: Iterator[str], kept: list[str] | None) -> None:
        for line in stream:
            self.last = time.monotonic()
            if line.startswith("step ") and not self.began.is_set():
                self.first = self.last
                self.began.set()
            self.unsaved += "NOT SAVED" in line
            if kept is not None:
                kept.append(line.rstrip())
        self.began.set()

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def sleep(self, most: float, chance: random.Random) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[0].wait(chance.uniform(0, most))

    def send(self, number: int, chance: random.Random) -> bool:
        """Sends a signal to one of the processes; False if the run has ended."""
        if self.alive:
            chance.choice(self.processes).send_signal(number)
            return True
        return False

    def held(self) -> dict[str, int]:
        """Threads and open files of the first process; {} if it has ended."""
        home = Path(f"/proc/{self.processes[0].pid}")
        try:
            return {kind: len(os.listdir(home / kind)) for kind in ("task", "fd")}
        except OSError:
            return {}

    def end(self, ends: set[int]) -> int:
        """Waits for all processes; returns the first one's exit code.

        Raises RuntimeError for what must not be: see the list at the top of this file.
        """
        ended = None  # when the first of them had
        for process in self.processes:
            while process.poll() is None:
                time.sleep(0.02)
                if ended is None and not self.alive:
                    ended = time.monotonic()
                silent = time.monotonic() - max(self.last, ended or 0)
                if silent > (HUNG if ended is None else GONE + 2 * TELLS):
                    process.kill()
                    raise RuntimeError(f"{self.workdir}: it did not end: {silent:.0f} s of silence")
        took = time.monotonic() - self.last
        for reader in self._readers:
            reader.join(GONE)
        for process, errors in zip(self.processes, self.errors, strict=True):
            code = process.returncode
            if code not in ends:
                raise RuntimeError(f"{self.workdir}: exit code {code}: " + "\n".join(errors))
            quiet = len(self.processes) > 1 or code < 0  # jax's own service says more
            if not quiet and (len(errors) > 1 or (errors and "Traceback" in errors[0])):
                raise RuntimeError(f"{self.workdir}: not one line, but:\n" + "\n".join(errors))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 0)
                raise RuntimeError(f"{self.workdir}: it left processes behind")
        if took > GONE and len(self.processes) == 1 and code >= 0:
            raise RuntimeError(f"{self.workdir}: it ended {took:.0f} s after its last line")
        return self.processes[0].returncode


class Fault:
    """What faults share: chance, how long runs take, and the places that they may use."""

    def __init__(self, seed: int, start_up: float, length: float, home: Path):
        self.chance, self.start_up, self.length = random.Random(seed), start_up, length
        self.outside = home / "outside"  # a place that no run was given
        self.outside.mkdir()
        self.left = contents(self.outside)  # what lies there
        self.home = home
        self.kept: Path | None = None  # a copy from before the newest fault
        self.copies, self.most = 0, 0  # the most threads or open files that a fault has added

    def instant(self, run: Running) -> None:
        """Waits for a random instant, sometimes one of start-up."""
        if self.chance.random() < 0.2:
            run.sleep(self.start_up, self.chance)
        else:
            self.training(run)

    def training(self, run: Running) -> None:
        """Waits for a random instant after the first update."""
        run.began.wait(HUNG)
        run.sleep(self.length, self.chance)

    def killed(self, run: Running) -> list[Path]:
        """Kills a run while it trains; its checkpoints, oldest first, or [] if it had ended."""
        self.training(run)
        if not run.send(signal.SIGKILL, self.chance):
            return []
        run.processes[0].wait()
        self.copies += 1  # two in turn: the one before may still be needed
        self.kept = self.home / f"kept{self.copies % 2}"
        remove(self.kept)
        copy(run.workdir, self.kept)
        steps = [p for p in (run.workdir / "checkpoints").glob("*") if p.name.isdecimal()]
        return sorted(steps, key=lambda path: int(path.name))

    def for_a_while(
        self, run: Running, begin: Callable[[], Any], finish: Callable[[], Any]
    ) -> bool:
        """Begins and ends a state of the machine; False if the run has ended before."""
        self.training(run)
        sealed = any(run.workdir.glob(f"checkpoints/*/{MANIFEST}"))  # so the savers' threads exist
        before = run.held() if sealed else {}
        if not run.alive:
            return False
        begin()
        run.sleep(self.length, self.chance)
        finish()
        run.sleep(1, self.chance)
        now = run.held()
        self.most = max(self.most, *(now[kind] - before[kind] for kind in now.keys() & before), 0)
        return True


def contents(place: Path) -> dict[str, str]:
    """What lies in a folder: name -> digest, or the target of a link."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else sha256(path)
        for path in sorted(place.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def copy(place: Path, to: Path) -> None:
    """Copies a folder but for its pipes, links as links."""

    def pipes(home: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(home, name).is_fifo()]

    shutil.copytree(place, to, symlinks=True, ignore=pipes)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kill(fault: Fault, run: Running) -> str:
    """SIGKILL at a random time, half of the times while a checkpoint is written."""
    checkpoints = run.workdir / "checkpoints"
    if fault.chance.random() < 0.5:
        fault.instant(run)
        return "killed" * run.send(signal.SIGKILL, fault.chance)
    while run.alive and not any("tmp" in path.name for path in checkpoints.glob("*")):
        time.sleep(0.0005)
    return "killed while a checkpoint was written" * run.send(signal.SIGKILL, fault.chance)


def stop(fault: Fault, run: Running) -> str:
    """SIGTERM at a random time."""
    fault.instant(run)
    return "asked to stop" * run.send(signal.SIGTERM, fault.chance)


def hang_up(fault: Fault, run: Running) -> str:
    """SIGHUP at a random time: the terminal is gone."""
    fault.instant(run)
    return "terminal lost" * run.send(signal.SIGHUP, fault.chance)


def interrupt(fault: Fault, run: Running) -> str:
    """Ctrl-C twice within half a second."""
    fault.training(run)
    if not run.send(signal.SIGINT, fault.chance):
        return ""
    run.sleep(0.5, fault.chance)
    return "Ctrl-C" + ", twice" * run.send(signal.SIGINT, fault.chance)


def damage(fault: Fault, run: Running) -> str:
    """SIGKILL, then a flipped byte, a cut or a removed file in the newest checkpoint."""
    if not (steps := fault.killed(run)):
        return ""
    file = fault.chance.choice(sorted(path for path in steps[-1].rglob("*") if path.is_file()))
    how = fault.chance.choice(["flipped", "cut", "removed"])
    data = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut" or not data:
        file.write_bytes(data[: len(data) // 2])
    else:
        data[fault.chance.randrange(len(data))] ^= 1 << fault.chance.randrange(8)
        file.write_bytes(data)
    return f"killed, and {file.relative_to(run.workdir)} was {how}"


def rename(fault: Fault, run: Running) -> str:
    """SIGKILL, then checkpoints under other names: swapped, renamed or copied."""
    if len(steps := fault.killed(run)) < 2:
        return ""
    older, newest = steps[-2:]
    later = newest.with_name(str(int(newest.name) + fault.chance.choice([1, 25, 1000])))
    match how := fault.chance.choice(["swapped", "renamed", "copied"]):
        case "swapped":
            aside = newest.rename(run.workdir / "aside")
            older.rename(newest)
            aside.rename(older)
        case "renamed":
            newest.rename(later)
        case "copied":
            shutil.copytree(older, later)
    return f"killed, and checkpoints {older.name}, {newest.name} were {how}"


def link(fault: Fault, run: Running) -> str:
    """SIGKILL, then a link out of the work directory, or a pipe, where a file or folder was."""
    if not (steps := fault.killed(run)):
        return ""
    newest, home = steps[-1], run.workdir
    places = [newest, newest / MANIFEST, home / "checkpoints", home / "damaged"]
    places += [home / name for name in ("metrics.jsonl", "config.json")]
    place = fault.chance.choice([*places, home / "checkpoints" / "999999"])
    how = fault.chance.choice(["link", "pipe", "link to /dev/zero"])
    if how == "link" or place in (home / "checkpoints", home / "damaged"):
        how, target = "link", fault.outside / place.name
        remove(target)
        if place.exists():
            shutil.move(place, target)
        else:
            target.mkdir()
        place.symlink_to(target)
    else:
        remove(place)
        os.mkfifo(place) if how == "pipe" else place.symlink_to("/dev/zero")
    fault.left = contents(fault.outside)
    return f"killed, and {place.relative_to(home)} was made a {how}"


def reseal(fault: Fault, run: Running) -> str:
    """SIGKILL, then other contents under a seal that holds."""
    if not (steps := fault.killed(run)):
        return ""
    newest, text = steps[-1], fault.chance.choice(["{}", "null", "[" * 100_000, "\0", "[1e999]"])
    files = [path for path in newest.rglob("*") if path.is_file() and b"{" in path.read_bytes()[:1]]
    file = fault.chance.choice(sorted(files))
    file.write_text(text, "utf-8")
    manifest = newest / MANIFEST
    if file != manifest and manifest.exists():  # a kill may have come before the seal
        seal = json.loads(manifest.read_text("utf-8"))
        del seal["sha256"]
        name = str(file.relative_to(newest))
        seal["files"][name] = sha256(file)
        manifest.write_text(json.dumps(seal), "utf-8")
    return f"killed, and {file.relative_to(run.workdir)} became {text[:8]!r}, sealed"


def rows(fault: Fault, run: Running) -> str:
    """SIGKILL, then rubbish at the end of the rows, or rows lost there."""
    if not fault.killed(run):
        return ""
    path = run.workdir / "metrics.jsonl"
    spoilt = [b"\n\n", b"{}\n", b"\0" * 4096, b"\xff\xfe\n", b'{"step": 1e999}\n', b"[" * 9999]
    more = fault.chance.choice([*spoilt, b""])
    whole = path.read_bytes()
    path.write_bytes(whole + more if more else whole[: -fault.chance.randrange(1, 40)])
    return f"killed, and the rows ended with {more[:8]!r}" if more else "killed, the rows were cut"


def fill(fault: Fault, run: Running) -> str:
    """No file can grow (RLIMIT_FSIZE) for a random time."""
    pid = run.processes[0].pid

    def limit(size: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    done = fault.for_a_while(run, lambda: limit(1), lambda: limit(resource.RLIM_INFINITY))
    return "no file could grow for a while" * done


def full(fault: Fault, run: Running) -> str:
    """The file system has no byte left for a random time."""
    return "the disk was full for a while" * _without(fault, run, "size", SIZE)


def inodes(fault: Fault, run: Running) -> str:
    """The file system has no inode left for a random time."""
    return "no inode was left for a while" * _without(fault, run, "nr_inodes", INODES)


def _without(fault: Fault, run: Running, what: str, most: int) -> bool:
    home = run.workdir.parent

    def use_up() -> None:
        for spare in (0, 8, 64):  # what is used may grow meanwhile: then there is less than none
            has = os.statvfs(home)
            used = has.f_files - has.f_ffree
            if what == "size":
                used = (has.f_blocks - has.f_bfree) * has.f_frsize
            with contextlib.suppress(subprocess.CalledProcessError):
                return mount("-o", f"remount,{what}={used + spare}", home)

    return fault.for_a_while(run, use_up, lambda: mount("-o", f"remount,{what}={most}", home))


def readonly(fault: Fault, run: Running) -> str:
    """The folder of the checkpoints is read-only for a random time."""
    place = run.workdir / "checkpoints"

    def begin() -> None:
        mount("--bind", place, place)
        mount("-o", "remount,bind,ro", place)

    def finish() -> None:
        subprocess.run(["umount", "--lazy", place], check=True)

    return "checkpoints were read-only for a while" * fault.for_a_while(run, begin, finish)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


FAULTS: dict[str, Callable[[Fault, Running], str]] = {
    one.__name__: one
    for one in (kill, stop, hang_up, interrupt, damage, rename, link, reseal, rows, fill)
}
MOUNTED = {one.__name__: one for one in (full, inodes, readonly)}
SIZE, INODES = 2**28, 100_000  # of the file system of theirs
SIGNALS = {"stop": signal.SIGTERM, "hang_up": signal.SIGHUP, "kill": signal.SIGKILL}
