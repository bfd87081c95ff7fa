"""Inspecting samples of a dataset: their images, captions and embeddings, and which samples are bad and why."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data.config import CaptionConfig
from data.images import BadImage, crop, decode, resize
from data.inspection.choice import Choice
from data.inspection.duplicates import Fingerprint, fingerprint, near_duplicates
from data.loader.cursor import ENDED, TEXT_UNREADABLE, UNREADABLE, RawSample, ShardCursor
from data.loader.draws import Draw, Draws
from data.progress import Progress
from data.storage.caption_fields import TXT
from data.storage.machine import raise_if_machine
from data.storage.shards import Shard
from data.text.decode import decode_caption
from data.text.embeddings import loaded_array, read_into
from data.text.meta import TextMeta

# To reach a sample, all headers before it are read, so a few samples from each of very many shards would take hours.
MAX_SHARDS = 64
MAX_TILES = 96
# Small pictures that are kept, and their pixels, to show samples of which it is told only later that they matter.
MAX_SMALL, SMALL = 20_000, 64


@dataclass(slots=True)
class Tile:
    """One sample as the network sees it: its captions by field, and pixels uint8 [3, S, S].

    place: among the samples looked at.  taken: the number of the rule that took it, from 1, or 0.
    """

    name: str
    captions: dict[str, str]
    pixels: np.ndarray
    place: int = 0
    taken: int = 0


@dataclass(slots=True)
class Picture:
    """The picture of a sample that was looked at.

    place: among the samples looked at.  pixels: width times height.  jpeg: a small one, b'' if it was not kept.
    """

    place: int
    name: str
    key: str
    pixels: int
    print: Fingerprint
    jpeg: bytes


@dataclass(slots=True)
class FieldCaptions:
    """The captions of one field.

    texts: those that are not empty.  missing: how many samples have none, or an empty one.
    not_utf8: how many of the texts are in an encoding that is not read.
    """

    texts: list[str] = field(default_factory=list)
    missing: int = 0
    not_utf8: int = 0

    @property
    def repeated(self) -> int:
        """How many of the texts repeat another one."""
        return len(self.texts) - len(set(self.texts))


@dataclass(slots=True)
class Findings:
    """What was found in the inspected samples.

    inspected: how many samples, from shards_inspected shards.  kinds: format and mode.  sizes: (width, height) as
    stored.  captions: by field.
    bad: (sample, reason), with the reasons under which the training counts them.
    damaged: (location, error) of each tar that could not be read to its end.
    pictures: of the samples that have one, by place.  duplicates: groups of near duplicates among those that no rule
    leaves out, the one with the most pixels first.
    duplicate_list: what is said of the list of them.  choice: what the rules make of these samples.
    """

    inspected: int = 0
    shards_inspected: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    captions: dict[str, FieldCaptions] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    pictures: dict[int, Picture] = field(default_factory=dict)
    duplicates: list[list[Picture]] = field(default_factory=list)
    duplicate_list: str = ""
    choice: Choice | None = None


class TrainingView:
    """Images as a training with this seed sees them in its first epoch."""

    def __init__(self, image_size: int, crop_shift: float, seed: int) -> None:
        self.image_size, self.crop_shift, self.crops = image_size, crop_shift, Draws(seed, Draw.CROP)

    def pixels(self, image: Image.Image, index: int) -> np.ndarray:
        """uint8 [3, S, S] of the decoded image of the sample with this index in the dataset."""
        # In epoch 0 a sample's visit, the key of its draws, is its index: data.loader.order.Order.visit.
        return resize(crop(image, self.crop_shift, self.crops.at(index)), self.image_size)


def choose_rows(counts: list[int], samples: int) -> dict[int, list[int]]:
    """The rows to inspect in each shard, spread evenly; all rows if `samples` is 0.

    counts: samples per shard.
    """
    if samples == 0:
        return {shard: list(range(count)) for shard, count in enumerate(counts) if count}
    filled = np.flatnonzero(counts)
    shards = filled[np.unique(np.arange(MAX_SHARDS) * len(filled) // MAX_SHARDS)]
    ends = np.cumsum(np.asarray(counts)[shards])
    indices = np.unique(np.arange(samples) * int(ends[-1]) // samples)
    at = np.searchsorted(ends, indices, side="right")
    rows: dict[int, list[int]] = {}
    for shard, row in zip(shards[at], indices - ends[at] + np.asarray(counts)[shards[at]], strict=True):
        rows.setdefault(int(shard), []).append(int(row))
    return rows


def inspect_samples(
    shards: list[Shard], samples: int, view: TrainingView, text: str, meta: TextMeta | None,
    captions: Sequence[str] = (TXT,), choice: Choice | None = None, to: str = "",
) -> Findings:  # fmt: skip
    """Inspect some samples of the shards and, if there is a meta, their embeddings in the folder `text`.

    samples: at most so many; 0 for all.  captions: their fields. Of several captions of a sample the embedding of the
    first is inspected.  choice: what rules make of the same samples.  to: where the report will be, to tell it.
    """
    counts = [shard.count for shard in shards]
    starts = np.cumsum([0, *counts]).tolist()
    chosen = choose_rows(counts, samples)
    total = sum(map(len, chosen.values()))
    taken = choice.looked_at.taken if choice and len(choice.looked_at.taken) else np.zeros(total, np.int32)
    tiles = choose_tiles(taken)
    findings = Findings(shards_inspected=len(chosen), captions={name: FieldCaptions() for name in captions})
    findings.choice = choice
    with Progress("inspect", total, "sample", to) as progress:
        for number, rows in chosen.items():
            cursor = ShardCursor(shards[number], text if meta else "", captions=list(map(CaptionConfig, captions)))
            for row in rows:
                raw = cursor.read(row)
                pixels, problem = _inspect_sample(raw, starts[number] + row, view, meta, findings)
                if problem:
                    findings.bad.append((raw.name, problem))
                if pixels is not None and findings.inspected in tiles:
                    shown = {name: _as_text(_captions(raw).get(name, b""))[0] for name in captions}
                    place = findings.inspected
                    findings.tiles.append(Tile(raw.name, shown, pixels, place, int(taken[place])))
                findings.inspected += 1
                progress.update()
            findings.damaged += cursor.damages()
            cursor.close()
    out = choice.left_out(taken) if choice else np.zeros(total, bool)
    left = [picture for picture in findings.pictures.values() if not out[picture.place]]
    left.sort(key=lambda picture: (-picture.pixels, picture.place))
    findings.duplicates = [[left[i] for i in group] for group in near_duplicates([p.print for p in left])]
    return findings


def choose_tiles(taken: np.ndarray) -> set[int]:
    """The places of the samples that are shown, spread evenly: half of what is chosen, half of what rules took.

    taken: the number of the rule that took each, or 0. Each rule that took any has an equal part.
    """
    rules = [rule for rule in np.unique(taken).tolist() if rule]
    parts = {0: MAX_TILES // 2 if rules else MAX_TILES} | {rule: MAX_TILES // 2 // len(rules) for rule in rules}
    places: set[int] = set()
    for rule, most in parts.items():
        of_rule = np.flatnonzero(taken == rule)
        places.update(of_rule[np.arange(max(most, 1)) * len(of_rule) // max(most, 1)].tolist() if len(of_rule) else [])
    return places


def _inspect_sample(
    raw: RawSample, index: int, view: TrainingView, meta: TextMeta | None, findings: Findings
) -> tuple[np.ndarray | None, str]:
    """Add a sample to the findings. Returns its pixels, if it has any, and why the training can't use it, or ''."""
    if raw.problem in (ENDED, UNREADABLE):
        return None, raw.problem
    captions = _captions(raw)
    for name, of_field in findings.captions.items():
        caption, is_text = _as_text(captions.get(name, b""))
        of_field.not_utf8 += not is_text
        if caption.strip():
            of_field.texts.append(caption)
        else:
            of_field.missing += 1
    if not raw.image:
        return None, raw.problem
    try:
        image = decode(raw.image)
    except BadImage as problem:
        return None, raw.problem or str(problem)
    pixels, place = view.pixels(image, index), findings.inspected
    small = _small_jpeg(pixels) if len(findings.pictures) < MAX_SMALL else b""
    key = raw.name.split(".tar:", 1)[-1]
    findings.pictures[place] = Picture(place, raw.name, key, image.width * image.height, fingerprint(image), small)
    try:
        with Image.open(io.BytesIO(raw.image), formats=["JPEG", "PNG"]) as opened:
            findings.kinds[f"{opened.format} {opened.mode}"] += 1
            findings.sizes[opened.size] += 1
    except Exception:  # the decoder of the training ignores parts of a header for which Pillow's may raise anything
        findings.kinds["of an odd header"] += 1
    if meta and not raw.problem:
        try:
            read_into(loaded_array(meta), raw.embedding, meta)
        except ValueError as problem:
            return pixels, str(problem)
        except OSError as error:
            raise_if_machine(error, f"the embedding of {raw.name}")
            return pixels, TEXT_UNREADABLE
    return pixels, raw.problem


def _small_jpeg(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((SMALL, SMALL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return data.getvalue()


def _captions(raw: RawSample) -> dict[str, bytes]:
    """All captions of a sample, by field."""
    return {raw.chosen: raw.caption} | raw.others


def _as_text(caption: bytes) -> tuple[str, bool]:
    r"""A caption as text, with \xNN for bytes that are not UTF-8, and whether it is text."""
    try:
        return decode_caption(caption), True
    except ValueError:
        return caption.decode("utf-8", "backslashreplace"), False
