#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with nvcc and no network:
#
#     bash benchmarks/gpu.sh [--part quick|ops|steps|train|sanitize]    no part: the last four in turn
#
#   quick     the tests and the shortest of everything below: where there is a quarter of an hour
#   ops       tests on the device, op benchmarks, their share of the bandwidth of a copy
#   steps     whole training steps beside eager, its CUDA graph, torch.compile, inductor and JAX
#   train     MNIST Small Int: eager, fastinterp, and both as a CUDA graph
#   sanitize  compute-sanitizer: memcheck, racecheck, initcheck
#
# Each part builds the core in place and ends within ten minutes. Needs torch, torchvision, triton,
# pybind11, cmake, ninja, numpy, Pillow, safetensors, tabulate, scipy and pytest. $OUT (default
# benchmarks/results) gets gpu.csv, traffic.csv, machine.log and a log for each part. REHEARSE=1 runs
# the same on a CPU, tiny and with Triton's interpreter, into build/rehearsal.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=${REHEARSE:-}
part=all
if [ $# -gt 0 ]; then [ "$1 $#" = "--part 2" ] && part=$2 || part="$* (not --part NAME)"; fi
case $part in all | quick | ops | steps | train | sanitize) ;; *)
  echo "gpu.sh: --part must be quick, ops, steps, train or sanitize, got '$part'" >&2; exit 2 ;;
esac
out=$(realpath -m "${OUT:-$([ -n "$rehearse" ] && echo build/rehearsal || echo benchmarks/results)}")
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
csv=$out/gpu.csv failed=() began=$SECONDS python=$(command -v python3)
device=cuda
if [ -n "$rehearse" ]; then device=cpu; export TRITON_INTERPRET=1; fi

# step NAME SECONDS COMMAND...: runs it with its output in the part's log, keeps going when it fails;
# no longer than so many seconds and than its part has left
step() {
  local name=$1 most=$2 left=$((570 - SECONDS + began)); shift 2
  if [ "$left" -lt 5 ]; then echo "-- $name: no time left"; failed+=("$name"); return; fi
  local from=$SECONDS rc=0
  printf '\n== %s\n' "$name" >>"$log"
  timeout -k 5 "$((left < most ? left : most))" "$@" >>"$log" 2>&1 || rc=$?
  echo "-- $name: exit $rc, $((SECONDS - from)) s, $(shown "$name" | tail -1 | cut -c1-150)"
  [ $rc = 0 ] || failed+=("$name")
}

# shown NAME: what a step of this part wrote
shown() { awk -v head="== $1" '/^== /{on = $0 == head; next} on && NF' "$log"; }

require() {
  local missing=()
  for module in torch torchvision triton pybind11 numpy PIL safetensors tabulate scipy pytest; do
    "$python" -c "import $module" 2>/dev/null || missing+=("python package $module")
  done
  for tool in cmake ninja; do command -v $tool >/dev/null || missing+=("$tool"); done
  [ -n "$rehearse" ] || for tool in nvcc nvidia-smi; do
    command -v $tool >/dev/null || missing+=("$tool")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    printf 'gpu.sh: not here: %s\n' "${missing[@]}" >&2; exit 2
  fi
  [ -n "$rehearse" ] || "$python" -c "import torch; torch.zeros(1).cuda()" ||
    { echo "gpu.sh: torch sees no GPU" >&2; exit 2; }
}

