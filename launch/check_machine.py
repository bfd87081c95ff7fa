"""Can this machine install and run the smoke? Each obstacle is one line with its remedy, before anything is installed.

Run by the Makefile with the Python that shall make .venv; it needs nothing but that Python (3.6 can read it).
"""

import glob
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

# Measured: .venv takes 1.8 GB with torch's CPU build. A CUDA build, the default on Linux, brings some 5 GB more,
# and pip needs room to unpack what it downloads.
NEEDED_GB = 12
NEEDED_AGAIN_GB = 1
PROBE = "#include <Python.h>\n#include <concepts>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"


def python_fault(version=sys.version_info[:2]):
    """Why this Python is too old, too new, or cannot make an environment; None if all is well."""
    if not (3, 10) <= version <= (3, 11):
        return (
            f"Python 3.10 or 3.11 is needed (pillow 9.2.0 has no build for others), and {sys.executable} is "
            f"{version[0]}.{version[1]}: install python3.11 and name it, make PYTHON=/path/to/python3.11"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return (
            f"{sys.executable} cannot make a virtual environment (no ensurepip): "
            f"apt-get install python{version[0]}.{version[1]}-venv, or your system's package of that kind"
        )
    return None


def compiler_fault():
    """Why DeepSpeed could not compile its small C++ op here; None if a file like it compiles."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        return (
            f"no C++ compiler: '{command[0]}' is not on the PATH, and DeepSpeed compiles a small op at its first run: "
            "apt-get install g++, or name yours, make CXX=/path/to/clang++"
        )
    include = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(include, "Python.h")):
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return (
            f"Python's headers are missing (no Python.h in {include}), and DeepSpeed compiles a small op against them: "
            f"apt-get install {package}, or your system's package of that kind"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(PROBE)
        flags = ["-std=c++20", "-fopenmp", "-fPIC", "-shared", "-I" + include, source, "-o", source + ".so"]
        done = subprocess.run(command + flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 0:
        return None
    said = done.stdout.decode(errors="replace").replace(folder + os.sep, "").splitlines()
    reason = next((line for line in said if "error" in line), said[0] if said else "it said nothing")
    return (
        f"'{' '.join(command)}' cannot compile C++20 with OpenMP ({reason}): "
        "install g++ 10 or newer, or clang with libomp-dev"
    )


def disk_fault(folder="."):
    """How much room is missing for .venv; None if there is enough. NEEDED_GB in the environment overrides the need."""
    installed = glob.glob(os.path.join(folder, ".venv", "lib", "*", "site-packages", "torch"))
    needed = float(os.environ.get("NEEDED_GB", NEEDED_AGAIN_GB if installed else NEEDED_GB))
    free = shutil.disk_usage(folder).free / 1e9
    if free >= needed:
        return None
    return (
        f"{free:.1f} GB free in {os.path.abspath(folder)}, and the install may need {needed:g} GB: make room, or if "
        "torch's CPU build will be installed (.venv then takes 1.8 GB), say so, make NEEDED_GB=4"
    )


def main():
    """Print every fault, one line each.

    Raises: SystemExit 1 if there is any.
    """
    # A wrong Python's headers or environments are of no interest.
    faults = [python_fault()]
    if faults == [None]:
        faults = [compiler_fault(), disk_fault()]
    faults = [fault for fault in faults if fault]
    for fault in faults:
        print("cannot set up: " + fault, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
