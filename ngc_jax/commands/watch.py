"""A live page of runs: `ngc watch RUNS`, for a browser on this machine.

For: losses, stability, throughput, events and samples of all runs below a folder, as they go. Not
for: the page (`report/live.py`), or pictures for others (`plot.py`).
"""

import argparse

from ngc_jax.commands.arguments import command
from ngc_jax.runtime import output
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand

PORT = 8686


def main() -> None:
    """Serves the page until Ctrl-C."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    told = "folder of runs, or a run; default: runs"
    arguments.add_argument("runs", nargs="?", type=expand, default="runs", help=told)
    told = f"of the page; 0: any that is free; default: {PORT}"
    arguments.add_argument("--port", type=int, default=PORT, help=told)
    args = arguments.parse_args()
    from ngc_jax.report.live import server

    if not args.runs.is_dir():
        raise UserError(f"{args.runs} is no folder: give one with runs in it, for instance runs")
    try:
        serving = server(args.runs.resolve(), args.port)
    except (OSError, OverflowError) as error:
        why = f"--port={args.port} cannot be used ({error})"
        raise UserError(f"{why}: give another, or 0 for any that is free") from error
    output.now("")  # a page waits in silence
    where = f"http://127.0.0.1:{serving.server_port}"
    print(f"{args.runs}: open {where} in a browser of this machine; Ctrl-C ends this", flush=True)
    with serving:
        serving.serve_forever()


if __name__ == "__main__":
    command(main)
