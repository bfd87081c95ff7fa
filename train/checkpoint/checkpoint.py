"""A checkpoint that was opened: what its manifest says, whether its files are intact, and its weights."""

import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.text.meta import TextMeta
from model.config import UNetConfig
from train.checkpoint.format import (
    MANIFEST,
    complete_manifest,
    file_sha256,
    part_file,
    read_manifest,
    size_fault,
    step_folders,
)
from train.checkpoint.reader import CheckpointReader, PostHocAverage

# Entries of a manifest that a resume or a model card reads, beside those that Checkpoint keeps.
ENTRIES = ("schedule_step", "samples", "data", "base", "changes", "parameters", "files", "sha256")


@dataclass(slots=True)
class Checkpoint:
    """One checkpoint of a run; its manifest is read once, when it is opened.

    ranks: that wrote it.  config: the run's configuration, as plain dicts.  text: describes the embeddings that the net
    was trained on.  verified: its files were found intact.
    average: takes the place of the moving average that the training kept, if it is given.
    """

    folder: Path
    manifest: dict
    step: int
    ranks: int
    config: dict
    model: UNetConfig
    diffusion_steps: int
    text: TextMeta
    verified: bool = False
    average: PostHocAverage | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """The newest undamaged checkpoint of a run's folder, or the checkpoint of a step's folder.

        All files of a run's checkpoint are verified. A newer one that is damaged is named on stderr and passed over.
        Raises: ValueError if there is none, it is not of this version, or a snapshot; OSError if it cannot be read.
        """
        path = Path(path)
        if (path / MANIFEST).is_file():
            try:
                checkpoint = cls.read(path)
            except ValueError as error:
                raise ValueError(f"{error}: name another checkpoint of the run") from None
            if checkpoint._is_snapshot():
                raise ValueError(f"'{path}' is a snapshot of averages: name a checkpoint of the run")
            return checkpoint
        faults = []
        for folder in step_folders(path):
            try:
                manifest = read_manifest(folder)
            except ValueError as error:
                faults.append(f"'{folder}': {error}")
                continue
            checkpoint = cls._from_manifest(folder, manifest)
            if not (fault := checkpoint.verify()):
                for passed_over in faults:
                    print(f"\nDAMAGED CHECKPOINT {passed_over}. '{folder.name}' before it is taken.\n", file=sys.stderr)
                return checkpoint
            faults.append(f"'{folder}': {fault}")
        raise ValueError(
            f"'{path.absolute()}' has no whole checkpoint{f' ({faults[0]})' if faults else ''}: name the folder of a "
            "run, or a step-NNNNNNNN folder in its checkpoints"
        )

    @classmethod
    def latest(cls, run_dir: Path) -> "Checkpoint | None":
        """The newest complete checkpoint of a run, if there is one; its files are not verified.

        Raises: ValueError if it is not of this version.
        """
        for folder in step_folders(run_dir):
            if manifest := complete_manifest(folder):
                return cls._from_manifest(folder, manifest)
        return None

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """The checkpoint of a step's folder.

        Raises: ValueError if its manifest is missing, damaged or not of this version; OSError if it cannot be read.
        """
        return cls._from_manifest(folder, read_manifest(folder))

    @classmethod
    def _from_manifest(cls, folder: Path, manifest: dict) -> "Checkpoint":
        try:
            if missing := [entry for entry in ENTRIES if entry not in manifest]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            config = manifest["config"]
            model = UNetConfig(**config["model"])
            return cls(
                folder, manifest, int(manifest["step"]), int(manifest["ranks"]), config, model,
                int(config["diffusion_steps"]), TextMeta(**manifest["text"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the manifest in '{folder}' is not one of this version ({error!r})") from None

    def verify(self, rank: int = 0, ranks: int = 1) -> str:
        """What is wrong with the files, '' for nothing.

        Of several ranks each reads its share of them, and the first one looks at the sizes of all.
        Raises: OSError if a file is there and cannot be read: that is a fault of the machine, and not damage.
        """
        if rank == 0 and (fault := size_fault(self.folder, self.manifest)):
            return fault
        hashes = self.manifest["sha256"]
        for name in sorted(hashes)[rank::ranks]:
            try:
                intact = file_sha256(self.folder / name) == hashes[name]
            except FileNotFoundError as error:
                return str(error)
            if not intact:
                return f"the contents of {name} are not those that were written (sha256)"
        self.verified = ranks == 1
        return ""

    def check_intact(self) -> None:
        """Verify the files, if that was not done. Raises: ValueError if they are not intact."""
        if not self.verified and (fault := self.verify()):
            raise ValueError(
                f"'{self.folder}' is not a whole checkpoint ({fault}): name another step-NNNNNNNN folder of the run"
            )

    def _is_snapshot(self) -> bool:
        """Whether it has averages alone."""
        try:
            with safe_open(self.folder / part_file(0), framework="pt") as file:
                return "master" not in file.keys()  # noqa: SIM118 - it is not a dict
        except (OSError, SafetensorError):  # what is damaged is told when it is verified
            return False

    def reader(self) -> CheckpointReader:
        """Reads any part of the flat tensors of all ranks."""
        return CheckpointReader(self.folder, self.ranks)

    def title(self, name: str) -> str:
        """'ema' or 'master' as a title names it: with the length of an average that was made after the run."""
        return f"{name} of length {self.average.length:g}" if self.average and name == "ema" else name

    def weights(self, name: str) -> dict[str, Tensor]:
        """All trained weights in fp32, by name; takes the memory of one copy.

        Of a run with LoRA these are its matrices alone: train.weights.pretrained.net_weights merges them.
        name: 'ema' or 'master'.
        Raises: ValueError if the files, or the snapshots that the average is made of, are not intact.
        """
        self.check_intact()
        reader, weights, start = self.average if self.average and name == "ema" else self.reader(), {}, 0
        for parameter, shape in self.manifest["parameters"].items():
            weights[parameter] = reader.read(name, start, start + prod(shape)).view(shape)
            start += prod(shape)
        return weights
