"""Is ngc_small as good as dense_small? The question of the README's table, answered by one command:

    python -m experiments.match_dense --workdir=runs/match_dense --jobs=2

For: two configs, the same steps, the same tuning budget on both sides (a learning rate out of four, a factor of two
apart, at four fifths of the length, with a seed that is not used again), then three seeds each at full length. Killed,
it goes on where it was; every run is a plain `launch.py` run. Writes results.md beside the runs. Not for: any other
comparison.
"""

import math
import statistics

from experiments.runs import flags, options, tune
from experiments.stats import interval

RATES = {"dense_small": (1.25e-3, 2.5e-3, 5e-3, 1e-2), "ngc_small": (2.5e-3, 5e-3, 1e-2, 2e-2)}
SEEDS = (0, 1, 2)


def main() -> None:
    parser = options(__doc__, "runs/match_dense")
    parser.add_argument("--steps", type=int, default=1000, help="updates of the final runs; tuning takes four fifths")
    args = parser.parse_args()
    home = args.workdir.absolute()

    def run(model: str, rate: float, seed: int, share: float) -> list[str]:
        rates = {"train.learning_rate": rate, "train.state_learning_rate": rate}
        return flags(f"configs/{model}.py", {"seed": seed, "train.steps": int(share * args.steps), **rates})

    found = tune(home, RATES, run, seeds=SEEDS, share=0.8, jobs=args.jobs)
    lines = [
        f"Made by `python -m experiments.match_dense --steps={args.steps}`; loss in nats per byte on the whole",
        "held-out text of this Python's library source; mean and 95% interval over seeds 0, 1, 2.",
        "",
        "| config | loss at each learning rate tried, 4/5 of the length | chosen | loss, three seeds | bits per byte |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model in RATES:
        tried = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in found[model].tried.items())
        losses = found[model].losses
        bits = statistics.mean(losses) / math.log(2)
        lines.append(f"| {model} | {tried} | {found[model].rate:g} | {interval(losses, 4)} | {bits:.4f} |")
    ratios = [ngc / dense for ngc, dense in zip(found["ngc_small"].losses, found["dense_small"].losses, strict=True)]
    lines += ["", f"ngc_small / dense_small, paired by seed: {interval(ratios, 4)}."]
    (home / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
