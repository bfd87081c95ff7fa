"""A checkpoint of one rank as many ranks would have written it, so that it has many files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_manifest
from train.checkpoint.format import MANIFEST, part_file


def split_checkpoint(folder: Path, ranks: int) -> None:
    """Divide the only file; the optimizer must be adamw, whose moments can be cut anywhere."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["ranks"] == 1, manifest["ranks"]
    whole = load_file(folder / part_file(0))
    size = -(-len(whole["master"]) // ranks)
    for rank in range(ranks):
        part = {}
        for name, value in whole.items():
            own = value[rank * size : (rank + 1) * size] if value.ndim else value
            missing = size - len(own) if value.ndim else 0
            part[name] = torch.cat([own, torch.zeros(missing)]) if missing else own.clone()
        save_file(part, folder / part_file(rank))
    write_manifest(folder, manifest | {"ranks": ranks})
