"""What a run may not change on its way: the contents of its data, its net, and the order of its samples."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from data.loader.dataset import Dataset
from data.progress import each
from data.storage.caption_fields import TXT
from data.storage.locations import absolute, split
from data.storage.shards import Shard
from data.storage.tars import scan_shard
from data.text.meta import TextMeta
from model.config import UNetConfig

logger = logging.getLogger(__name__)

# What decides the embeddings of a caption. The encoder may lie elsewhere, and be stored or computed in another dtype.
TEXT_IDENTITY = ("weights_sha256", "tokenizer_sha256", "tokens", "dim", "cleaning")
# Bytes of a data digest.
DIGEST_BYTES = 16
# Keys of the net that came after the first exports were pushed, with what a net without them has: a hash without them
# is that of those exports.
LATER = {"model.low_res_size": 0, "model.scale_skip_connection": False, "model.self_attention": True}


@dataclass(slots=True)
class DataIdentity:
    """What a run is trained on, by its contents; places are free.

    samples: that are chosen of each dataset.  digests: data_digest of each.  text: describes the embeddings.
    base: weights_digest of the net that a LoRA is added to, '' without LoRA.
    selections: of each dataset the digest of the chosen rows and what each rule took; None where all are chosen.
    """

    samples: list[int]
    digests: list[str]
    text: TextMeta
    base: str = ""
    selections: list[dict | None] = field(default_factory=list)

    def entries(self) -> dict[str, object]:
        """The entries of a checkpoint's manifest."""
        return {
            "samples": self.samples, "data": self.digests, "text": describe_text(self.text), "base": self.base,
            "selections": self.selections,
        }  # fmt: skip


def describe_text(text: TextMeta) -> dict[str, object]:
    """What a manifest keeps of the embeddings: not their channels, which are long and with which each is read."""
    return {name: value for name, value in text.entries().items() if name != "channels"}


def identity(config: dict) -> dict[str, object]:
    """What of a configuration may not change, by key: the order of the samples and the layout of the files follow.

    config: as the manifest of a checkpoint holds it.
    """
    kept = {key: config[key] for key in ("seed", "global_batch", "diffusion_steps")}
    kept |= {f"model.{key}": value for key, value in config["model"].items()}
    # Without a rank there is no LoRA, and alpha changes nothing.
    kept["lora"] = config["lora"] if config["lora"]["rank"] else None
    kept |= {f"data.{key}": config["data"][key] for key in ("streams", "phases", "shuffle_block")}
    # The datasets may be moved.
    captions = captions_of(config)
    # The weight of a single one changes nothing.
    kept["data.captions"] = captions if len(captions) > 1 else [captions[0] | {"weight": 1.0}]
    kept["data.mixture"] = {name: dataset["weight"] for name, dataset in config["data"]["mixture"].items()}
    return kept


