"""What a pretrained model loses when it is converted, by method and share, without training.

    python -m experiments.posthoc --workdir=runs/smollm2 --calibrate=a.txt,b.txt \
        --test=code:c.txt,verse:d.txt --methods=svd_llm,mpifa,io_svd,ngc --kept=0.8,0.6

For: nats per token added to the teacher, on windows of texts that calibration has not seen; the
windows are the same for all, and differences are paired. Each method goes with its own way of
giving ranks (`convert/methods.py`), and both counts of numbers are told. The study continues after
a kill. Not for: training after conversion (`train.teacher`), or models trained here (`compare.py`).
"""

import argparse
import json
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.commands.arguments import command
from ngc_jax.commands.convert_model import examples
from ngc_jax.convert.calibrate import Sums, calibrate
from ngc_jax.convert.convert import IN_FLOW, Fit, allot, decompose, fit, reconstructed
from ngc_jax.convert.forms import FORMS, fit_form
from ngc_jax.convert.methods import METHODS
from ngc_jax.data.batches import Batch
from ngc_jax.report.blocks import table
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import expand, write_durably
from ngc_jax.training.load import Trained, load
from ngc_jax.training.step import nats_of

Losses = dict[str, list[float]]  # of a domain, the mean nats of each window


def losses(teacher: Trained, params: Any, tests: dict[str, Batch]) -> Losses:
    """Mean nats per token of each window, by domain, of the dense model with these parameters."""

    @jax.jit
    def nats(params: Any, row: Batch) -> jax.Array:
        lost, counts = nats_of(teacher.model.apply(params, row)[0], row.targets)
        return jnp.sum(lost * counts) / jnp.sum(counts)

    def window(batch: Batch, i: int) -> Batch:
        return jax.tree.map(lambda a: a[i : i + 1], batch)

    return {
        name: [float(nats(params, window(batch, i))) for i in range(len(batch.inputs))]
        for name, batch in tests.items()
    }


def added(record: dict[str, Any], dense: Losses, name: str) -> str:
    """The mean difference from the teacher on a domain, and its standard error over windows."""
    more = np.subtract(record["losses"][name], dense[name])
    return f"{more.mean():+.3f} ± {more.std(ddof=1) / len(more) ** 0.5:.3f}"


def rows_of(records: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of the table, the teacher's losses first."""
    dense = records["teacher"]["losses"]
    rows = [{"method": "teacher", **{n: f"{np.mean(of):.3f}" for n, of in dense.items()}}]
    for name, record in sorted(records.items(), key=lambda one: one[0].split()[::-1], reverse=True):
        if name != "teacher":
            numbers, (method, kept) = record["numbers"], name.split()
            share = {k: f"{numbers[k] / numbers['dense']:.3f}" for k in ("led", "factored")}
            rows.append(
                {"method": method, "kept": kept}
                | {domain: added(record, dense, domain) for domain in dense}
                | {"predicted": f"{record['predicted']:.3f}", "r(m+n-r)": share["led"]}
                | {"r(m+n)": share["factored"], "seconds": f"{record['seconds']:.0f}"}
            )
    return rows


def fitted(
    teacher: Trained, means: Sums, batch: Batch, method: str, shares: list[str]
) -> Iterator[tuple[str, Trained, Fit, float]]:
    """(share kept, the dense model, its fit, seconds) of each; "+share" lets the price join.

    "ngc:ports:3" is a form of `ngc convert`, with so many groups.
    """
    recipe, _, joins = method.partition("+")
    _, *form = method.split(":")
    began, choices = time.monotonic(), list[Any]()
    if recipe not in IN_FLOW and not form and shares:
        choices = decompose(teacher, means, recipe, bool(joins))
    once = time.monotonic() - began
    for share in shares:
        began, base = time.monotonic(), teacher
        if form:
            base, found = fit_form(teacher, means, form[0], float(share), *map(int, form[1:]))
        elif choices:
            found = allot(choices, recipe, float(share))
        else:
            found = fit(teacher, means, recipe, float(share), batch=batch)
        yield share, base, found, once + time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", required=True, type=expand, help="of the teacher")
    parser.add_argument("--calibrate", required=True, help="files, with commas")
    parser.add_argument("--test", required=True, help="NAME:FILE, with commas")
    more = "also ngc+share, ngc:synapses, ngc:ports:3, ngc:blocks:3"
    parser.add_argument("--methods", default="svd_llm,mpifa,io_svd,ngc", help=more)
    parser.add_argument("--kept", default="0.8,0.6")
    parser.add_argument("--tokens", type=int, default=12_288, help="to calibrate on")
    parser.add_argument("--windows", type=int, default=24, help="of each test")
    parser.add_argument("--out", type=expand, default=pathlib.Path("runs/posthoc"))
    args = parser.parse_args()
    methods, shares = args.methods.split(","), args.kept.split(",")
    for method in methods:
        name, *form = method.removesuffix("+share").split(":")
        if name not in METHODS or (form and (name != "ngc" or form[0] not in FORMS[1:])):
            raise UserError(f"--methods={method}: one of {','.join(METHODS)},ngc+share,ngc:FORM:G")
    teacher = load(args.workdir)
    context = teacher.config.data.context
    given = (pair.partition(":")[::2] for pair in args.test.split(","))
    tests = {name: examples(teacher, [file], args.windows * context) for name, file in given}
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "records.json"
    records = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    if "teacher" not in records:
        records["teacher"] = {"losses": losses(teacher, teacher.params, tests)}
    began = time.monotonic()
    batch = examples(teacher, args.calibrate.split(","), args.tokens)
    means = calibrate(teacher, batch, args.out)
    print(f"calibrated on {batch.inputs.size} tokens in {time.monotonic() - began:.0f} s")
    dense = records["teacher"]["losses"]
    for method in methods:
        left = [share for share in shares if f"{method} {share}" not in records]
        for share, base, found, took in fitted(teacher, means, batch, method, left):
            lost = losses(base, reconstructed(base, found), tests)
            told = {"losses": lost, "predicted": found.predicted, "numbers": found.numbers}
            records[f"{method} {share}"] = record = told | {"seconds": took}
            write_durably(kept, json.dumps(records))
            print(method, share, {d: added(record, dense, d) for d in dense}, flush=True)
    rows = rows_of(records)
    head = [*rows[-1]]
    made = table(head, [[row.get(name, "") for name in head] for row in rows])
    (args.out / "report.md").write_text(made.markdown + "\n", "utf-8")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.out / 'report.md'}; at most {most:.1f} GB of memory")


if __name__ == "__main__":
    command(main, goes_on=True)
