"""Checkpoints: RUN_DIR/checkpoints/step-NNNNNNNN, one file a rank and a manifest, whole or not there at all.

A rank's file holds its part of the fp32 masters, of their average and of the optimizer's moments. The masters of all
ranks, one after another, are the parameters in the manifest's order, flat, with some padding at the end: so any number
of ranks can cut them anew. There is nothing else to keep: every random draw and the place in the data follow from the
step. train/checkpoint/writer.py writes them.
"""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"


class CheckpointFailed(RuntimeError):
    """None could be written, or none read; raised by all ranks alike."""


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first: those whose manifest and files are all there."""
    return [path for path in sorted((run_dir / "checkpoints").glob("step-????????")) if _is_whole(path)]


def _is_whole(folder: Path) -> bool:
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint.

    Raises: OSError or ValueError if it is not there or damaged.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if (SEAL in manifest or "sha256" in manifest) and manifest != sealed(manifest):
        raise ValueError(f"'{folder / MANIFEST}' is damaged: its checksum is another")
    return manifest


def sealed(manifest: dict) -> dict:
    """The manifest with a checksum of itself."""
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    text = json.dumps(rest)  # in its order, for that of the parameters matters
    return {**json.loads(text), SEAL: hashlib.sha256(text.encode()).hexdigest()}


def file_sha256(path: Path) -> str:
    """As sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def find_fault(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """What is wrong with a checkpoint, '' for nothing; of several ranks each reads its share of the files."""
    try:
        manifest = read_manifest(folder)
        for name, size in manifest["files"].items():
            if (there := (folder / name).stat().st_size) != size:
                return f"{name} has {there} bytes, not {size}"
        for name in sorted(manifest["files"])[rank::ranks]:
            if name in manifest.get("sha256", {}) and file_sha256(folder / name) != manifest["sha256"][name]:
                return f"the contents of {name} are not those that were written (sha256)"
    except (OSError, ValueError, KeyError) as error:
        return str(error) or repr(error)
    return ""
