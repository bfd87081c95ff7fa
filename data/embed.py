"""Captions of shards to sidecar shards of text embeddings: `python -m data.embed shards=DIR out=DIR encoder=NAME`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from tqdm import tqdm

from data.cli import parse
from data.encoder import TextEncoder
from data.shards import Shard, find_shards
from data.sources import write_whole
from data.tars import read_shard, stats_path, write_shard
from data.text import DTYPES, EMPTY, META, TextMeta, sidecar, to_bytes


@dataclass
class Embed:
    """Runs a frozen text encoder over the captions of shards and writes its hidden states beside them.

    A rerun adds what is missing. dtype: float16 or float32, as stored.
    """

    shards: str = MISSING
    out: str = MISSING
    encoder: str = "DeepFloyd/t5-v1_1-xxl"
    tokens: int = 77
    compute: str = "bfloat16"
    dtype: str = "float16"
    batch: int = 64


def embed(args: Embed) -> None:
    """Raises: ValueError if the folder holds embeddings that were made otherwise, or the encoder does not fit."""
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype={args.dtype} must be {' or '.join(DTYPES)}")
    for name, value in (("tokens", args.tokens), ("batch", args.batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    shards, out = find_shards(args.shards), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = TextEncoder(args.encoder, args.tokens, args.compute, device)
    meta = encoder.meta(args.dtype)
    _check_same(meta, out)
    empty = to_bytes(_stored(encoder([""])[0], args.dtype, ""))
    # The meta file comes first, so that a folder begun with one encoder is never gone on with by another.
    meta.write(out)
    # The stats file is written last, so a sidecar without one was cut short.
    missing = [shard for shard in shards if not stats_path(Path(sidecar(shard, out))).exists()]
    without = 0
    with tqdm(total=sum(shard.count for shard in missing), unit="caption", desc="embed") as bar:
        for shard in missing:
            without += _embed_shard(shard, out, encoder, args, bar)
    write_whole(str(out / EMPTY), empty)
    print(f"{out}: {len(shards)} shards of embeddings, {meta.tokens} x {meta.dim} {meta.dtype}, {len(missing)} new")
    if without:
        print(f"{without} samples have no caption and so no embedding; the training will skip them")


def _check_same(meta: TextMeta, out: Path) -> None:
    if not (out / META).exists():
        return
    there = TextMeta.read(out)
    differing = [
        f"{name} {getattr(there, name)!r} there, {getattr(meta, name)!r} now"
        for name in TextMeta.__dataclass_fields__
        if name != "encoder" and getattr(there, name) != getattr(meta, name)
    ]
    if differing:
        raise ValueError(
            f"'{out}' holds embeddings made otherwise ({'; '.join(differing)}): choose another out=, or delete it"
        )


def _embed_shard(shard: Shard, out: Path, encoder: TextEncoder, args: Embed, bar: tqdm) -> int:
    """Write one sidecar; returns how many samples had no caption."""
    samples = list(read_shard(shard.location, {"txt"}))
    captions = [(key, texts["txt"].decode("utf-8", "replace")) for key, texts in samples if "txt" in texts]
    written = []
    for start in range(0, len(captions), args.batch):
        part = captions[start : start + args.batch]
        for (key, caption), states in zip(part, encoder([caption for _, caption in part]), strict=True):
            written.append((key, {"npy": to_bytes(_stored(states, args.dtype, caption))}))
        bar.update(len(part))
    write_shard(Path(sidecar(shard, out)), written)
    return len(samples) - len(captions)


def _stored(states: np.ndarray, dtype: str, caption: str) -> np.ndarray:
    stored = states.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"the states of {caption[:80]!r} reach {np.abs(states).max():.3g}, too large for {dtype}: use dtype=float32"
        )
    return stored


if __name__ == "__main__":
    try:
        embed(parse(Embed))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
