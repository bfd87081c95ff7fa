"""How a checkpoint lies on disk: RUN_DIR/checkpoints/step-NNNNNNNN with one file per rank and a manifest.

A rank's file holds its part of the fp32 master weights, of their moving averages and of the optimizer's moments. The
master weights of all ranks, one after another, are the parameters in the manifest's order, flat, with some padding at
the end. So any number of ranks can divide them again. Nothing else is kept: every random draw and the position in the
data follow from the step.
A snapshot, RUN_DIR/snapshots/step-NNNNNNNN, is a checkpoint of the power-function averages alone, in half precision.
"""

import hashlib
import json
from pathlib import Path

from data.checks import check_choice
from data.storage.atomic import atomic_file

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
# The two sets of weights in a checkpoint: their moving average, and the fp32 masters that the optimizer steps.
WEIGHTS = ("ema", "master")
# The folders of a run: of all that it goes on from, and of what averages of any length are made of.
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written, or no checkpoint could be read; all ranks raise it together."""


def check_weights(weights: str, *ema_lengths: float | None) -> None:
    """Raises: ValueError for a name that is none of WEIGHTS, or a length that no average has; None is none."""
    check_choice("weights", weights, WEIGHTS)
    for length in ema_lengths:
        if length is None:
            continue
        from train.weights.power_average import LONGEST  # here, since it imports numpy

        if weights != "ema":
            raise ValueError(f"weights={weights} and ema_length={length:g} are both given: choose one")
        if not 0 < length <= LONGEST:
            raise ValueError(
                f"ema_length={length:g} must be above 0 and at most {LONGEST}: the standard deviation of the profile, "
                "as a share of the steps"
            )


def part_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def step_folder(run_dir: Path, step: int, kind: str = CHECKPOINTS) -> Path:
    """The folder of the checkpoint of a step, or of its snapshot."""
    return run_dir / kind / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def step_folders(run_dir: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """The folders of a run's checkpoints or snapshots, newest first, complete or not."""
    return sorted((run_dir / kind).glob("step-????????"), reverse=True)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: the manifest is undamaged, and every file has its size."""
    return [folder for folder in reversed(step_folders(run_dir)) if complete_manifest(folder)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one.

    It says nothing of newer folders that are incomplete: train.checkpoint.resume and Checkpoint.open name those.
    """
    return next(filter(complete_manifest, step_folders(run_dir)), None)


def complete_manifest(folder: Path) -> dict | None:
    """The manifest of a complete checkpoint; None if it is damaged or unreadable, or a file is missing or cut."""
    try:
        manifest = read_manifest(folder)
        return None if size_fault(folder, manifest) else manifest
    except (OSError, ValueError):
        return None


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint's folder.

    Raises: ValueError if it is missing or damaged; OSError if it is there and cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest != sealed(manifest):
            raise ValueError("its checksum does not fit")
        return manifest
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError) as error:  # the last: no JSON object
        raise ValueError(f"'{path}' is missing or damaged ({error})") from None


def leave_out(folder: Path, entry: dict) -> None:
    """Note in the manifest of a checkpoint a batch that the run leaves out from now on.

    entry: of SpikeMemory.left_out (train/faults/spikes.py).
    Raises: ValueError if the manifest is damaged; OSError if it cannot be read or written.
    """
    manifest = read_manifest(folder)
    spikes = manifest.get("spikes") or {"left_out": []}
    manifest["spikes"] = spikes | {"left_out": [*spikes["left_out"], entry]}
    with atomic_file(folder / MANIFEST) as aside:
        aside.write_text(json.dumps(sealed(manifest), indent=1) + "\n", encoding="utf-8")


def sealed(manifest: dict) -> dict:
    """The manifest with a checksum of itself."""
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    text = json.dumps(rest)  # keys are not sorted, because the order of the parameters matters
    return {**json.loads(text), SEAL: hashlib.sha256(text.encode()).hexdigest()}


def size_fault(folder: Path, manifest: dict) -> str:
    """Which file of a checkpoint is missing or has another size than its manifest says; '' if none."""
    for name, size in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            return str(error)
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return ""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
