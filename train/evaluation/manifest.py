"""The manifest of an evaluation: by their contents, all the things that its pictures and scores depend on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.storage.tars import write_json
from data.text.meta import TextMeta
from model.unet import UNet
from train.checkpoint.identity import weights_digest
from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.eval_set import EvalSet
from train.evaluation.features import Extractor
from train.faults.first_rank import checked_by_first_rank

MANIFEST = "evaluation.json"
# Whose versions may change a picture or a score.
PACKAGES = ("torch", "diffusers", "numpy", "Pillow")
# Digits of a hash that a score names its manifest by.
SHORT = 12


def make_manifest(
    unet: UNet, eval_set: EvalSet, extractors: list[Extractor], device: torch.device, settings: dict, low_res: str = ""
) -> dict:
    """What decides the pictures and the features: by content, without a path.

    unet: the net that draws, with its LoRA merged.  settings: of the drawing.  low_res: the folder of pictures of
    another evaluation, which a net of the second stage enlarges; '' for the captions' own.
    Raises: ValueError if a picture or caption cannot be read, or the pictures in low_res are of other captions.
    """
    prompts, references = eval_set.contents()
    if unet.config.low_res_size:
        settings = settings | {"low_res": _drawn(Path(low_res), eval_set.samples, prompts) if low_res else "true"}
    manifest = {
        "drawing": settings,
        "weights": weights_digest(unet.state_dict()),
        "net": asdict(unet.config),
        "prompts": prompts,
        "references": references,
        "text": _text(eval_set.meta),
        "extractors": {extract.name: extract.digest for extract in extractors},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": {name: version(name) for name in PACKAGES},
    }
    return json.loads(json.dumps(manifest))  # as it is read back: a tuple is then a list


def _drawn(folder: Path, samples: int, prompts: str) -> str:
    """A hash of pictures that another evaluation drew for the prompts."""
    if read_manifest(folder.parent)["prompts"] != prompts:
        raise ValueError(
            f"low_res={folder}: drawn for other captions: evaluate both stages with the same shards, "
            "caption, samples and seed"
        )
    return hashlib.sha256(ChunkedArray(folder, "images", samples).read().tobytes()).hexdigest()


def _text(meta: TextMeta) -> dict[str, object]:
    """What decides the text states; of the channels of lowrank, which are long, a hash."""
    entries = {name: value for name, value in meta.entries().items() if name != "encoder"}
    if "channels" in entries:
        entries["channels"] = hashlib.sha256(meta.channels.encode()).hexdigest()[:SHORT]
    return entries


def name_of(manifest: dict, settings: dict[str, Any]) -> str:
    """The short hash that names the manifest of the scores of a drawing.  settings: of the Drawing."""
    text = json.dumps(manifest | settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:SHORT]


def read_manifest(folder: Path) -> dict:
    """The manifest of another evaluation.

    Raises: ValueError if it is damaged, or not of an evaluation.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"samples"} <= found["drawing"].keys() and "prompts" in found:
            return found
        problem = "without prompts or samples"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error)
    raise ValueError(f"'{path}' is not the manifest of an evaluation ({problem}): make that evaluation again")


def settle(folder: Path, make: Callable[[], dict]) -> dict:
    """The manifest, which the first rank makes, compares with the one in the folder and writes; a collective call.

    Features of another extractor may be added to those that are there.
    Raises: ValueError on all ranks, if the folder holds another evaluation or `make` raises.
    """

    def look() -> dict:
        manifest = make()
        check_same(folder, manifest)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, manifest | {"extractors": _extractors(folder) | manifest["extractors"]})
        return manifest

    return checked_by_first_rank(look)


def check_same(folder: Path, manifest: dict) -> None:
    """Raises: ValueError if the folder holds an evaluation with another manifest; it names what differs."""
    path = folder / MANIFEST
    if not path.exists():
        return
    stored = _flat(json.loads(path.read_text(encoding="utf-8")))
    changed = [
        f"{name}={_shown(stored.get(name))} (now {_shown(value)})"
        for name, value in _flat(manifest).items()
        if stored.get(name) != value and not (name.startswith("extractors.") and name not in stored)
    ]
    if changed:
        raise ValueError(f"'{folder}' holds another evaluation, of {', '.join(changed)}: choose another out=")


def _extractors(folder: Path) -> dict:
    """The extractors of the evaluation that the folder holds."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")).get("extractors", {}) if path.exists() else {}


def _flat(manifest: dict) -> dict:
    flat: dict[str, object] = {}
    for name, value in manifest.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _shown(value: object) -> str:
    """A hash is told by its first digits."""
    text = str(value)
    return text[:SHORT] if len(text) == 64 else text
