"""Captions of shards to sidecar shards of text embeddings: `python -m data.embed shards=DIR out=DIR encoder=NAME`."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.cli import command, location
from data.storage.claims import Claim, claim
from data.storage.locations import write_whole
from data.storage.shards import Shard, find_shards
from data.storage.tars import stats_path
from data.text.captions import CLEANING, cleaner
from data.text.embeddings import encode_states, read_empty, to_bytes
from data.text.encoder import COMPUTE, TextEncoder, load_encoder
from data.text.meta import EMPTY, META, STORED, TextMeta, sidecar
from data.text.sidecars import check_sidecar, extra_sidecars, write_sidecar

MODES = ("embed", "meta", "check", "repair")
# What is taken where neither the arguments nor a meta file says otherwise.
DEFAULTS = {
    "encoder": "DeepFloyd/t5-v1_1-xxl", "tokens": 77, "compute": "bfloat16", "dtype": "float16", "cleaning": CLEANING,
}  # fmt: skip
# Seconds between looks at what other processes have in hand; threads that read while a check is made.
LOOK_AGAIN, READERS = 2.0, 4


@dataclass
class Embed:
    """Runs a frozen text encoder over the captions of shards and writes its hidden states as sidecar shards.

    A rerun makes only what is missing; several processes may work on one folder at once. Where out has a meta file,
    its encoder, tokens, compute, dtype and cleaning are the defaults.

    shards: the image shards, as data.shards of a training.
    out: folder for the embeddings; with mode=check any location that can be read.
    encoder: name on the hub, or folder, of an encoder that transformers loads; DeepFloyd/t5-v1_1-xxl by default.
    tokens: length that captions are cut or padded to; 77 by default.
    compute: bfloat16 (default) or float32, the precision that the encoder runs in.
    dtype: float16 (default), float32, bfloat16 or int8, as which embeddings are stored.
    batch: captions in one forward pass.
    cleaning: if-1 (default) or lower-strip, what is done to captions before the tokenizer, see data/text/captions.py.
    mode: embed; meta writes only the meta file and the empty caption's embedding, for text.mode=online; check compares
    all embeddings with the captions; repair embeds anew what check finds wrong.
    """

    shards: str = location()
    out: str = location()
    encoder: str = location("")
    tokens: int = 0
    compute: str = ""
    dtype: str = ""
    batch: int = 64
    cleaning: str = ""
    mode: str = "embed"


def embed(args: Embed) -> None:
    """Do what the arguments say.

    Raises: ValueError if the folder holds embeddings that were made otherwise, the encoder does not fit, or a check
    finds something wrong; OSError.
    """
    _check_arguments(args)
    out = Path(args.out)
    if args.mode == "check":
        check(find_shards(args.shards), args.out)
        return
    shards = [] if args.mode == "meta" else find_shards(args.shards)
    out.mkdir(parents=True, exist_ok=True)
    encoder, meta = _load_or_create_meta_once(args, out)
    if args.mode == "meta":
        print(f"{out}: the meta file of {meta.encoder}, {meta.tokens} x {meta.dim}, and the empty caption's embedding")
        return
    wrong: set[str] = set()
    if args.mode == "repair":
        wrong = {verdict.shard.name for verdict in _look_at_all(shards, args.out, meta) if verdict.told}
    todo = [shard for shard in shards if not _done(shard, out) or shard.name in wrong]
    without = 0

    def make(shard: Shard, held: Claim, progress: Callable[[int], object]) -> None:
        nonlocal without
        # Looked at once more, for another process may have mended it meanwhile, and only now is it ours.
        found = check_sidecar(shard, args.out, meta) if shard.name in wrong else None
        if found is None or found.told():
            good = found.good if found else None
            without += write_sidecar(shard, out, encoder, meta.dtype, args.batch, held, progress, good)

    mine = _share(todo, out, set(wrong), make)
    print(f"{out}: {len(shards)} shards of embeddings, {meta.tokens} x {meta.dim} {meta.dtype}, {mine} new")
    if without:
        print(f"{without} samples have no caption and so no embedding; the training will skip them")


def _check_arguments(args: Embed) -> None:
    for name, value, known in (
        ("mode", args.mode, MODES),
        ("dtype", args.dtype or "float16", STORED),
        ("compute", args.compute or "float32", COMPUTE),
    ):
        if value not in known:
            raise ValueError(f"{name}={value} must be one of {', '.join(known)}")
    if args.cleaning:
        cleaner(args.cleaning)
    if args.tokens < 0 or args.batch < 1:
        raise ValueError(f"tokens={args.tokens} and batch={args.batch} must be at least 1")


def _load_or_create_meta_once(args: Embed, out: Path) -> tuple[TextEncoder, TextMeta]:
    """Of many processes, one begins the folder; the others wait for it, and then load their encoders side by side."""
    while not ((out / META).exists() and (out / EMPTY).exists()):
        if held := claim(out / META):
            with held:
                return load_or_create_meta(args, out)
        time.sleep(LOOK_AGAIN)
    return load_or_create_meta(args, out)


def load_or_create_meta(args: Embed, out: Path) -> tuple[TextEncoder, TextMeta]:
    """The encoder and the meta of a folder: what its meta file says, or else the arguments, which are written there.

    Raises: ValueError if the arguments are not what the meta file says.
    """
    told = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (out / META).exists():
        meta = TextMeta.read(out)
        differing = [
            f"{name} {getattr(meta, name)} there, {value} now"
            for name, value in told.items()
            if name != "encoder" and getattr(meta, name) != value
        ]
        if differing:
            raise ValueError(
                f"'{out}' holds embeddings made otherwise ({'; '.join(differing)}): choose another out=, or delete it"
            )
        try:
            encoder = load_encoder(meta, args.encoder, device)
        except ValueError as error:
            raise ValueError(f"{error}; or choose another out=, or delete '{out}'") from None
    else:
        chosen: dict[str, Any] = DEFAULTS | told
        encoder = TextEncoder(
            chosen["encoder"], chosen["tokens"], chosen["compute"], device, chosen["cleaning"]
        )  # fmt: skip
        meta = encoder.meta(chosen["dtype"])
        # The meta file comes first, so that a folder begun with one encoder is never gone on with by another.
        meta.write(out)
    try:
        read_empty(out, meta)
    except ValueError:
        write_whole(str(out / EMPTY), to_bytes(encode_states(encoder([""])[0], meta.dtype)))
    return encoder, meta


def _done(shard: Shard, out: Path) -> bool:
    # The stats file is written last, so a sidecar without one was cut short.
    return stats_path(Path(sidecar(shard, out))).exists()


def _share(
    todo: list[Shard], out: Path, wrong: set[str], make: Callable[[Shard, Claim, Callable[[int], object]], None]
) -> int:
    """Make all that is to be done, together with whatever other processes do the same; returns how many were made here.

    It ends when all are there, whoever made them: of one that died, the others do what it had begun.
    """
    made: set[str] = set()
    start = random.Random().randrange(len(todo)) if todo else 0
    todo = todo[start:] + todo[:start]  # so that processes started at once do not all reach for the same
    with tqdm(total=sum(shard.count for shard in todo), unit="caption", desc="embed") as bar:
        while todo:
            for shard in todo:
                if _done(shard, out) and shard.name not in wrong:
                    continue
                if (held := claim(Path(sidecar(shard, out)))) is None:
                    continue
                with held:
                    if _done(shard, out) and shard.name not in wrong:
                        continue
                    try:
                        make(shard, held, bar.update)
                    except FileNotFoundError:
                        if held.holds():
                            raise
                        continue  # it took so long that another process was given it
                    made.add(shard.name)
                    wrong.discard(shard.name)
            todo = [shard for shard in todo if not _done(shard, out) or shard.name in wrong]
            if todo:
                bar.set_postfix({"in other hands": len(todo)})
                time.sleep(LOOK_AGAIN)
    return len(made)


@dataclass(slots=True)
class _Verdict:
    """Of a sidecar: what is wrong with it, if anything; the captions of its shard; how many have their embedding."""

    shard: Shard
    told: str
    captions: int
    right: int


def _look_at_all(shards: list[Shard], folder: str, meta: TextMeta) -> list[_Verdict]:
    def look(shard: Shard) -> _Verdict:
        found = check_sidecar(shard, folder, meta)
        return _Verdict(shard, found.told(), found.captions, len(found.good))

    verdicts = []
    with ThreadPoolExecutor(READERS) as readers, tqdm(total=len(shards), unit="shard", desc="check") as bar:
        for verdict in readers.map(look, shards):
            verdicts.append(verdict)
            bar.update()
    return verdicts


def check(shards: list[Shard], folder: str) -> None:
    """Compare the embeddings of a folder with the captions of the shards, reading all of both, and print what is wrong.

    Raises: ValueError if anything is.
    """
    meta = TextMeta.read(folder)
    read_empty(folder, meta)
    every = _look_at_all(shards, folder, meta)
    wrong = [verdict for verdict in every if verdict.told]
    for verdict in wrong[:20]:
        print(f"{verdict.shard.name}: {verdict.told}")
    if extra := extra_sidecars(shards, folder):
        print(f"{len(extra)} sidecars belong to none of these shards, which harms nothing: {', '.join(extra[:3])}")
    captions, good = sum(verdict.captions for verdict in every), sum(verdict.right for verdict in every)
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(every)} sidecars in '{folder}' are not right, {good} of {captions} captions have "
            "their embedding: run data.embed with mode=repair, which makes anew only what is wrong"
        )
    print(f"{folder}: {captions} captions in {len(every)} shards have their embeddings")


def main(argv: list[str] | None = None) -> None:
    command(embed, Embed, argv)


if __name__ == "__main__":
    main()
