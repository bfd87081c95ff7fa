"""The compiler of compile=true: whether this machine has it, asked before anything starts; no other use of it."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What torch.compile writes for a CPU includes these headers and is built with these flags.
# Source: torch/_inductor/codecache.py, cpp_prefix.h and cpp_builder.py of torch 2.13.
CPP = "#include <Python.h>\n#include <omp.h>\n#include <cmath>\nint threads() { return omp_get_max_threads(); }\n"
CPP_FLAGS = ("-std=c++17", "-fopenmp")
C = "int one(void) { return 1; }\n"


def check_compiler(on_gpu: bool) -> None:
    """Build a small library as torch.compile would: in C++ for a CPU, in C for a GPU, where Triton does the rest.

    Raises: ValueError that names the compiler, what is wrong with it, and the remedy.
    """
    flags: list[str] = []
    if on_gpu:
        # Source: triton/runtime/build.py: CC, or else gcc, or else clang.
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
        language, variable, package, name, source = "C", "CC", "gcc", "f.c", C
    else:
        # Source: torch/_inductor/config.py, cpp.cxx: CXX, or else g++.
        compiler = os.environ.get("CXX") or "g++"
        language, variable, package, name, source = "C++", "CXX", "g++ and python3-dev", "f.cpp", CPP
        flags = [*CPP_FLAGS, f"-I{sysconfig.get_paths()['include']}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(source, encoding="ascii")
        command = [compiler, "-shared", "-fPIC", *flags, str(path), "-o", str(path.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            fault = "" if done.returncode == 0 else f"fails: {_first_error(done.stderr)}"
        except OSError as error:
            fault = f"cannot be started: {error.strerror}"
    if fault:
        raise ValueError(
            f"compile=true needs a {language} compiler, and '{compiler}' {fault}: install {package}, name another one "
            f"in {variable}, or set compile=false"
        )


@contextmanager
def without_torch_compile() -> Iterator[None]:
    """Inside the block torch.compile gives every function back as it is, without loading the compiler: 2 s of a start.

    bitsandbytes wraps four functions in it at import: those of its backend for other devices than CPUs and NVIDIA's
    GPUs, and of 4-bit weights. No training calls them.
    """

    import torch

    def as_it_is(function: Callable | None = None, **_: Any) -> Callable:
        return function or as_it_is

    compile_, torch.compile = torch.compile, as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _first_error(said: str) -> str:
    """The line of a compiler's output that says what is wrong, without the path of the temporary file."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it says nothing"]
    line = next((line for line in lines if "error" in line), lines[-1])
    return line.rpartition("error: ")[2][:200]
