#!/usr/bin/env bash
# Tests and measures the kernels on a GPU, in two halves that take less than 9 minutes each:
#
#   benchmarks/gpu_check.sh --tests [--output DIR] [--wheels DIR]
#   benchmarks/gpu_check.sh --speed [--output DIR] [--wheels DIR] [--upstream DIR] [--dcnv4 DIR]
#
#   --output    folder of the results; default: benchmarks/results
#   --wheels    wheels of the Python packages that are missing here, installed into a temporary folder
#   --upstream  checkout of OpenGVLab/InternImage whose operator is built, to compare with
#   --dcnv4     checkout of OpenGVLab/DCNv4 whose operator is built, to compare with
#
# Without --tests and --speed both halves run. Nothing is compiled but what torch.compile and Triton compile: the kernels are
# those in dcnv3_kernel/build (dcnv3_kernel/build.py makes them on any machine with nvcc, such as `--backend cuda --arch 9.0`).
# No network is needed. Required: Linux, a GPU, and a python3 (or $PYTHON) with torch for CUDA, transformers, kernels,
# safetensors, pytest and hypothesis. compute-sanitizer comes with the CUDA toolkit. What a machine without a network lacks
# comes from wheels:
#
#   python3 -m pip download --no-deps --dest WHEELS kernels==0.17.2 deformops==3.0.1
#
# To compare with other operators, before, on a machine with nvcc and a GPU, outside this repository:
#
#   git clone https://github.com/OpenGVLab/InternImage && (cd InternImage/classification/ops_dcnv3 && python3 setup.py build_ext --inplace)
#   git clone https://github.com/OpenGVLab/DCNv4 && (cd DCNv4/DCNv4_op && python3 setup.py build_ext --inplace)
#
# Each step appends to gpu_check_<half>.log while it runs and a row to gpu_check_<half>.md when it ends. The exit status is 0 if
# every step passed, 1 if one failed or was skipped (without a GPU all are), 2 for wrong arguments.
set -uo pipefail

usage() {
  echo "$1: see the head of $0" >&2
  exit 2
}

ROOT="$(realpath "$(dirname "$0")/..")"
PYTHON="${PYTHON:-python3}"
OUTPUT="$ROOT/benchmarks/results" WHEELS=""
HALVES=() PEERS=() OFFICIAL=()
while [ $# -gt 0 ]; do
  case "$1" in
    --tests | --speed) HALVES+=("${1#--}") ;;
    --output | --wheels | --upstream | --dcnv4)
      [ $# -gt 1 ] || usage "$1 needs a value"
      folder="$(realpath -m -- "$2")"
      case "$1" in
        --output) OUTPUT="$folder" ;;
        --wheels) WHEELS="$folder" ;;
        --upstream) PEERS+=("$1" "$folder") OFFICIAL=("$1" "$folder") ;;
        --dcnv4) PEERS+=("$1" "$folder") ;;
      esac
      shift
      ;;
    *) usage "unknown argument $1" ;;
  esac
  shift
done
[ ${#HALVES[@]} -gt 0 ] || HALVES=(tests speed)
cd "$ROOT" && mkdir -p "$OUTPUT" || exit 1

SITE="$(mktemp -d)"
trap 'rm -rf "$SITE"' EXIT
if [ -n "$WHEELS" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || exit 1
fi
export PYTHONPATH="$ROOT:$ROOT/benchmarks:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
STATUS=0

record() { # title, outcome, seconds, last line of the output
  echo "== $1: $2 ($3 s)" | tee -a "$LOG"
  echo "| $1 | $2 | $3 | ${4//|//} |" >>"$TABLE"
  [ "$2" = passed ] || STATUS=1
}

step() { # title, why it must be skipped or "", seconds at the most, command
  local title="$1" reason="$2" limit="$3" left=$((DEADLINE - SECONDS)) start=$SECONDS status last outcome
  shift 3
  [ -n "$reason" ] || [ "$left" -ge 10 ] || reason="no time left"
  if [ -n "$reason" ]; then
    record "$title" "skipped: $reason" 0 ""
    return 1
  fi
  echo "== $title" | tee -a "$LOG"
  timeout --kill-after 5 $((limit < left ? limit : left)) "$@" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  last="$(tail -n 1 "$LOG")" outcome="FAILED: status $status"
  case "$status $last" in
    "0 "*passed*) outcome=passed ;;
    "0 "*" skipped"*) outcome="FAILED: every test was skipped" status=1 ;;
    "0 "*) outcome=passed ;;
    124\ * | 137\ *) outcome="FAILED: stopped at its limit" ;;
  esac
  record "$title" "$outcome" $((SECONDS - start)) "$last"
  return "$status"
}

begin() { # half: starts its log, its table and its time
  LOG="$OUTPUT/gpu_check_$1.log" TABLE="$OUTPUT/gpu_check_$1.md" DEADLINE=$((SECONDS + 500))
  : >"$LOG"
  {
    echo "# gpu_check.sh --$1"
    echo
    echo "- date: $(date -u '+%Y-%m-%d %H:%M UTC')"
    echo "- code: commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo "- GPU: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo none)"
    echo
    echo "| step | outcome | seconds | last line of its output |"
    echo "|---|---|---:|---|"
  } >"$TABLE"
  step "kernels in dcnv3_kernel/build" "$NO_GPU" 60 "$PYTHON" -c 'import harness; raise SystemExit(harness.check_gpu_kernels())'
}

run_tests() {
  local kernel_tests=dcnv3_kernel/tests/test_dcnv3_kernel.py no_sanitizer="$NO_GPU" parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
  [ -n "$NO_GPU" ] || command -v compute-sanitizer >/dev/null || no_sanitizer="compute-sanitizer is not on the PATH"
  local pytest=("$PYTHON" -m pytest -v -p no:cacheprovider --maxfail 20 "${parallel[@]+"${parallel[@]}"}" -m "not slow")
  step "tests of the CUDA kernel" "$NO_GPU" 150 "${pytest[@]}" "$kernel_tests" -k "cuda and not triton"
  step "tests of the model" "$NO_GPU" 150 "${pytest[@]}" tests/test_gpu.py
  step "memcheck" "$no_sanitizer" 60 compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" benchmarks/sanitizer_case.py
  step "tests of the Triton kernel" "$NO_GPU" 150 "${pytest[@]}" "$kernel_tests" -k triton
  step "racecheck" "$no_sanitizer" 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$PYTHON" benchmarks/sanitizer_case.py
  step "synccheck" "$no_sanitizer" 60 compute-sanitizer --tool synccheck --error-exitcode 1 "$PYTHON" benchmarks/sanitizer_case.py
}

run_speed() {
  step "operator" "$NO_GPU" 200 "$PYTHON" benchmarks/op_gpu.py --seconds 0.5 --output "$OUTPUT" "${PEERS[@]+"${PEERS[@]}"}"
  local left=$((DEADLINE - SECONDS)) # a model that is begun at the end may take a minute to compile
  step "models" "$NO_GPU" "$left" "$PYTHON" benchmarks/model_speed.py --device cuda --profile --seconds $((left - 80)) \
    --output "$OUTPUT" "${OFFICIAL[@]+"${OFFICIAL[@]}"}"
}

if ! NO_GPU=$("$PYTHON" -c 'import torch; print("" if torch.cuda.is_available() else f"PyTorch {torch.__version__} finds no GPU")' 2>/dev/null); then
  NO_GPU="$PYTHON cannot import torch"
fi
for half in "${HALVES[@]}"; do
  begin "$half"
  "run_$half"
  echo "== $half: results in $OUTPUT"
done
exit $STATUS
