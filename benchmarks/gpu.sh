#!/usr/bin/env bash
# One command for a machine with a GPU, nvcc, cmake, ninja and no network: builds the core in place,
# tests the ops on the device, reads the resource report and times the ops. pybind11 must be
# importable (a wheel on PYTHONPATH will do); nothing else beyond torch, triton, numpy, tabulate and
# pytest with pytest-benchmark and pytest-timeout. Results go to $OUT (default benchmarks/results).
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-benchmarks/results}")
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

echo "== build"
cmake -S csrc -B build/gpu -G Ninja -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python3)" -DCMAKE_INSTALL_PREFIX=fastinterp >"$out/build.log" 2>&1 &&
  cmake --build build/gpu --target install >>"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; exit 1; }

failed=0
echo "== tests on the device"
python3 -m pytest -q -m gpu tests/test_gpu.py tests/test_data.py 2>&1 | tee "$out/gpu-tests.log" | tail -15 || failed=1
echo "== resources"
python3 -m benchmarks.resources --arch 90 --csv "$out/resources.csv" >"$out/resources.log" 2>&1 ||
  { tail -15 "$out/resources.log"; failed=1; }
python3 -m benchmarks.traffic --csv "$out/traffic.csv" >"$out/traffic.log" 2>&1 ||
  { tail -15 "$out/traffic.log"; failed=1; }
echo "== op benchmarks"
python3 -m pytest -q benchmarks --csv "$out/gpu.csv" 2>&1 | tee "$out/gpu-ops.log" | grep -E '^(op|attack|cam|batch|conv|max|activation|cross|FAILED|=|[0-9]+ )' || failed=1
exit $failed
