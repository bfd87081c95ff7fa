"""Which shards a dataset has and how many samples each holds."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from data.storage.caption_fields import TXT
from data.storage.locations import (
    absolute,
    can_be_listed,
    is_remote,
    join,
    list_names,
    open_location,
    read_bytes,
    size_of,
    split,
)
from data.storage.tars import BYTES, DIGEST, SOURCE_DIGEST, STATS, scan_shard

logger = logging.getLogger(__name__)

INDEX = "index.json"
# The entry of a shard in the index with its digests for captions beside txt.
CAPTION_DIGESTS = "caption_digests"
# The remedy where an index does not fit its shards.
REINDEX = "run `python -m data.index shards={}` again"


@dataclass(frozen=True, slots=True)
class Shard:
    """One webdataset tar: its path or URL, its number of samples and, if an index gives it, its size in bytes.

    digest: ShardDigest of its txt captions, None if neither the index nor the stats file has it.
    caption_digests: that of captions of other fields, as far as the index has them.
    """

    location: str
    count: int
    size: int | None = None
    digest: str | None = None
    caption_digests: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The file's name, which is its sidecar's too."""
        return split(self.location)[1]

    def digest_of(self, caption: str) -> str | None:
        """ShardDigest of the captions of a field, None if it is not known without reading the tar."""
        return self.digest if caption == TXT else self.caption_digests.get(caption)


def find_shards(where: str | Path, unreadable: dict[str, str] | None = None) -> list[Shard]:
    """The shards of a dataset, in the order of their names or of the list. where: see docs/reference/sources.md.

    Counts come from the index, else from NNNNN_stats.json as img2dataset writes it, else from the tars' headers.
    unreadable: if given, local shards that cannot be counted are left out and put there, by location, with the reason.
    Raises: ValueError if there is no shard or no sample, or if the index does not fit the shards.
    """
    where = str(where)
    try:
        shards = read_index(where) if where.endswith(".json") else _find(where, unreadable)
    except OSError as error:
        raise ValueError(f"the shards '{absolute(where)}' cannot be read: {error}") from None
    if not unreadable and not any(shard.count for shard in shards):
        raise ValueError(f"the {len(shards)} shards of '{where}' hold no samples")
    return shards


def is_folder(where: str) -> bool:
    """Whether a dataset is given as a folder rather than as a list of shards."""
    return not where.endswith((".tar", ".txt", ".json")) and "{" not in where


def locate(where: str) -> list[str]:
    """The locations of the *.tar of a folder, of a brace expression, or of a list in a .txt.

    Raises: ValueError if there are none, or two with the same name; OSError.
    """
    if where.endswith(".txt"):
        lines = read_bytes(where).decode("utf-8").splitlines()
        folder = split(where)[0]
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        found = [name if is_remote(name) else join(folder, name) for name in names]
    elif not is_folder(where):
        found = list(braceexpand(where))
    else:
        if not is_remote(where) and not Path(where).is_dir():
            raise ValueError(
                f"no folder '{absolute(where)}': check the path, or make shards with `python -m data.pack`"
            )
        found = [join(where, name) for name in sorted(list_names(where)) if name.endswith(".tar")]
    if not found:
        raise ValueError(f"no shards (*.tar) in '{where}': make some with `python -m data.pack` or `data.demo`")
    _check_names(found, where)
    return found


def read_index(location: str) -> list[Shard]:
    """The shards that an index lists.

    Raises: ValueError if the file is not an index; OSError.
    """
    folder = split(location)[0]
    try:
        entries = json.loads(read_bytes(location))["shards"]
        rows = [(str(e["shard"]), int(e["samples"]), int(e["bytes"]), e.get(DIGEST) or None) for e in entries]
        others = [dict(e.get(CAPTION_DIGESTS, {})) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{location}' is no index of shards ({error!r}): make it again with `data.index`") from None
    shards = [
        Shard(name if is_remote(name) or "/" in name else join(folder, name), count, size, digest, more)
        for (name, count, size, digest), more in zip(rows, others, strict=True)
    ]
    _check_names([shard.location for shard in shards], location)
    return shards


class Stats(NamedTuple):
    """What the stats file of a shard or of a sidecar says.

    digest: ShardDigest of the captions, None if the tar was not written by our commands.
    sidecar_size: the bytes of a sidecar, None for a shard.
    """

    samples: int
    digest: str | None
    sidecar_size: int | None


def read_stats(location: str) -> Stats | None:
    """What the NNNNN_stats.json beside a tar says; None if there is no such file.

    Of a local shard that was written after its stats file there is no digest, since it may hold other captions.
    Raises: ValueError if the file gives no count; OSError.
    """
    path = location.removesuffix(".tar") + STATS
    try:
        stats = json.loads(read_bytes(path))
        samples, digest = int(stats["successes"]), stats.get(SOURCE_DIGEST) or stats.get(DIGEST)
        size = stats.get(BYTES) if SOURCE_DIGEST in stats else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' has no readable \"successes\" ({error}): delete it and the tar is counted"
        ) from None
    return Stats(samples, None if size is None and _is_older(path, location) else digest, size)


