"""Builds fastinterp._core with CMake and Ninja. torch is not needed to build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    def __init__(self, name):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            raise SystemExit(
                "fastinterp needs a C++17 compiler: install g++ or clang++ "
                "(for example the package build-essential), or set CXX to one."
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # An earlier cache may name tools of a build environment that is gone, or remember that
        # there was no nvcc. Objects stay: the same command does not compile them again.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (build / "CMakeFiles").glob("[0-9]*"):  # what an earlier CMake found out
            shutil.rmtree(found)
        configure = [
            "cmake",
            str(ROOT / "csrc"),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        try:
            subprocess.run(configure, cwd=build, check=True)
            subprocess.run(["cmake", "--build", "."], cwd=build, check=True)
            subprocess.run(["cmake", "--install", "."], cwd=build, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "fastinterp: the native build stopped; the compiler's message is above."
            ) from error


setup(ext_modules=[CMakeExtension("fastinterp._core")], cmdclass={"build_ext": CMakeBuild})
