"""Check that this machine can install the project, before anything is installed; each fault is a line with its remedy.

The Makefile runs it with the Python that will make .venv. It needs nothing else, and Python 3.6 can read it.
"""

import glob
import os
import re
import shutil
import sys

# Measured: .venv takes 1.8 GB with torch's CPU build. A CUDA build, the default on Linux, takes some 5 GB more, and pip
# needs space to unpack what it downloads.
NEEDED_GB = 12
NEEDED_AGAIN_GB = 1
# CUDA's major version that torch's build in constraints.txt is for, and the oldest driver that runs it.
DRIVER_OF_PINNED_CUDA = (13, 580)


def python_fault(version=sys.version_info[:2]):
    """Why this Python cannot be used: too old, too new, or unable to make an environment; None if it can."""
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


def disk_fault(folder="."):
    """The space that .venv lacks in a folder, None if it has enough; the variable NEEDED_GB says how much is enough."""
    installed = glob.glob(os.path.join(folder, ".venv", "lib", "*", "site-packages", "torch"))
    needed = float(os.environ.get("NEEDED_GB", NEEDED_AGAIN_GB if installed else NEEDED_GB))
    free = shutil.disk_usage(folder).free / 1e9
    if free >= needed:
        return None
    return (
        f"{free:.1f} GB free in {os.path.abspath(folder)}, and the install may need {needed:g} GB: free some, or if "
        "torch's CPU build is to be installed (.venv then takes 1.8 GB), say so with make NEEDED_GB=4"
    )


def driver_note(version="/proc/driver/nvidia/version"):
    """What to do if the GPU's driver is too old for the torch that is installed; None if it is not, or there is none.

    version: the file in which the driver names itself.
    """
    try:
        with open(version) as file:
            driver = re.search(r"\b(\d{3,})(\.\d+)+", file.read())
    except OSError:
        return None
    cuda, oldest = DRIVER_OF_PINNED_CUDA
    if not driver or int(driver.group(1)) >= oldest:
        return None
    return (
        f"the NVIDIA driver {driver.group(0)} is too old for CUDA {cuda}, which the pinned torch is built for, so that "
        f"it cannot use this machine's GPU: install driver {oldest} or later"
    )


def main():
    """Print every fault, one line each, and what does not keep the install from going on.

    Raises: SystemExit 1 if there is any.
    """
    faults = [fault for fault in (python_fault(), disk_fault()) if fault]
    for fault in faults:
        print("cannot set up: " + fault, file=sys.stderr)
    note = driver_note()
    if note:
        print("note: " + note, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
