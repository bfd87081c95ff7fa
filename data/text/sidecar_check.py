"""Comparing sidecars with the captions of their shards; needs no encoder."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from data.progress import each
from data.storage.caption_fields import TXT, caption_extensions, find_captions
from data.storage.digests import ShardDigest
from data.storage.locations import can_be_listed, file_size, is_remote, join, list_names, open_location, size_of
from data.storage.machine import raise_if_machine
from data.storage.shards import Shard, current_digest
from data.storage.tar_headers import DamagedTar
from data.storage.tars import ShardReader, Span, printable_key, read_shard, sample_name, scan_shard, stats_location
from data.text.decode import is_text
from data.text.distinct import DistinctCaptions
from data.text.embeddings import loaded_array, read_empty, read_into
from data.text.meta import TextMeta, caption_folder, sidecar_location
from data.text.sidecar_record import SidecarRecord, checksum

# Sidecars that are read at once; and how many faulty ones are printed.
READERS, MAX_PRINTED = 4, 20
# Held by the reader that adds its captions to those that are counted.
ADDING = Lock()
# Why a sidecar is made anew.
CHANGED, DAMAGED = "changed", "damaged"


@dataclass(slots=True)
class SidecarReport:
    """What a sidecar holds, compared with the captions of its shard.

    captions: how many the shard has.
    valid: by caption_digest, where the right embeddings lie in the sidecar, None behind a URL.
    missing: keys without an embedding.  stale: keys whose caption has changed since.  damaged: keys whose embedding is
    not as it was written.  extra: keys in the sidecar that have no caption.
    not_text: SHARD:KEY of each caption that is not UTF-8, which has no embedding; that is no fault.
    in_order: whether the embeddings are in the order of the samples.
    of_other_samples: whether the record names another shard digest, though perhaps the captions are the same.
    unreadable: why the sidecar could not be read to its end, or ''.
    shard_unreadable: why the shard itself could not be; then nothing is known of the sidecar.
    """

    captions: int = 0
    valid: dict[str, Span | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    not_text: list[str] = field(default_factory=list)
    in_order: bool = True
    of_other_samples: bool = False
    unreadable: str = ""
    shard_unreadable: str = ""

    def faults(self) -> str:
        """All that is wrong, in one line; '' if nothing is."""
        lists = {"missing": self.missing, "stale": self.stale, "damaged": self.damaged, "extra": self.extra}
        faults = [f"{len(keys)} {what} (first: {printable_key(keys[0])})" for what, keys in lists.items() if keys]
        if not self.in_order:
            faults.append("in another order than the samples")
        if self.of_other_samples and not faults:
            faults.append("made when the shard had other samples")
        if self.unreadable:
            faults.append(self.unreadable)
        return "; ".join(faults)


class SidecarSummary(NamedTuple):
    """The numbers of a SidecarReport, without its keys: of very many sidecars all can be held in memory."""

    shard: Shard
    captions: int
    valid: int
    faults: str
    not_text: list[str]
    shard_unreadable: str


def check_sidecar(
    shard: Shard, folder: str, meta: TextMeta, caption: str = TXT, distinct: DistinctCaptions | None = None
) -> SidecarReport:
    """Read a sidecar whole and compare it with the captions of a field of its shard.

    folder: of the sidecars of that field.  distinct: the captions are added to it.
    """
    texts: list[bytes] = []
    digests, not_text, source = {}, [], ShardDigest()
    try:
        for key, members in read_shard(shard.location, caption_extensions([caption])):
            data = find_captions(members, [caption]).get(caption)
            digest = source.add(key, data)
            if data is not None and is_text(data):
                digests[key] = digest
                texts.append(data)
            elif data is not None:
                not_text.append(sample_name(shard.name, key))
    except DamagedTar as error:
        return SidecarReport(shard_unreadable=str(error))
    except OSError as error:
        raise_if_machine(error, shard.location)
        return SidecarReport(shard_unreadable=error.strerror or str(error))
    if distinct:
        with ADDING:
            distinct.add(texts)
    report, keys = SidecarReport(captions=len(digests), not_text=not_text), []
    sidecar = sidecar_location(shard, folder)
    try:
        record = SidecarRecord.read(sidecar)
        report.of_other_samples = record.source != source.hexdigest()
        for key, span, npy, written_digest, written_checksum in _embeddings(sidecar, record):
            keys.append(key)
            if key not in digests:
                report.extra.append(key)
            elif checksum(npy) != written_checksum or not _is_embedding(npy, meta):
                report.damaged.append(key)
            elif digests[key] != written_digest:
                report.stale.append(key)
            else:
                report.valid[written_digest] = span
    except (OSError, DamagedTar, ValueError) as error:
        if isinstance(error, OSError):
            raise_if_machine(error, sidecar_location(shard, folder))
        report.unreadable = str(error)
    missing = set(digests).difference(keys)
    report.missing = [key for key in digests if key in missing]
    report.in_order = [key for key in keys if key in digests] == [key for key in digests if key not in missing]
    return report


def _embeddings(location: str, record: SidecarRecord) -> Iterator[tuple[str, Span | None, bytes, str, str]]:
    """key, Span (None behind a URL), bytes, recorded digest and recorded checksum of each embedding.

    Raises: ValueError, also at the end if the sidecar has another size than was recorded; OSError.
    """
    recorded = zip(record.digests, record.checksums, strict=False)
    with open_location(location) as file:
        size = size_of(file)
        reader = ShardReader(file, {"npy"}, spans=not is_remote(location))
        while (sample := reader.sample()) is not None:
            key, members = sample
            found = members.get("npy", b"")
            span = found if isinstance(found, Span) else None
            yield key, span, span.read() if span else found, *next(recorded, ("", ""))
    if size != record.size:
        raise ValueError(f"it has {size} bytes, {record.size} were written")


def _is_embedding(npy: bytes, meta: TextMeta) -> bool:
    try:
        read_into(loaded_array(meta), npy, meta)
        return True
    except ValueError:
        return False


def summarize_sidecars(
    shards: list[Shard], folder: str, meta: TextMeta, caption: str = TXT, distinct: DistinctCaptions | None = None
) -> list[SidecarSummary]:
    """check_sidecar for all shards, by threads, whose progress is told."""

    def summarize(shard: Shard) -> SidecarSummary:
        found = check_sidecar(shard, folder, meta, caption, distinct)
        return SidecarSummary(
            shard, found.captions, len(found.valid), found.faults(), found.not_text, found.shard_unreadable
        )

    with ThreadPoolExecutor(READERS) as readers:
        return list(each(readers.map(summarize, shards), "check", "shard", total=len(shards)))


def find_outdated(shards: list[Shard], folder: str, caption: str = TXT) -> tuple[dict[str, str], dict[str, str]]:
    """The sidecars that are not of their shards' captions of today, by the stats files; no embedding is read.

    Of a shard whose digest is not known the headers and captions are read.
    Returns: by shard name, why its sidecar is to be made anew; and why a shard cannot be read.
    """

    def compare(shard: Shard) -> tuple[str, str]:
        try:
            if (digest := current_digest(shard, caption)) is None:
                scan = scan_shard(shard.location, [caption])
                if scan.damage:
                    return "", scan.damage
                digest = scan.digests[caption]
        except OSError as error:
            raise_if_machine(error, shard.location)
            return "", error.strerror or str(error)
        try:
            sidecar = sidecar_location(shard, folder)
            record = SidecarRecord.read(sidecar)
            return CHANGED if record.source != digest else DAMAGED if file_size(sidecar) != record.size else "", ""
        except (OSError, ValueError) as error:
            if is_remote(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # a storage that does not answer says nothing of the sidecar
            return DAMAGED, ""

    # A sidecar without its stats file is missing rather than outdated.
    names = set(list_names(folder))
    there = [shard for shard in shards if stats_location(shard.name) in names]
    with ThreadPoolExecutor(READERS) as readers:
        found = each(readers.map(compare, there), "compare", "shard", total=len(there))
        named = [(shard.name, *reasons) for shard, reasons in zip(there, found, strict=True)]
    return {name: why for name, why, _ in named if why}, {name: problem for name, _, problem in named if problem}


def check_embeddings(shards: list[Shard], out: str, unreadable: dict[str, str], caption: str = TXT) -> None:
    """Read all captions of a field and all embeddings of them, and print what does not agree.

    out: the folder of the embeddings, with meta.json.

    unreadable: shards that are not among the others, since they cannot be read, with the reason.
    Raises: ValueError if anything does not agree; OSError.
    """
    meta, folder = TextMeta.read(out), caption_folder(out, caption)
    read_empty(out, meta)
    distinct = DistinctCaptions()
    summaries = summarize_sidecars(shards, folder, meta, caption, distinct)
    unreadable = unreadable | {s.shard.name: s.shard_unreadable for s in summaries if s.shard_unreadable}
    faulty = [summary for summary in summaries if summary.faults]
    for summary in faulty[:MAX_PRINTED]:
        print(f"{summary.shard.name}: {summary.faults}")
    if extra := _extra_sidecars(shards, folder):
        print(f"{len(extra)} sidecars belong to none of these shards, which harms nothing: {', '.join(extra[:3])}")
    if line := not_text_line([key for summary in summaries for key in summary.not_text]):
        print(line)
    captions, valid = sum(summary.captions for summary in summaries), sum(summary.valid for summary in summaries)
    if line := distinct.repeats(captions):
        print(f"{captions:,} captions: {line}")
    problems = []
    if faulty:
        problems.append(
            f"{len(faulty)} of {len(summaries)} sidecars in '{folder}' are not right, {valid} of {captions} captions "
            "have their embedding: run data.embed with mode=repair, which makes anew only what is wrong"
        )
    if unreadable:
        problems.append(unreadable_line(unreadable))
    if problems:
        raise ValueError("; ".join(problems))
    print(f"{folder}: {captions} captions in {len(summaries)} shards have their embeddings")


def unreadable_line(shards: dict[str, str]) -> str:
    """What is said of shards that cannot be read.  shards: the reasons by name."""
    named = ", ".join(f"{name} ({reason})" for name, reason in list(shards.items())[:MAX_PRINTED])
    more = f" and {len(shards) - MAX_PRINTED} more" if len(shards) > MAX_PRINTED else ""
    return f"{len(shards)} shards cannot be read: {named}{more}; mend or remove them, then run data.embed again"


def cleaned_away_line(keys: list[str], cleaning: str) -> str:
    """What is said of captions of which the cleaning leaves nothing, '' if there are none.  keys: SHARD:KEY of each."""
    if not keys:
        return ""
    count = "1 caption is" if len(keys) == 1 else f"{len(keys)} captions are"
    return (
        f"{count} empty after cleaning={cleaning} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}), which "
        "removes Chinese, Japanese and Korean characters among others: the training sees no caption there; "
        "cleaning=lower-strip with another out= keeps them"
    )


def not_text_line(keys: list[str]) -> str:
    """What is said of captions that are not UTF-8, '' if there are none.  keys: SHARD:KEY of each."""
    if not keys:
        return ""
    return (
        f"{len(keys)} captions are not UTF-8 ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}) and have no "
        "embedding, as if there were none: write them in UTF-8 and run data.embed again"
    )


def _extra_sidecars(shards: list[Shard], folder: str) -> list[str]:
    """The sidecars in a folder that belong to none of the shards; none where the folder can't be listed."""
    if not can_be_listed(folder) or not (is_remote(folder) or os.path.isdir(folder)):
        return []
    names = {shard.name for shard in shards}
    return [join(folder, name) for name in sorted(list_names(folder)) if name.endswith(".tar") and name not in names]