def run_digest(manifest: dict) -> str:
    """A hash of what all checkpoints of a run have in common, by which an export of it is known."""
    text, kept = manifest["text"], _identity_of(manifest)
    kept = {key: value for key, value in kept.items() if key not in LATER or value != LATER[key]}
    facts = [kept, manifest["data"], [text[name] for name in TEXT_IDENTITY], manifest["base"]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _identity_of(manifest: dict) -> dict[str, object]:
    """The identity of a checkpoint's configuration, with the values that keys had before they were keys."""
    config = manifest["config"]
    return identity(config | {"model": asdict(UNetConfig(**config["model"]))})


def captions_of(config: Mapping) -> list[dict]:
    """data.captions as plain dicts; a checkpoint of before they were a key was trained on txt alone."""
    return config["data"].get("captions", [{"field": TXT, "weight": 1.0}])


def data_digest(dataset: Dataset) -> str:
    """A hash over the shards' counts and digests for each caption, in their order; see add_missing_digests."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for shard in dataset.shards:
        for name in dataset.fields:
            assert shard.digest_of(name), (shard.location, name)
            digest.update(f"{shard.count} {shard.digest_of(name)}\n".encode())
    return digest.hexdigest()


def add_missing_digests(datasets: list[Dataset]) -> None:
    """Compute the digests of the shards that neither an index nor a stats file of ours gives.

    Raises: OSError if a shard cannot be read.
    """
    for dataset in datasets:
        fields = dataset.fields
        missing = [shard.location for shard in dataset.shards if not all(map(shard.digest_of, fields))]
        if not missing:
            continue
        folder, others = split(missing[0])[0], ",".join(field for field in fields if field != TXT)
        logger.warning(
            "%d of %d shards in '%s' have no digest yet, so their headers and captions are read: "
            "run `python -m data.index shards=%s%s` to make this once",
            len(missing), len(dataset.shards), absolute(folder), folder, f" captions={others}" if others else "",
        )  # fmt: skip
        found = {location: scan_shard(location, fields).digests for location in each(missing, "digests", "shard")}
        dataset.shards = [_with_digests(shard, found.get(shard.location, {})) for shard in dataset.shards]


def _with_digests(shard: Shard, found: dict[str, str]) -> Shard:
    """A shard with the digests by field that were found, where it had none."""
    others = {field: digest for field, digest in found.items() if field != TXT} | dict(shard.caption_digests)
    return replace(shard, digest=shard.digest or found.get(TXT), caption_digests=others)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A hash that changes with the names, the dtypes and every bit of some weights; about a second for 2 GB."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_run(folder: str, manifest: dict, config: dict, now: DataIdentity) -> None:
    """Make sure that a run which is now configured so may go on from a checkpoint.

    folder, manifest: of the checkpoint.  config: as plain dicts.
    Raises: ValueError if the checkpoint is of another run, another net or other data.
    """
    here, before = identity(config), _identity_of(manifest)
    # First what tells which data are meant, then these, then the rest, of which some follow the data.
    _check_keys(folder, {key: before.pop(key) for key in ("data.captions", "data.mixture")}, here)
    names = [f"data.mixture.{name}.shards" for name in config["data"]["mixture"]] or ["data.shards"]
    _check_data(folder, manifest, names, now)
    _check_selections(folder, manifest, names, now)
    for name in TEXT_IDENTITY:
        if manifest["text"][name] != (value := getattr(now.text, name)):
            raise ValueError(
                f"'{folder}' was trained with other embeddings (their meta.json: {name} "
                f"{_short(manifest['text'][name])}, now {_short(value)}): give it the same embeddings, or begin from "
                "scratch in another run_dir"
            )
    _check_keys(folder, before, here)
    if manifest["base"] != now.base:
        raise ValueError(
            f"'{folder}' trains a LoRA on other weights than those that init_from={config['init_from']} has now "
            f"({_short(manifest['base'])}, now {_short(now.base)}): give it the same weights, or begin from scratch in "
            "another run_dir"
        )


def _check_keys(folder: str, before: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Raises: ValueError if a key that may not change has."""
    for key, value in before.items():
        if json.dumps(value) != json.dumps(here[key]):  # as text, since the order of a mixture matters
            raise ValueError(
                f"'{folder}' was trained with {key}={value}, now it is {here[key]}: "
                "set it back, or choose another run_dir"
            )


def describe_selection(dataset: Dataset) -> dict | None:
    """What a checkpoint keeps of a dataset's selection: its digest, and the receipt of its rules."""
    selection = dataset.selection
    return {"digest": selection.digest, "receipt": selection.receipt.lines()} if selection else None


def _check_selections(folder: str, manifest: dict, names: list[str], now: DataIdentity) -> None:
    """Raises: ValueError if other samples are chosen than those that the checkpoint was trained on."""
    # A checkpoint from before there were selections has none.
    before, selections = (found or [None] * len(names) for found in (manifest.get("selections"), now.selections))
    for name, then, here in zip(names, before, selections, strict=True):
        if (then and then["digest"]) != (here and here["digest"]):
            old, new = ("; ".join(found["receipt"]) if found else "all samples are chosen" for found in (then, here))
            raise ValueError(
                f"'{folder}' was trained on another selection of {name} ({old}), now it is another ({new}): set "
                "data.where, data.drop and data.validation.share back, or begin from scratch in another run_dir"
            )


def _check_data(folder: str, manifest: dict, names: list[str], now: DataIdentity) -> None:
    end = "give it the same shards, or begin from scratch in another run_dir"
    all_chosen = not any(manifest.get("selections") or []) and not any(now.selections)
    if all_chosen and manifest["samples"] != now.samples:
        raise ValueError(
            f"'{folder}' was trained on other data ({manifest['samples']} samples, {', '.join(names)} now has "
            f"{now.samples}): {end}"
        )
    for name, before, digest in zip(names, manifest["data"], now.digests, strict=True):
        if before != digest:
            raise ValueError(
                f"'{folder}' was trained on other data (its digest {_short(before)}, that of {name} is "
                f"{_short(digest)}; a picture or caption was added, removed or edited since): {end}"
            )


def _short(value: object) -> str:
    """A hash is told by its first digits."""
    return str(value)[:12]
