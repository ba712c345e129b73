#!/bin/bash
# Runs the tests of the CPU kernels, and of the CUDA kernels on a CPU, with AddressSanitizer and
# UndefinedBehaviorSanitizer: reads and writes outside of the tensors, signed overflow, bad shifts,
# misaligned accesses, null offsets.
#
#     tests/sanitize.sh [arguments for pytest]      needs gcc, cmake, ninja, pybind11; PYTHON=python
#
# The instrumented core goes into a copy of the package below build/sanitize; nothing else changes.
# Only the instruction set that this processor picks is run. Leaks are not looked for: Python and
# torch keep memory until they exit.
set -euo pipefail

repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
build=$repo/build/sanitize
package=$build/package

mkdir -p "$package"
rm -rf "$package/tests" "$package/fastinterp"
cp -r "$repo/tests" "$repo/fastinterp" "$repo/pyproject.toml" "$package"
rm -f "$package"/fastinterp/_core*.so

FASTINTERP_CUDA=0 CXX=${CXX:-g++} cmake -S "$repo/csrc" -B "$build" -G Ninja \
  -DCMAKE_BUILD_TYPE=Sanitize \
  -DCMAKE_CXX_FLAGS_SANITIZE="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
  -DCMAKE_INSTALL_PREFIX="$package/fastinterp" \
  -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
cmake --build "$build" --target install

# The CUDA kernels as tests/cuda_emulation makes them, where there is a cuda_runtime.h.
emulated=$build/emulated
mkdir -p "$emulated"
"$python" "$repo/tests/cuda_emulation/build.py" "$emulated" -g1 -fno-omit-frame-pointer \
  -fsanitize=address,undefined -fno-sanitize-recover=undefined || emulated=

# libstdc++ too, or AddressSanitizer would not find the __cxa_throw that it wraps.
library() { "${CXX:-g++}" -print-file-name="$1"; }
cd "$package"
export PYTHONPATH=$package ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
run() {
  LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" \
    "$python" -m pytest -q -p no:cacheprovider "$@"
}
names=(batch_norm_act norm_act conv2d activation max_pool2d cross_entropy attack_step cam_discrepancy
  kendall_tau)
files=("${names[@]/#/tests/test_}")
FASTINTERP_BACKEND=cpu run -k "cpu or not reference" "${files[@]/%/.py}" "$@"
if [ -n "$emulated" ]; then
  EMULATED_CUDA=$emulated run -m slow tests/test_cuda_emulated.py "$@"
fi
