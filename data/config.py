"""The configuration of a run's data: where it lies, how it is read, what is decoded. Imports no torch and no Pillow."""

import math
from dataclasses import dataclass, field, replace

from data.checks import check_at_least, check_choice, check_share, check_size
from data.cli import location
from data.storage.caption_fields import TXT, check_fields

# Above this Pillow warns, and above twice this it refuses to crop.
PILLOWS_LIMIT = 89_478_485


@dataclass(slots=True)
class ImageRules:
    """Which images are decoded, and how.

    allow_webp: decode WebP; only for files that you trust, since Pillow 9.2.0 has libwebp 1.2.2 with CVE-2023-4863.
    background: grey level from 0 to 255 behind transparent pixels.
    max_pixels: largest image that is decoded, width x height.
    max_bytes: largest image file that is decoded.
    """

    allow_webp: bool = False
    background: int = 255
    max_pixels: int = 64_000_000
    max_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        if not 0 <= self.background <= 255:
            raise ValueError(f"data.images.background={self.background} must be a grey level from 0 to 255")
        if not 1 <= self.max_pixels <= PILLOWS_LIMIT:
            raise ValueError(
                f"data.images.max_pixels={self.max_pixels} must lie between 1 and {PILLOWS_LIMIT}, Pillow's own limit"
            )
        check_at_least("data.images.max_bytes", self.max_bytes, 1)


@dataclass(slots=True)
class CaptionConfig:
    """One of the captions of a sample.

    field: txt for KEY.txt; NAME for KEY.NAME.txt, else KEY.NAME, else the entry NAME of KEY.json.
    weight: its share of the draws, in any unit.
    """

    field: str = TXT
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"data.captions: the weight {self.weight} of {self.field} must be above 0")


@dataclass(slots=True)
class DatasetConfig:
    """One dataset of a mixture.

    shards: folder or URL of its image shards.
    text: folder or URL of their text embeddings.
    weight: its share of every batch, in any unit.
    where, drop: rules for this dataset, beside data.where and data.drop, which hold for all.
    """

    shards: str = location()
    text: str = location()
    weight: float = 1.0
    where: str = ""
    drop: list[str] = location([])

    def __post_init__(self) -> None:
        check_where(self.where)


@dataclass(slots=True)
class ValidationConfig:
    """The held-out samples of the validation loss: shards of their own, or a share; docs/guide/evaluation.md.

    share: share of the training's samples, chosen by a hash of the key, that is never trained on; data.index must
        know it.
    shards: folder or URL of image shards that the training does not see.
    text: folder or URL of their text embeddings, of the training's encoder.
    samples: how many of them, taken evenly from all. Of several captions the first is taken that a sample has.
    """

    share: float = 0.0
    shards: str = location("")
    text: str = location("")
    samples: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"data.validation.share={self.share} must be at least 0 and less than 1")
        if self.share and self.shards:
            raise ValueError(
                f"data.validation.share={self.share} and data.validation.shards={self.shards} are two ways to hold "
                "samples apart: give one"
            )
        check_at_least("data.validation.samples", self.samples, 1)
        if bool(self.shards) != bool(self.text):
            raise ValueError(
                f"data.validation.shards='{self.shards}' and data.validation.text='{self.text}' belong together: give "
                "the embeddings of these shards, or neither"
            )


@dataclass(slots=True)
class TextConfig:
    """Where text embeddings come from.

    mode: stored reads them from data.text; online computes them on every rank with the frozen encoder that the
        meta.json in data.text names.
    encoder: where that encoder lies now, if not where meta.json says: a folder, or ORG/NAME@REVISION on the hub.
    cache_gb: GB of the host in which each rank of mode=online may keep the states of all captions, so that the encoder
        runs in the first epochs alone; 0 keeps none. docs/reference/text.md.
    """

    mode: str = "stored"
    encoder: str = location("")
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        check_choice("text.mode", self.mode, ("stored", "online"))
        check_at_least("text.cache_gb", self.cache_gb, 0)
        if self.cache_gb and self.mode == "stored":
            raise ValueError(f"text.cache_gb={self.cache_gb:g} belongs to text.mode=online: stored states are not kept")


@dataclass(slots=True)
class DataConfig:
    """Where the samples lie and how they are read; docs/guide/data.md.

    shards: folder or URL of the image shards; docs/reference/sources.md.
    text: folder or URL of their text embeddings.
    mixture: several datasets by name, each with shards, text and weight, instead of shards and text.
    where: which samples are trained on, an expression over the fields of KEY.json, such as "punsafe < 0.5 and
        min(width, height) >= 64"; data.index evaluates it. docs/guide/data.md.
    drop: .parquet, .csv or .txt files of the keys, URLs or hashes of samples to leave out.
    validation: the held-out samples of the validation loss.
    captions: the captions of a sample by field, with weights; one is drawn for each sample in each epoch.
        docs/guide/data.md.
    tokens: number of tokens of a caption's embedding; 0 takes that of the embeddings' meta.json.
    crop_shift: largest shift of the crop from the centre, as a share of its side.
    cond_drop_prob: share of captions that are replaced by the empty one.
    streams: number of parts of a batch, each read from its own shards; at most global_batch. docs/reference/order.md.
        -1 follows the number of samples.
    phases: number of sets of streams. Successive steps take turns among the sets, so that as many workers can read at
        the same time.
    shuffle_block: samples of a stream that are shuffled together.
    workers: loader processes of a rank; 0 reads in the trainer.
    images: which images are decoded, and how.
    max_bad_share: the run stops when more than this share of the samples cannot be used.
    unreadable_shard: skip counts the samples of a shard that cannot be read as bad, fail ends the run.
    """

    shards: str = location("shards")
    text: str = location("text")
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    where: str = ""
    drop: list[str] = location([])
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    captions: list[CaptionConfig] = field(default_factory=lambda: [CaptionConfig()])
    tokens: int = 0
    crop_shift: float = 0.1
    cond_drop_prob: float = 0.1
    streams: int = 8
    phases: int = 2
    shuffle_block: int = 256
    workers: int = 1
    images: ImageRules = field(default_factory=ImageRules)
    max_bad_share: float = 0.05
    unreadable_shard: str = "skip"

    def __post_init__(self) -> None:
        for name in ("tokens", "crop_shift", "workers"):
            check_at_least(f"data.{name}", getattr(self, name), 0)
        check_size("data.streams", self.streams, 1)
        for name in ("phases", "shuffle_block"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("cond_drop_prob", "max_bad_share"):
            check_share(f"data.{name}", getattr(self, name))
        check_choice("data.unreadable_shard", self.unreadable_shard, ("skip", "fail"))
        check_fields("data.captions", [caption.field for caption in self.captions])
        check_where(self.where)

    def datasets(self) -> list[DatasetConfig]:
        """The datasets of the mixture, or else the one of shards and text, each with all rules that hold for it."""
        return [
            replace(dataset, where=_both(self.where, dataset.where), drop=[*self.drop, *dataset.drop])
            for dataset in self.mixture.values() or [DatasetConfig(self.shards, self.text)]
        ]


def check_where(where: str) -> None:
    """Raises: ValueError if it is no expression over fields."""
    if where.strip():
        from data.selection.where import Where  # here: most configurations have none

        Where(where)


def _both(first: str, second: str) -> str:
    if not first.strip() or not second.strip():
        return first if first.strip() else second
    # A comment would reach over the bracket.
    return " and ".join(f"({text}\n)" if "#" in text else f"({text})" for text in (first, second))