def current_digest(shard: Shard, caption: str = TXT) -> str | None:
    """The digest of a shard as it is now, without reading the tar; None if only that would tell.

    Of a local shard that is what the stats file says, else the index, unless it lies beside the tar and is older. A
    stats file says nothing of captions beside txt.
    Raises: ValueError if a local index says otherwise than the stats file; OSError.
    """
    if is_remote(shard.location):
        return shard.digest_of(caption)
    stats, folder = read_stats(shard.location), split(shard.location)[0]
    if stats and stats.digest:
        if shard.digest not in (None, stats.digest):
            raise ValueError(
                f"the index is out of date: '{shard.location}' was written again since: {REINDEX.format(folder)}"
            )
        if caption == TXT:
            return stats.digest
    try:
        return None if _is_older(join(folder, INDEX), shard.location) else shard.digest_of(caption)
    except FileNotFoundError:  # the index lies elsewhere
        return shard.digest_of(caption)


def _is_older(path: str, tar: str) -> bool:
    """Whether a local file was written before the tar that it describes; False behind a URL."""
    return not is_remote(path) and os.stat(path).st_mtime_ns < os.stat(tar).st_mtime_ns


def _find(where: str, unreadable: dict[str, str] | None) -> list[Shard]:
    """The shards of a folder, a brace expression or a list; counts from the index beside them, if there is one."""
    if is_folder(where) and is_remote(where):  # the index is the list, too
        try:
            return read_index(join(where, INDEX))
        except FileNotFoundError:
            raise ValueError(_needs_index(where)) from None
    found = locate(where)
    folders = {split(location)[0] for location in found}
    if len(folders) == 1:
        try:
            return _match_index(found, read_index(join(folders.pop(), INDEX)), where)
        except FileNotFoundError:
            pass
    if any(is_remote(location) for location in found):
        raise ValueError(_needs_index(where))
    shards = []
    for location in found:
        try:
            shards.append(_count(location))
        except (OSError, ValueError) as error:
            if unreadable is None:
                raise
            unreadable[location] = str(error)
    return shards


def _match_index(found: list[str], index: list[Shard], where: str) -> list[Shard]:
    """The entries of the index for these locations. Raises: ValueError if the index is out of date."""
    by_name, names = {shard.name: shard for shard in index}, [split(location)[1] for location in found]
    new = [name for name in names if name not in by_name]
    gone = sorted(set(by_name) - set(names)) if is_folder(where) else []
    if new or gone:
        raise ValueError(
            f"the index of '{where}' is out of date: {len(new)} shards are not in it and {len(gone)} of its shards "
            f"are gone (such as {(new + gone)[0]}): {REINDEX.format(where)}"
        )
    return [by_name[name] for name in names]


def _needs_index(where: str) -> str:
    problem = f"'{where}' has no {INDEX}, and shards behind URLs are not counted again at each start: "
    command = f"python -m data.index shards='{where}'"
    if is_folder(where) and can_be_listed(where):
        return f"{problem}run `{command}`"
    if is_folder(where):
        command = f"python -m data.index shards='{join(where, '{00000..00099}.tar')}'"
    return f"{problem}run `{command} out=FILE.json`, then give data.shards=FILE.json"


def _count(location: str) -> Shard:
    if stats := read_stats(location):
        return Shard(location, stats.samples, digest=stats.digest)
    scan = scan_shard(location)
    if scan.damage:
        logger.warning("%s: only its first %d samples can be read: %s", location, scan.samples, scan.damage)
    return Shard(location, scan.samples, digest=scan.digests[TXT])


def _check_names(locations: list[str], where: str) -> None:
    """Raises: ValueError if two shards have the same name, by which their sidecars are found."""
    name, times = Counter(split(location)[1] for location in locations).most_common(1)[0] if locations else ("", 0)
    if times > 1:
        raise ValueError(
            f"{times} shards of '{where}' are called {name}, and embeddings are found by that name: rename them, or "
            "make them several datasets"
        )


def shard_bytes(location: str) -> int:
    """The size of a shard in bytes.

    Raises: OSError.
    """
    if not is_remote(location):
        return Path(location).stat().st_size
    with open_location(location) as file:
        return size_of(file)
