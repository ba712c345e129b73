"""Compiles csrc/cuda with a C++ compiler, for tests/test_cuda_emulated.py.

    python tests/cuda_emulation/build.py FOLDER [flags of the compiler]

Writes _emulated.*.so there. The only line of csrc/cuda that is not C++ is the launch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent.resolve()
CSRC = HERE.parents[1] / "csrc"
OPS = ("attack_step", "batch_norm_act", "kendall_tau")


def cuda_include() -> Path | None:
    """Where cuda_runtime.h is: beside nvcc, in CUDA_HOME, or in a package of torch's."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    roots += Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*")
    headers = (r / "include" / "cuda_runtime.h" for r in roots)
    return next((h.parent for h in headers if h.is_file()), None)


def build(folder: Path, *flags: str) -> None:
    copies = folder / "cuda"
    copies.mkdir(parents=True, exist_ok=True)
    for source in (CSRC / "cuda").iterdir():
        text = source.read_text()
        if source.name == "launch.cuh":
            text, launches = re.subn(
                r"kernel<<<grid, threads, 0, stream>>>\((.*)\);",
                r"(void)stream; emulation::run(kernel, grid, threads, \1);",
                text,
            )
            assert launches == 1
        text = re.sub(r'#include "(\.\./.*)"', rf'#include "{CSRC}/cuda/\1"', text)
        name = f"{source.stem}.cpp" if source.suffix == ".cu" else source.name
        (copies / name).write_text(text)
    sources = [
        HERE / "module.cpp",
        *(CSRC / "bindings" / f"{op}.cpp" for op in OPS),
        *(copies / f"{op}.cpp" for op in OPS),
    ]
    common = [
        os.environ.get("CXX", "g++"),
        *("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
        *("-DFASTINTERP_WITH_CUDA", f"-I{pybind11.get_include()}", f"-I{cuda_include()}"),
        *(f"-I{sysconfig.get_paths()['include']}", *flags),
    ]

    def compile_one(numbered):
        number, source = numbered
        target = folder / f"{number}.o"
        emulated = ["-include", str(HERE / "emulate.h")]
        subprocess.run([*common, *emulated, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, enumerate(sources)))
    name = f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*common, "-shared", *objects, "-o", str(folder / name)], check=True)


if __name__ == "__main__":
    if cuda_include() is None:
        raise SystemExit("build.py: no cuda_runtime.h; install the CUDA toolkit or set CUDA_HOME")
    build(Path(sys.argv[1]), *sys.argv[2:])
