"""The work of data.embed: the meta file of a folder of embeddings, and its sidecars, by any number of processes."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.device import default_device
from data.progress import Progress
from data.storage.caption_fields import TXT
from data.storage.claims import Claim
from data.storage.locations import exists, join, list_names, make_folder, write_whole
from data.storage.object_claims import ObjectClaim, claim_location
from data.storage.shards import Shard
from data.storage.tars import stats_location
from data.text.embeddings import encode_states, read_empty, to_bytes
from data.text.encoder import TextEncoder, load_encoder
from data.text.lowrank import measure_channels
from data.text.meta import EMPTY, LOWRANK, META, TextMeta, sidecar_location
from data.text.sidecar_check import DAMAGED, check_sidecar, find_outdated, summarize_sidecars
from data.text.sidecars import UnreadableShard, write_sidecar
from data.text.some_captions import MEASURED, encode_captions, some_captions

# Seconds between looks at what other processes are making.
POLL_SECONDS = 2.0
# Captions that are encoded together where the channels of lowrank are measured.
MEASURED_BATCH = 16

# Any of encoder, tokens, compute, dtype, error and cleaning, as TextMeta has them.
Settings = Mapping[str, Any]
# Writes the sidecar of a claimed shard, and calls its last argument with each number of captions done.
Write = Callable[[Shard, Claim | ObjectClaim, Callable[[int], object]], None]


def open_embeddings(
    out: str, chosen: Settings, defaults: Settings, shards: list[Shard], caption: str = TXT
) -> tuple[TextEncoder, TextMeta]:
    """The encoder and the meta of a folder of embeddings. A folder that has no meta file is given one.

    Of many processes one writes the meta file. The others wait for it and then load their encoders side by side.
    chosen: settings that a meta file must agree with.  defaults: what a new one has where nothing is chosen.
    shards, caption: whose captions a new lowrank is measured on.
    Raises: ValueError if a chosen setting is not that of the meta file, or the encoder cannot be used; OSError.
    """
    if "error" in chosen and {**defaults, **chosen}["dtype"] != LOWRANK and not exists(join(out, META)):
        raise ValueError(f"error={chosen['error']:g} belongs to dtype=lowrank: add that, or leave out error")
    device = default_device()
    make_folder(out)
    while not (exists(join(out, META)) and exists(join(out, EMPTY))):
        if held := claim_location(join(out, META)):
            with held:
                return _load_or_create_meta(out, chosen, defaults, device, shards, caption, held)
        time.sleep(POLL_SECONDS)
    return _load_or_create_meta(out, chosen, defaults, device, shards, caption)


def _load_or_create_meta(
    out: str, chosen: Settings, defaults: Settings, device: torch.device, shards: list[Shard], caption: str,
    held: Claim | ObjectClaim | None = None,
) -> tuple[TextEncoder, TextMeta]:  # fmt: skip
    if exists(join(out, META)):
        meta = TextMeta.read(out)
        differing = [
            f"{name} {getattr(meta, name)} there, {value} now"
            for name, value in chosen.items()
            if name != "encoder" and getattr(meta, name) != value
        ]
        if differing:
            raise ValueError(
                f"'{out}' holds embeddings made otherwise ({'; '.join(differing)}): choose another out=, or delete it"
            )
        try:
            encoder = load_encoder(meta, chosen.get("encoder", ""), device)
        except ValueError as error:
            raise ValueError(f"{error}; or choose another out=, or delete '{out}'") from None
    else:
        settings = {**defaults, **chosen}
        name, tokens, compute = settings["encoder"], settings["tokens"], settings["compute"]
        encoder = TextEncoder(name, tokens, compute, device, settings["cleaning"])
        meta = encoder.meta(settings["dtype"])
        if meta.dtype == LOWRANK:
            renew = held.renew if held else lambda: None
            renew()
            measured = encode_captions(encoder, some_captions(shards, MEASURED, caption), MEASURED_BATCH, renew)
            if exists(join(out, META)):  # this took so long that another process was given the claim
                return _load_or_create_meta(out, chosen, defaults, device, shards, caption)
            meta = replace(meta, error=settings["error"], channels=measure_channels(*measured).to_text())
        # The meta file comes first, so that a folder begun with one encoder is never continued with another.
        meta.write(out)
    try:
        read_empty(out, meta)
    except ValueError:
        write_whole(join(out, EMPTY), to_bytes(encode_states(encoder([""])[0], meta.exact.dtype)))
    return encoder, meta


@dataclass(slots=True)
class Work:
    """What a process did.

    new: sidecars that were missing.  anew: those that were there and had to be made anew, by the reason; `embedded` and
    `kept` are captions of these.  without_caption, not_text, cleaned_away: as in Written, of all that were written.
    unreadable: the reason by name for each shard that could not be read.
    """

    new: int = 0
    anew: Counter[str] = field(default_factory=Counter)
    embedded: int = 0
    kept: int = 0
    without_caption: int = 0
    not_text: list[str] = field(default_factory=list)
    cleaned_away: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def write_sidecars(
    shards: list[Shard], out: str, encoder: TextEncoder, meta: TextMeta, batch: int, repair: bool, caption: str = TXT
) -> Work:
    """Write the sidecars that are missing or of other captions than their shards have now; ends when all are there.

    Embeddings of captions that did not change are kept. A shard that cannot be read does not stop the others.
    out: the folder of the sidecars of this caption field.
    batch: captions that are encoded together.  repair: read all embeddings, and make anew those that are damaged too.
    Raises: ValueError if states are not finite or too large for the dtype; OSError if something cannot be written.
    """
    work = Work()
    if repair:
        summaries = summarize_sidecars(shards, out, meta, caption)
        outdated = {s.shard.name: DAMAGED for s in summaries if s.faults}
        work.unreadable = {s.shard.name: s.shard_unreadable for s in summaries if s.shard_unreadable}
    else:
        outdated, work.unreadable = find_outdated(shards, out, caption)

    def write(shard: Shard, held: Claim | ObjectClaim, count: Callable[[int], object]) -> None:
        valid = None
        reason = outdated.get(shard.name, "") if exists(sidecar_location(shard, out)) else ""
        if reason:
            report = check_sidecar(shard, out, meta, caption)
            if report.shard_unreadable:
                raise UnreadableShard(report.shard_unreadable)
            if not report.faults():  # another process has made it anew before this one claimed it
                return
            valid = report.valid
        written = write_sidecar(shard, out, encoder, meta, batch, held, count, valid, caption)
        work.without_caption += written.without_caption
        work.not_text += written.not_text
        work.cleaned_away += written.cleaned_away
        if reason:
            work.anew[reason] += 1
            work.embedded, work.kept = work.embedded + written.embedded, work.kept + written.kept
        else:
            work.new += 1

    _share_out(shards, out, set(outdated), write, work.unreadable)
    return work


def _share_out(shards: list[Shard], out: str, outdated: set[str], write: Write, unreadable: dict[str, str]) -> None:
    """Write all sidecars that are missing or outdated, sharing the work with other processes that do the same.

    Ends when all are there, whoever wrote them: what a process that died had begun is done by the others.
    unreadable: shards that are left out, with the reason; those that turn out to be so are put there.
    """
    done: set[str] = set()

    def to_do(shard: Shard) -> bool:
        if shard.name in done or shard.name in unreadable:
            return False
        # The stats file is written last, so a sidecar without one was interrupted.
        return shard.name in outdated or not exists(stats_location(sidecar_location(shard, out)))

    def all_to_do(shards: list[Shard]) -> list[Shard]:
        finished = set(list_names(out)) - {stats_location(name) for name in outdated}  # in one look at the folder
        return [shard for shard in shards if stats_location(shard.name) not in finished and to_do(shard)]

    todo = all_to_do(shards)
    start = random.Random().randrange(len(todo)) if todo else 0
    todo = todo[start:] + todo[:start]  # processes that start together begin at different shards
    captions, counts = sum(shard.count for shard in shards), {shard.name: shard.count for shard in todo}
    settled = captions - sum(counts.values())

    def settle(shard: Shard) -> None:
        """It is done, here or by another process. Its samples without a caption count too."""
        nonlocal settled
        settled += counts.pop(shard.name, 0)
        progress.update(settled - progress.done)

    with Progress("embed", captions, "caption", out, settled) as progress:
        while todo:
            for shard in todo:
                if not to_do(shard):
                    settle(shard)
                    continue
                if (held := claim_location(sidecar_location(shard, out))) is None:
                    continue
                with held:
                    if not to_do(shard):
                        continue
                    try:
                        write(shard, held, progress.update)
                    except UnreadableShard as error:
                        unreadable[shard.name] = str(error)
                        continue
                    except OSError:
                        if held.is_held():
                            raise
                        continue  # this took so long that another process was given the shard
                    done.add(shard.name)
                settle(shard)
            before, todo = todo, all_to_do(todo)
            left = {shard.name for shard in todo}
            for shard in before:
                if shard.name not in left:
                    settle(shard)
            if todo:
                progress.update(0, {"shards by other processes": len(todo)})
                time.sleep(POLL_SECONDS)
