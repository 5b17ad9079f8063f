#!/usr/bin/env bash
# The whole check of an accelerator, in under 9 minutes: numerics against float64, exact resume, tables.
#
#     benchmarks/accelerator.sh [REPORT]
#
# For: a machine with Python 3.11 or later, jax and this package's dependencies in the environment of
# $PYTHON (default python3). Writes one Markdown file (default accelerator.md) with the device's name
# and the versions. Exit code 1 if a part failed or ran out of its time; the file says which. SMALL=1
# tests the script itself, on a CPU. Not for: installing anything.
set -uo pipefail
report=$(realpath "${1:-accelerator.md}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD JAX_COMPILATION_CACHE_DIR=$scratch/programs
# A GPU's atomic additions have no fixed order, but an exact resume needs one. The process that watches
# the runs opens their checkpoints, so it must not reserve the device's memory.
exact=(env XLA_PYTHON_CLIENT_PREALLOCATE=false "XLA_FLAGS=${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true")

if [ -n "${SMALL:-}" ]; then
  speed=(--widths=64 --batch_size=2 --context=64 --pairs=3)
  loop=(--updates=30 --pairs=1 --width=32)
  patience=5 # times the seconds that a part may take
else
  speed=(--widths=768,1024,2048 --batch_size=16 --context=1024 --dtype=bfloat16)
  loop=(--updates=100 --pairs=2)
  patience=1
fi

failed=0
part() { # title, seconds it may take, command: its output becomes a section
  local title=$1 limit=$(($2 * patience)) began=$SECONDS
  shift 2
  echo "== $title"
  printf '\n## %s\n\n```\n%s\n```\n\n' "$title" "${*//$scratch/RUNS}" >>"$report"
  timeout "$limit" "$@" 2>"$scratch/errors" | tee -a "$report"
  local code=${PIPESTATUS[0]}
  if [ "$code" != 0 ]; then
    failed=1
    printf '\n**Failed**, exit code %s (124: out of its %s seconds).\n\n```\n%s\n```\n' \
      "$code" "$limit" "$(tail -n 15 "$scratch/errors")" | tee -a "$report"
  fi
  printf '\n%s s\n' $((SECONDS - began)) >>"$report"
}

printf '# ngc_jax on an accelerator\n' >"$report"
part "Machine" 30 "$python" -c '
import platform, jax
from ngc_jax.training.costs import versions
kind = jax.devices()[0].device_kind
print(f"{len(jax.devices())} x {kind} ({jax.default_backend()}), Python {platform.python_version()}")
print(*(f"{name} {version}" for name, version in versions().items()), sep=", ")'
part "Numerics" 80 "$python" -m benchmarks.numerics
part "Exact resume" 120 "${exact[@]}" "$python" -m experiments.chaos --rounds=3 --faults=kill \
  --workdir="$scratch/chaos"
part "Speed against dense" 110 "$python" -m benchmarks.speed "${speed[@]}"
part "A kernel for a rule" 40 "$python" -m benchmarks.fused
part "Our loop" 50 "$python" -m benchmarks.loop "${loop[@]}"
[ -n "${SMALL:-}" ] || part "Compile time" 80 "$python" -m benchmarks.compile_time --repeats=1
printf '\nIn all: %s s.\n' "$SECONDS" | tee -a "$report"
exit "$failed"
