"""Comparing sidecars with the captions of their shards; needs no encoder."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm import tqdm

from data.storage.digests import caption_digest
from data.storage.locations import is_remote, join, list_names, open_location
from data.storage.machine import raise_if_machine
from data.storage.shards import Shard
from data.storage.tar_headers import DamagedTar
from data.storage.tars import ShardReader, Span, read_shard
from data.text.embeddings import from_bytes, read_empty
from data.text.meta import TextMeta, sidecar_location
from data.text.sidecar_record import SidecarRecord, checksum

# Sidecars that are read at once; and how many faulty ones are printed.
READERS, MAX_PRINTED = 4, 20


@dataclass(slots=True)
class SidecarReport:
    """What a sidecar holds, compared with the captions of its shard.

    captions: how many the shard has.  valid: by key, where the right embeddings lie in the sidecar, None behind a URL.
    missing: keys without an embedding.  stale: keys whose caption has changed since.  damaged: keys whose embedding is
    not as it was written.  extra: keys in the sidecar that have no caption.
    in_order: whether the embeddings are in the order of the samples.
    unreadable: why the sidecar could not be read to its end, or ''.
    """

    captions: int = 0
    valid: dict[str, Span | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    in_order: bool = True
    unreadable: str = ""

    def faults(self) -> str:
        """All that is wrong, in one line; '' if nothing is."""
        lists = {"missing": self.missing, "stale": self.stale, "damaged": self.damaged, "extra": self.extra}
        faults = [f"{len(keys)} {what} (first: {keys[0]})" for what, keys in lists.items() if keys]
        if not self.in_order:
            faults.append("in another order than the samples")
        if self.unreadable:
            faults.append(self.unreadable)
        return "; ".join(faults)


class SidecarSummary(NamedTuple):
    """The numbers of a SidecarReport, without its keys: of very many sidecars all can be held in memory."""

    shard: Shard
    captions: int
    valid: int
    faults: str


def check_sidecar(shard: Shard, folder: str, meta: TextMeta) -> SidecarReport:
    """Read a sidecar whole and compare it with the captions of its shard.

    Raises: OSError if the shard itself cannot be read; MachineError.
    """
    digests = {
        key: caption_digest(key, members["txt"])
        for key, members in read_shard(shard.location, {"txt"})
        if "txt" in members
    }
    report, keys = SidecarReport(captions=len(digests)), []
    try:
        for key, span, npy, written_digest, written_checksum in _embeddings(sidecar_location(shard, folder)):
            keys.append(key)
            if key not in digests:
                report.extra.append(key)
            elif checksum(npy) != written_checksum or not _is_embedding(npy, meta):
                report.damaged.append(key)
            elif digests[key] != written_digest:
                report.stale.append(key)
            else:
                report.valid[key] = span
    except (OSError, DamagedTar, ValueError) as error:
        if isinstance(error, OSError):
            raise_if_machine(error, sidecar_location(shard, folder))
        report.unreadable = str(error)
    missing = set(digests).difference(keys)
    report.missing = [key for key in digests if key in missing]
    report.in_order = [key for key in keys if key in digests] == [key for key in digests if key not in missing]
    return report


def _embeddings(location: str) -> Iterator[tuple[str, Span | None, bytes, str, str]]:
    """key, Span (None behind a URL), bytes, recorded digest and recorded checksum of each embedding.

    Raises: ValueError, OSError.
    """
    record = SidecarRecord.read(location)
    recorded = zip(record.digests, record.checksums, strict=False)
    with open_location(location) as file:
        reader = ShardReader(file, {"npy"}, spans=not is_remote(location))
        while (sample := reader.sample()) is not None:
            key, members = sample
            found = members.get("npy", b"")
            span = found if isinstance(found, Span) else None
            yield key, span, span.read() if span else found, *next(recorded, ("", ""))


def _is_embedding(npy: bytes, meta: TextMeta) -> bool:
    try:
        from_bytes(npy, meta)
        return True
    except ValueError:
        return False


def summarize_sidecars(shards: list[Shard], folder: str, meta: TextMeta) -> list[SidecarSummary]:
    """check_sidecar for all shards, by threads, with a progress bar.

    Raises: as check_sidecar.
    """

    def summarize(shard: Shard) -> SidecarSummary:
        report = check_sidecar(shard, folder, meta)
        return SidecarSummary(shard, report.captions, len(report.valid), report.faults())

    with ThreadPoolExecutor(READERS) as readers:
        return list(tqdm(readers.map(summarize, shards), total=len(shards), unit="shard", desc="check"))


def check_embeddings(shards: list[Shard], folder: str) -> None:
    """Read all captions of the shards and all embeddings of a folder, and print what does not agree.

    Raises: ValueError if anything does not agree; OSError.
    """
    meta = TextMeta.read(folder)
    read_empty(folder, meta)
    summaries = summarize_sidecars(shards, folder, meta)
    faulty = [summary for summary in summaries if summary.faults]
    for summary in faulty[:MAX_PRINTED]:
        print(f"{summary.shard.name}: {summary.faults}")
    if extra := _extra_sidecars(shards, folder):
        print(f"{len(extra)} sidecars belong to none of these shards, which harms nothing: {', '.join(extra[:3])}")
    captions, valid = sum(summary.captions for summary in summaries), sum(summary.valid for summary in summaries)
    if faulty:
        raise ValueError(
            f"{len(faulty)} of {len(summaries)} sidecars in '{folder}' are not right, {valid} of {captions} captions "
            "have their embedding: run data.embed with mode=repair, which makes anew only what is wrong"
        )
    print(f"{folder}: {captions} captions in {len(summaries)} shards have their embeddings")


def _extra_sidecars(shards: list[Shard], folder: str) -> list[str]:
    """The sidecars in a folder that belong to none of the shards; none where the folder can't be listed."""
    if is_remote(folder) and not folder.startswith("s3://"):
        return []
    names = {shard.name for shard in shards}
    return [join(folder, name) for name in sorted(list_names(folder)) if name.endswith(".tar") and name not in names]
