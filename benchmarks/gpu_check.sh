#!/usr/bin/env bash
# What has to be known of a GPU, in one command that needs no network and ends within 8 minutes: builds the kernels, tests them,
# looks for wrong accesses to memory, and then measures, operator by operator and model by model.
#
#   benchmarks/gpu_check.sh [--wheels DIR] [--upstream DIR] [--dcnv4 DIR] [--output DIR]
#
#   --wheels    wheels of what is missing here (deformops, kernels, hypothesis ...): installed into a temporary folder
#   --upstream  checkout of OpenGVLab/InternImage whose operator was built in place, to compare with
#   --dcnv4     checkout of OpenGVLab/DCNv4, likewise
#   --output    folder of the results: benchmarks/results if absent
#
# Needed: Linux, a GPU, and a python3 (or $PYTHON) with torch for CUDA, transformers, safetensors and pytest. nvcc, if it is there,
# builds for this GPU; else the variants in dcnv3_kernel/build serve. The result is 1 if a test or a comparison fails.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
WHEELS="" OUTPUT=benchmarks/results
COMPARE=() OFFICIAL=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) WHEELS="$2" ;;
    --upstream)
      COMPARE+=("$1" "$2")
      OFFICIAL=("$1" "$2")
      ;;
    --dcnv4) COMPARE+=("$1" "$2") ;;
    --output) OUTPUT="$2" ;;
    *)
      echo "unknown argument $1: see the head of $0" >&2
      exit 2
      ;;
  esac
  shift 2 || {
    echo "a value is missing" >&2
    exit 2
  }
done

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no GPU that torch can use: nothing is run")' || exit 1

SITE="$(mktemp -d)"
trap 'rm -rf "$SITE"' EXIT
if [ -n "$WHEELS" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUTPUT"

STATUS=0
STARTED=$(date +%s)
step() { # title, seconds at the most, command
  local title="$1" limit="$2" before
  shift 2
  before=$(date +%s)
  echo "== $title ($((before - STARTED)) s after the start)"
  timeout "$limit" "$@" || {
    STATUS=1
    echo "== FAILED: $title" >&2
  }
  echo "== $(($(date +%s) - before)) s"
}

BACKENDS=(--backend triton)
command -v c++ >/dev/null && BACKENDS+=(--backend cpu)
if command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  BACKENDS+=(--backend cuda)
fi
step "build" 110 "$PYTHON" dcnv3_kernel/build.py "${BACKENDS[@]}"

# torch.compile fills its cache while the tests run, so that there is time left to measure what it compiled.
"$PYTHON" benchmarks/model_speed.py --device cuda --compile_only --models t --modes compile --dtypes bfloat16 --seconds 230 >/dev/null 2>&1 &
COMPILING=$!
PARALLEL=()
"$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL=(-n 6)
step "tests of the CUDA kernel" 80 "$PYTHON" -m pytest -q --maxfail 5 "${PARALLEL[@]+"${PARALLEL[@]}"}" dcnv3_kernel/tests/test_dcnv3_kernel.py -k "cuda or gpu or elements or device or graph" -p no:cacheprovider
step "tests of the Triton kernel" 80 "$PYTHON" -m pytest -q --maxfail 5 "${PARALLEL[@]+"${PARALLEL[@]}"}" dcnv3_kernel/tests/test_dcnv3_kernel.py -k "triton and (parity or 16_bit or deterministic or finite or numbers)" -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer, $tool" 40 compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" benchmarks/sanitizer_case.py
  done
else
  echo "== compute-sanitizer is not here: skipped"
fi
wait $COMPILING || echo "== torch.compile did not come to its end"
step "operator" 80 "$PYTHON" benchmarks/op_gpu.py --seconds 0.5 --output "$OUTPUT" "${COMPARE[@]+"${COMPARE[@]}"}"
LEFT=$((470 - ($(date +%s) - STARTED)))
step "models" "$LEFT" "$PYTHON" benchmarks/model_speed.py --device cuda --output "$OUTPUT" --seconds "$((LEFT - 20))" "${OFFICIAL[@]+"${OFFICIAL[@]}"}"
echo "== $(($(date +%s) - STARTED)) s in all; results in $OUTPUT"
exit $STATUS