build() {
  if [ -n "$rehearse" ] && "$python" -c "import fastinterp._core" 2>/dev/null; then
    echo "-- build: the core that is here"; return
  fi
  local arch=90
  [ -n "$rehearse" ] || arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  step build 300 env "CMAKE_CUDA_ARCHITECTURES=$arch" bash -c "cmake -S csrc -B build/gpu -G Ninja \
    -Dpybind11_DIR=\"\$($python -m pybind11 --cmakedir)\" -DPython_EXECUTABLE=$python \
    -DCMAKE_INSTALL_PREFIX=fastinterp && cmake --build build/gpu --target install"
  "$python" -c "import fastinterp._core" || { tail -30 "$log"; exit 1; }
  { nvidia-smi; nvcc --version; "$python" -c "import sys, torch, triton; from benchmarks import record
print(record.device_name(), 'torch', torch.__version__, 'triton', triton.__version__, 'python', sys.version)
print('commit', record.commit())"; } >"$out/machine.log" 2>&1
}

gpu_tests() {
  local workers=()
  "$python" -c "import xdist" 2>/dev/null && [ -z "$rehearse" ] && workers=(-n 8)
  step gpu-tests 300 "$python" -m pytest -q -m gpu "${workers[@]}" \
    tests/test_gpu.py tests/test_gpu_graphs.py tests/test_data.py tests/test_folders.py
}

bandwidth() {
  step traffic 60 env -u TRITON_INTERPRET "$python" -m benchmarks.traffic --csv "$out/traffic.csv"
  step bandwidth 150 "$python" -m benchmarks.bandwidth --traffic "$out/traffic.csv" --csv "$csv" ${rehearse:+--tiny}
  shown bandwidth
}

ops() {
  bandwidth
  gpu_tests
  step op-benchmarks 300 "$python" -m pytest -q benchmarks -p no:xdist --csv "$csv" ${rehearse:+-k "(attack_step or cross_entropy) and (50 or 28) and not 1000"}
}

# run_step NET DTYPE SIDES SECONDS: benchmarks.step of a network
run_step() {
  local size=() name="step-$1-$2${5:-}"
  if [ -n "$rehearse" ]; then
    local pixels=8; case $1 in small) pixels=12 ;; resnet50) pixels=32 ;; esac
    size=(--batch 2 --size $pixels --seconds 0.1 --no-memory)
  fi
  step "$name" "$4" "$python" -m benchmarks.step --net "$1" --dtype "$2" --sides "$3" --seconds 3 \
    --device $device --csv "$csv" $([ "$1" = resnet18-cifar ] && echo --batch 128) "${size[@]}"
}

steps() {
  local nets=(resnet18-cifar resnet50 wrn28-10 wrn16-4 small)
  for net in "${nets[@]}"; do
    run_step "$net" bf16 ours,ours-graph,eager,eager-format,eager-graph 100
  done
  [ -n "$rehearse" ] && nets=(small)
  for net in "${nets[@]}"; do  # compilers, for as long as there is time
    run_step "$net" bf16 ours-graph,eager,compile,make_fx,jax 150 -compiled
  done
  awk '/^== /{on = $0 ~ /^== step-/} on && NF' "$log" | grep -vi warn
}

# train [STEPS SECONDS]
train() {
  step train "${2:-500}" "$python" -m benchmarks.train_step --device $device --csv "$csv" \
    --steps "$([ -n "$rehearse" ] && echo 2 || echo "${1:-200}")" ${DATA_DIR:+--data-dir "$DATA_DIR"}
  shown train
}

# sanitize [TOOL...]
sanitize() {
  local tests=("$python" -m pytest -q -p no:xdist -p no:cacheprovider -m gpu tests/test_gpu_sanitize.py)
  if [ -n "$rehearse" ]; then step sanitize 180 "${tests[@]}"; return; fi
  command -v compute-sanitizer >/dev/null ||
    { echo "gpu.sh: compute-sanitizer is not here" >&2; failed+=(sanitize); return; }
  [ $# -gt 0 ] || set -- memcheck racecheck initcheck
  # Without torch's own memory pool, in which an access out of bounds still hits something.
  for tool in "$@"; do
    step "sanitize-$tool" 190 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
      --error-exitcode 9 --target-processes all --tool "$tool" "${tests[@]}"
  done
}

# In the order of what one would miss most.
quick() {
  gpu_tests
  train 40 120
  bandwidth
  run_step resnet18-cifar bf16 ours,ours-graph,eager,eager-format,eager-graph 100
  shown step-resnet18-cifar-bf16
  sanitize memcheck
}

require
[ "$part" = all ] && parts=(ops steps train sanitize) || parts=("$part")
for part in "${parts[@]}"; do
  log=$out/$part.log
  : >"$log"
  echo "== $part"
  build
  "$part"
  began=$SECONDS
done
echo "== table"
if [ -f "$csv" ]; then "$python" -m benchmarks.tables --print --csv "$csv" || failed+=(table); fi
[ ${#failed[@]} = 0 ] && echo "all passed" || { echo "failed: ${failed[*]}"; exit 1; }
