"""What a run is told of its data."""

from dataclasses import dataclass, field

# Above this Pillow warns, and above twice this it refuses to crop.
PILLOWS_LIMIT = 89_478_485


@dataclass(slots=True)
class ImageRules:
    """What is decoded, and how.

    allow_webp: the libwebp 1.2.2 in Pillow 9.2.0 has a known hole (CVE-2023-4863); only for files that one trusts.
    background: grey level, 0 to 255, behind what is transparent.
    max_pixels, max_bytes: largest image that is decoded.
    """

    allow_webp: bool = False
    background: int = 255
    max_pixels: int = 64_000_000
    max_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        if not 0 <= self.background <= 255:
            raise ValueError(f"background={self.background}: must be a grey level from 0 to 255")
        if not 1 <= self.max_pixels <= PILLOWS_LIMIT:
            raise ValueError(f"max_pixels={self.max_pixels}: must be from 1 to {PILLOWS_LIMIT}, Pillow's own limit")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes}: must be at least 1")


@dataclass(slots=True)
class DatasetConfig:
    """One dataset of a mixture.  weight: its share of every batch, in any unit."""

    shards: str
    text: str
    weight: float = 1.0


@dataclass(slots=True)
class TextConfig:
    """Where text embeddings come from.

    mode: 'stored' reads them from data.text; 'online' runs the frozen encoder that its meta file names on every rank.
    encoder: where that lies now, if not where the meta file says.
    """

    mode: str = "stored"
    encoder: str = ""


@dataclass(slots=True)
class DataConfig:
    """Where the samples lie and how they are read; see docs/data.md.

    shards, text: image shards and their embeddings, as docs/sources.md has it.  mixture: several such pairs by name, in
    place of shards and text.  tokens: length of an embedding.
    crop_shift: largest shift of the crop from the centre, as a share of its side.
    cond_drop_prob: share of captions replaced by the empty one.
    streams, phases, shuffle_block: see data.loader.order.  workers: loader processes per rank, 0 reads in the trainer.
    images: what is decoded.  max_bad_share: the run stops when more of the samples than this cannot be used.
    unreadable_shard: 'skip' makes bad samples of what cannot be read, 'fail' ends the run.
    """

    shards: str = "shards"
    text: str = "text"
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    tokens: int = 77
    crop_shift: float = 0.1
    cond_drop_prob: float = 0.1
    streams: int = 8
    phases: int = 2
    shuffle_block: int = 256
    workers: int = 1
    images: ImageRules = field(default_factory=ImageRules)
    max_bad_share: float = 0.05
    unreadable_shard: str = "skip"

    def datasets(self) -> list[DatasetConfig]:
        """Those of the mixture, or the one."""
        return list(self.mixture.values()) or [DatasetConfig(self.shards, self.text)]
