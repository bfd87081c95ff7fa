"""The captioned pictures that an evaluation takes its prompts from and compares with."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data.config import CaptionConfig
from data.images import preprocess
from data.loader.cursor import RawSample, ShardCursor
from data.progress import each
from data.storage.caption_fields import TXT
from data.storage.shards import Shard, find_shards
from data.text.decode import decode_caption
from data.text.embeddings import from_bytes, read_empty
from data.text.meta import TextMeta, check_sidecars
from train.evaluation.evaluated_net import EvaluatedNet


@dataclass
class Pictures:
    """`samples` captioned pictures, chosen at random without replacement from shards.

    caption: the field of their captions.
    Raises: ValueError if there are fewer.
    """

    shards: list[Shard]
    samples: int
    seed: int
    caption: str = field(default=TXT, kw_only=True)

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= self.total:
            raise ValueError(
                f"samples={self.samples}: the shards hold {self.total} captioned pictures; take from 2 to that many"
            )

    @property
    def total(self) -> int:
        return sum(shard.count for shard in self.shards)

    def contents(self) -> tuple[str, str]:
        """Hashes of the captions, and of the files of the pictures, in their order; all of them are read.

        Raises: ValueError if one cannot be read.
        """
        captions, pictures = hashlib.sha256(), hashlib.sha256()
        for raw in each(self._read(0, self.samples, ""), "manifest", "picture", total=self.samples):
            for digest, data in ((captions, raw.caption), (pictures, raw.image)):
                digest.update(len(data).to_bytes(8, "little") + data)
        return captions.hexdigest(), pictures.hexdigest()

    def captions(self, first: int, stop: int) -> list[str]:
        """The captions of the pictures from first to stop.

        Raises: ValueError if one is not UTF-8.
        """
        captions = []
        for raw in self._read(first, stop, ""):
            try:
                captions.append(decode_caption(raw.caption))
            except ValueError as error:
                raise ValueError(_unusable(raw, error)) from None
        return captions

    def pictures(self, first: int, stop: int, image_size: int) -> np.ndarray:
        """The pictures from first to stop, uint8 [n, 3, H, W], preprocessed as in training, but with a central crop.

        Raises: ValueError if one cannot be read.
        """
        unused, pictures = np.random.default_rng(0), []
        for raw in self._read(first, stop, ""):
            try:
                pictures.append(preprocess(raw.image, image_size, 0.0, unused))
            except ValueError as error:
                raise ValueError(_unusable(raw, error)) from None
        return np.stack(pictures)

    def _read(self, first: int, stop: int, text: str) -> Iterator[RawSample]:
        chosen = np.sort(np.random.default_rng(self.seed).permutation(self.total)[: self.samples])[first:stop]
        ends = np.cumsum([shard.count for shard in self.shards])
        shard_of = np.searchsorted(ends, chosen, side="right")
        for number in np.unique(shard_of).tolist():
            shard = self.shards[number]
            cursor = ShardCursor(shard, text, "fail", captions=[CaptionConfig(self.caption)])
            for row in (chosen[shard_of == number] - (ends[number] - shard.count)).tolist():
                raw = cursor.read(row)
                if raw.problem:
                    raise ValueError(_unusable(raw, raw.problem))
                yield raw
            cursor.close()


@dataclass
class EvalSet(Pictures):
    """Pictures with embedded captions; prompt i is the caption of picture i."""

    text: str
    meta: TextMeta

    @property
    def empty(self) -> np.ndarray:
        """The embedding of the empty caption."""
        return read_empty(self.text, self.meta)

    def embeddings(self, first: int, stop: int) -> np.ndarray:
        """The embeddings of the captions from first to stop, [n, tokens, dim].

        Raises: ValueError if one cannot be read.
        """
        raws = list(self._read(first, stop, self.text))
        embeddings = np.empty((len(raws), *self.meta.shape), self.meta.array_dtype)
        for raw, out in zip(raws, embeddings, strict=True):
            try:
                out[:] = from_bytes(raw.embedding, self.meta)
            except (ValueError, OSError) as error:
                raise ValueError(_unusable(raw, error)) from None
        return embeddings


def find_eval_set(shards: str, text: str, samples: int, seed: int, net: EvaluatedNet, caption: str = TXT) -> EvalSet:
    """`samples` pictures of the shards, with the embeddings of their captions in the folder `text`.

    Raises: ValueError if these embeddings are missing, or are not of the encoder that the net was trained with.
    """
    found = find_shards(shards)
    meta = check_sidecars(found, text, net.tokens, net.config.encoder_dim, [caption])
    encoder = (meta.weights_sha256, meta.tokenizer_sha256)
    if net.encoder and net.encoder != encoder:
        raise ValueError(
            f"the captions in '{text}' were embedded by {meta.encoder}, which is not the encoder that the net was "
            "trained with: embed them with that one"
        )
    return EvalSet(found, samples, seed, text, meta, caption=caption)


def _unusable(raw: RawSample, problem: object) -> str:
    return (
        f"{raw.name} cannot be used ({problem}), and without it the score would be of other pictures: repair the shards"
    )
