"""The work of data.embed: the meta file of a folder of embeddings, and its sidecars, by any number of processes."""

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.storage.claims import Claim, claim
from data.storage.locations import write_whole
from data.storage.shards import Shard
from data.storage.tars import stats_path
from data.text.embeddings import encode_states, read_empty, to_bytes
from data.text.encoder import TextEncoder, load_encoder
from data.text.meta import EMPTY, META, TextMeta, sidecar_location
from data.text.sidecar_check import check_sidecar, summarize_sidecars
from data.text.sidecars import write_sidecar

# Seconds between looks at what other processes are making.
POLL_SECONDS = 2.0

# Any of encoder, tokens, compute, dtype and cleaning, as TextMeta has them.
Settings = Mapping[str, Any]
# Writes the sidecar of a claimed shard, and calls its last argument with each number of captions done. Returns whether
# there was anything to write.
Write = Callable[[Shard, Claim, Callable[[int], object]], bool]


def open_embeddings(out: Path, chosen: Settings, defaults: Settings) -> tuple[TextEncoder, TextMeta]:
    """The encoder and the meta of a folder of embeddings. A folder that has no meta file is given one.

    Of many processes one writes the meta file. The others wait for it and then load their encoders side by side.
    chosen: settings that a meta file must agree with.  defaults: what a new one has where nothing is chosen.
    Raises: ValueError if a chosen setting is not that of the meta file, or the encoder cannot be used; OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    while not ((out / META).exists() and (out / EMPTY).exists()):
        if held := claim(out / META):
            with held:
                return _load_or_create_meta(out, chosen, defaults)
        time.sleep(POLL_SECONDS)
    return _load_or_create_meta(out, chosen, defaults)


def _load_or_create_meta(out: Path, chosen: Settings, defaults: Settings) -> tuple[TextEncoder, TextMeta]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (out / META).exists():
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
        # The meta file comes first, so that a folder begun with one encoder is never continued with another.
        meta.write(out)
    try:
        read_empty(out, meta)
    except ValueError:
        write_whole(str(out / EMPTY), to_bytes(encode_states(encoder([""])[0], meta.dtype)))
    return encoder, meta


def write_sidecars(
    shards: list[Shard], out: Path, encoder: TextEncoder, meta: TextMeta, batch: int, repair: bool
) -> tuple[int, int]:
    """Write the sidecars that are missing, or with `repair` those with faults too; ends when all are there.

    Returns: how many this process wrote, and how many samples in them have no caption.
    batch: captions that are encoded together.
    Raises: ValueError if states are not finite or too large for the dtype; OSError.
    """
    faulty: set[str] = set()
    if repair:
        faulty = {summary.shard.name for summary in summarize_sidecars(shards, str(out), meta) if summary.faults}
    without_caption = 0

    def write(shard: Shard, held: Claim, progress: Callable[[int], object]) -> bool:
        nonlocal without_caption
        valid = None
        if shard.name in faulty:
            # Another process may have repaired it before this one claimed it.
            report = check_sidecar(shard, str(out), meta)
            if not report.faults():
                return False
            valid = report.valid
        without_caption += write_sidecar(shard, out, encoder, meta.dtype, batch, held, progress, valid)
        return True

    return _share_out(shards, out, faulty, write), without_caption


def _share_out(shards: list[Shard], out: Path, faulty: set[str], write: Write) -> int:
    """Write all sidecars that are missing or faulty, sharing the work with other processes that do the same.

    Ends when all are there, whoever wrote them: what a process that died had begun is done by the others.
    Returns: how many were written here.
    """
    done: set[str] = set()

    def to_do(shard: Shard) -> bool:
        # The stats file is written last, so a sidecar without one was interrupted.
        exists = stats_path(Path(sidecar_location(shard, out))).exists()
        return not exists or (shard.name in faulty and shard.name not in done)

    todo = [shard for shard in shards if to_do(shard)]
    start = random.Random().randrange(len(todo)) if todo else 0
    todo = todo[start:] + todo[:start]  # processes that start together begin at different shards
    written = 0
    with tqdm(total=sum(shard.count for shard in todo), unit="caption", desc="embed") as bar:
        while todo:
            for shard in todo:
                if not to_do(shard) or (held := claim(Path(sidecar_location(shard, out)))) is None:
                    continue
                with held:
                    if not to_do(shard):
                        continue
                    try:
                        written += write(shard, held, bar.update)
                    except OSError:
                        if held.is_held():
                            raise
                        continue  # this took so long that another process was given the shard
                    done.add(shard.name)
            todo = [shard for shard in todo if to_do(shard)]
            if todo:
                bar.set_postfix({"by other processes": len(todo)})
                time.sleep(POLL_SECONDS)
    return written
