"""Which device a command runs on: the GPU. Without one that torch can use, a machine that has one is a mistake.

DS_ACCELERATOR=cpu, DeepSpeed's own variable, puts every command on the CPU.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# The oldest driver that runs each major version of CUDA.
# Source: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
ON_THE_CPU = "or set DS_ACCELERATOR=cpu to run on the CPU"
# Of a display or 3D controller of NVIDIA, as the kernel lists PCI devices.
NVIDIA, DISPLAY = "0x10de", "0x03"
# What CUDA_VISIBLE_DEVICES holds where it hides all GPUs; in a job that Slurm gave none it holds NoDevFiles.
NONE_VISIBLE = ("", "-1")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine shows of its GPUs without torch.

    driver: version of NVIDIA's driver, '' if none is loaded.  devices: GPUs that may be opened, as /dev/nvidia0.
    cards: NVIDIA's cards on the PCI bus.  given: GPUs that Slurm gave.  visible: CUDA_VISIBLE_DEVICES, None if not set.
    """

    driver: str
    devices: int
    cards: int
    given: int
    visible: str | None

    @property
    def has_gpu(self) -> bool:
        return bool(self.driver or self.devices or self.cards or self.given)


def find_machine(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Machine:
    """Look for signs of NVIDIA's GPUs.  root: of the file system with /proc, /dev and /sys."""
    loaded = _read(root / "proc/driver/nvidia/version")
    driver = re.search(r"\b\d{3,}(\.\d+)+", loaded)
    cards = [p for p in (root / "sys/bus/pci/devices").glob("*") if _read(p / "vendor").startswith(NVIDIA)]
    given = environment.get("SLURM_GPUS_ON_NODE", "").rpartition(":")[2]
    return Machine(
        driver=driver[0] if driver else loaded and "unknown",
        devices=len(list((root / "dev").glob("nvidia[0-9]*"))),
        cards=sum(_read(card / "class").startswith(DISPLAY) for card in cards),
        given=int(given) if given.isdigit() else 0,
        visible=environment.get("CUDA_VISIBLE_DEVICES"),
    )


def uses_gpu() -> bool:
    """Whether a command runs on the GPU, asked before DeepSpeed decides it in the same way."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and _available()


def ranks_of_node() -> int:
    """How many ranks the launcher, DeepSpeed's or torch's, starts on this node; 1 without one."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def check_device(needs_gpu: bool = False) -> None:
    """Check that there is no GPU here that would be left unused, and one for each rank of this node.

    needs_gpu: no GPU at all is a mistake too.
    Raises: ValueError that says why torch can use no GPU, and the remedy.
    """
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return
    if _available():
        check_ranks(ranks_of_node(), torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        return
    machine = find_machine()
    if machine.has_gpu:
        hidden = f" (CUDA_VISIBLE_DEVICES={machine.visible})" if machine.visible else ""
        fault = "" if torch.version.hip else unusable(machine, torch.__version__, torch.version.cuda)
        raise ValueError(f"{fault or f'torch can use no GPU{hidden}: {_torch_says()}'}, {ON_THE_CPU}")
    if needs_gpu:
        raise ValueError(f"needs_gpu=true, and this machine has no GPU of NVIDIA: use one that has, {ON_THE_CPU}")


def check_ranks(ranks: int, gpus: int, visible: str | None) -> None:
    """Raises: ValueError if a node has more ranks than GPUs.  visible: CUDA_VISIBLE_DEVICES."""
    if ranks > gpus:
        limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ValueError(
            f"{ranks} ranks were started on this node, and torch sees {gpus} GPUs{limit}: start one rank a GPU, with "
            f"`deepspeed --num_gpus {gpus}`, or RANKS_PER_NODE={gpus} under Slurm"
        )


def unusable(machine: Machine, version: str, cuda: str | None) -> str:
    """Why torch can use no GPU of a machine that has one, with the remedy; '' if the machine does not show it.

    version: torch's.  cuda: the version of CUDA that torch is built for, None if for CPUs alone.
    """
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0) if cuda else 0
    needed = f"driver {oldest} or later" if oldest else "a newer one"
    if not cuda:
        seen = f"Slurm gave {machine.given}" if machine.given else "this machine has one"
        return f"torch {version} is built without CUDA and cannot use a GPU ({seen}): install torch's build for CUDA"
    if machine.visible == "NoDevFiles":
        return "Slurm gave this job no GPU (CUDA_VISIBLE_DEVICES=NoDevFiles): ask for one, sbatch --gpus-per-node"
    if machine.visible in NONE_VISIBLE:
        return f"CUDA_VISIBLE_DEVICES='{machine.visible}' hides every GPU: unset it"
    if not machine.driver:
        return f"this machine has a GPU, but no driver of NVIDIA is loaded: install {needed}, for CUDA {cuda} of torch"
    if machine.driver != "unknown" and int(machine.driver.partition(".")[0]) < oldest:
        return (
            f"the NVIDIA driver {machine.driver} is too old for CUDA {cuda}, which torch {version} is built for: "
            f"install {needed}, or a torch for an older CUDA"
        )
    if not machine.devices:
        return (
            "this machine has a GPU, but there is no /dev/nvidia0 here: give this container or job a GPU (docker "
            "--gpus all, apptainer --nv, sbatch --gpus-per-node)"
        )
    return ""


def default_device() -> torch.device:
    """The GPU, or the CPU where there is none or DS_ACCELERATOR=cpu is set; prints which.

    Raises: ValueError, as check_device.
    """
    check_device()
    device = torch.device("cuda" if uses_gpu() else "cpu")
    print(f"runs on {device_name(device)}")
    return device


def device_name(device: torch.device) -> str:
    """A device in words."""
    if device.type != "cuda":
        return "the CPU, as DS_ACCELERATOR=cpu says" if os.environ.get("DS_ACCELERATOR") == "cpu" else "the CPU"
    return torch.cuda.get_device_name(device)


def _available() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is told by check_device
        return torch.cuda.is_available()


def _torch_says() -> str:
    """Torch's own words on why it can use no GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".:")
    return "it sees none"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
