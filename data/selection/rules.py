"""The rules that choose samples: data.where, data.drop and data.validation.share of a training."""

import hashlib
import json
import shlex
from dataclasses import dataclass

from data.storage.locations import join, open_location, split
from data.storage.shards import INDEX

# Enters the digest: a change of what the rules mean makes new selections.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Rules:
    """What is chosen of a dataset. No rule at all is false.

    where: an expression over the fields, '' for all.  drop: lists of samples that are left out.
    share: of the samples that are left, which is held apart for validation.
    """

    where: str = ""
    drop: tuple[str, ...] = ()
    share: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.where.strip() or self.drop or self.share)

    def digest(self) -> str:
        """A hash that changes with the rules; the lists count by their contents, wherever they lie.

        Raises: OSError if a list can't be read.
        """
        lists = [_contents(location) for location in self.drop]
        text = json.dumps([VERSION, self.where.strip(), lists, self.share])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def command(self, shards: str) -> str:
        """The command that makes the selection of these rules."""
        parts = ["python -m data.index", f"shards={shlex.quote(shards)}"]
        parts += [f"where={shlex.quote(self.where)}"] if self.where else []
        parts += [f"drop={shlex.quote(','.join(self.drop))}"] if self.drop else []
        parts += [f"validation_share={self.share}"] if self.share else []
        return " ".join(parts)


def selection_location(shards: str, digest: str) -> str:
    """Where the selection of some rules lies: beside the index of the shards, a folder or the .json of an index.

    The name of an index that is not index.json is part of it, for several may lie in one folder.
    Raises: ValueError if the shards are given in another way.
    """
    folder, name = split(shards) if shards.endswith(".json") else (shards, INDEX)
    if folder.endswith((".tar", ".txt")) or "{" in folder:
        raise ValueError(
            f"'{shards}': samples are chosen where shards are given as a folder or an index: run "
            f"`python -m data.index shards={shlex.quote(shards)} out=FILE.json`, then give data.shards=FILE.json"
        )
    of = "" if name == INDEX else f"{name.removesuffix('.json')}-"
    return join(folder, f"selection-{of}{digest[:16]}.safetensors")


def _contents(location: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open_location(location) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
