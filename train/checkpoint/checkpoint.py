"""A checkpoint that was opened: what its manifest says, whether its files are intact, and its weights."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from data.text.meta import TextMeta
from model.config import UNetConfig
from train.checkpoint.format import (
    MANIFEST,
    complete_manifest,
    file_sha256,
    read_manifest,
    size_fault,
    step_folders,
)
from train.checkpoint.reader import CheckpointReader


@dataclass(slots=True)
class Checkpoint:
    """One checkpoint of a run; its manifest is read once, when it is opened.

    ranks: that wrote it.  config: the run's configuration, as plain dicts.  text: describes the embeddings that the net
    was trained on.
    """

    folder: Path
    manifest: dict
    step: int
    ranks: int
    config: dict
    model: UNetConfig
    diffusion_steps: int
    text: TextMeta

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """The newest complete checkpoint of a run's folder, or the checkpoint of a step's folder.

        Raises: ValueError if there is none, or it is not of this version.
        """
        path = Path(path)
        if (path / MANIFEST).is_file():
            return cls.read(path)
        if checkpoint := cls.latest(path):
            return checkpoint
        raise ValueError(
            f"'{path.absolute()}' has no whole checkpoint: name the folder of a run, or a step-NNNNNNNN folder in its "
            "checkpoints"
        )

    @classmethod
    def latest(cls, run_dir: Path) -> "Checkpoint | None":
        """The newest complete checkpoint of a run, if there is one.

        Raises: ValueError if it is not of this version.
        """
        for folder in step_folders(run_dir):
            if manifest := complete_manifest(folder):
                return cls._from_manifest(folder, manifest)
        return None

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """The checkpoint of a step's folder.

        Raises: ValueError if its manifest is missing, damaged or not of this version.
        """
        return cls._from_manifest(folder, read_manifest(folder))

    @classmethod
    def _from_manifest(cls, folder: Path, manifest: dict) -> "Checkpoint":
        try:
            config = manifest["config"]
            model = UNetConfig(**config["model"])
            return cls(
                folder, manifest, int(manifest["step"]), int(manifest["ranks"]), config, model,
                int(config["diffusion_steps"]), TextMeta(**manifest["text"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the manifest in '{folder}' is not one of this version ({error!r})") from None

    def verify(self, rank: int = 0, ranks: int = 1) -> str:
        """What is wrong with the files, '' for nothing; each of several ranks reads its share of them."""
        if fault := size_fault(self.folder, self.manifest):
            return fault
        hashes = self.manifest["sha256"]
        for name in sorted(hashes)[rank::ranks]:
            try:
                intact = file_sha256(self.folder / name) == hashes[name]
            except OSError as error:
                return str(error)
            if not intact:
                return f"the contents of {name} are not those that were written (sha256)"
        return ""

    def reader(self) -> CheckpointReader:
        """Reads any part of the flat tensors of all ranks."""
        return CheckpointReader(self.folder, self.ranks)

    def weights(self, name: str) -> dict[str, Tensor]:
        """All trained weights in fp32, by name; takes the memory of one copy.

        Of a run with LoRA these are its matrices alone: train.weights.pretrained.net_weights merges them.
        name: 'ema' or 'master'.
        Raises: ValueError if the files are not intact.
        """
        if fault := self.verify():
            raise ValueError(
                f"'{self.folder}' is not a whole checkpoint ({fault}): name another step-NNNNNNNN folder of the run"
            )
        reader, weights, start = self.reader(), {}, 0
        for parameter, shape in self.manifest["parameters"].items():
            weights[parameter] = reader.read(name, start, start + prod(shape)).view(shape)
            start += prod(shape)
        return weights
