"""A folder of a checkpoint or snapshot that is being written: a file of each rank, then the manifest and the rename."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from data.storage.atomic import flush_to_disk
from train.checkpoint.format import MANIFEST, file_sha256, part_file, sealed
from train.faults.checksum import checksum
from train.faults.quarantine import node_name


class WrongFile(OSError):
    """A file does not hold what was to be written.  what: says which tensors."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: the memory, the bus or the storage of {node_name()} makes errors")
        self.what = what


class NewFolder:
    """Copies a rank's tensors to the host when it is made; its methods then touch files and host memory alone.

    aside: where the files are written.
    """

    def __init__(self, folder: Path, state: dict[str, Tensor]) -> None:
        self._folder, self.aside = folder, folder.with_suffix(".part")
        self._sums = {name: int(checksum([value])) for name, value in state.items()}
        self._copy = {name: value.to("cpu", copy=True) for name, value in state.items()}

    def write(self, rank: int) -> tuple[int, str]:
        """Write the rank's file; returns its size and SHA-256.

        Raises: WrongFile if it is not what was on the device; OSError or SafetensorError if it cannot be written.
        """
        # run_dir itself is not created: if it is gone, so is the disk it was on, and nothing belongs on the disk
        # below its mount point.
        self.aside.parent.mkdir(exist_ok=True)
        self.aside.mkdir(exist_ok=True)
        file = self.aside / part_file(rank)
        save_file(self._copy, file)
        flush_to_disk(file)
        written = load_file(file)
        if changed := [name for name, value in self._sums.items() if int(checksum([written[name]])) != value]:
            raise WrongFile(f"{', '.join(changed)} is not in the file as it was on the device")
        return file.stat().st_size, file_sha256(file)

    def publish(self, written: Sequence[tuple[int, str]], manifest: dict) -> None:
        """Write the manifest and rename, once all ranks have written.  written: size and SHA-256 of each rank's file.

        Raises: OSError.
        """
        files = {part_file(rank): size for rank, (size, _) in enumerate(written)}
        hashes = {part_file(rank): sha256 for rank, (_, sha256) in enumerate(written)}
        for name, size in files.items():
            if (self.aside / name).stat().st_size != size:  # no such file: that rank wrote to a disk of its own
                raise OSError(f"{name} has another size than its rank wrote")
        text = json.dumps(sealed({**manifest, "files": files, "sha256": hashes}), indent=1) + "\n"
        (self.aside / MANIFEST).write_text(text, encoding="utf-8")
        flush_to_disk(self.aside / MANIFEST)
        shutil.rmtree(self._folder, ignore_errors=True)
        os.replace(self.aside, self._folder)
        flush_to_disk(self._folder.parent)
