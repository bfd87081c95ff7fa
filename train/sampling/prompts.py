"""What to draw: prompts by the encoder of the training, or stored embeddings."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.config import DataConfig
from data.loader.dataset import Dataset, find_datasets
from data.loader.prompts import stored_prompts
from data.text.embeddings import read_empty
from data.text.encoder import TextEncoder, load_encoder
from data.text.meta import TextMeta
from train.weights.pretrained import Trained


@dataclass
class Prompts:
    """Captions and their embeddings.  Shapes: text_emb [P, L, D]; empty [L, D], that of the empty caption."""

    captions: list[str]
    text_emb: Tensor
    empty: Tensor


def find_prompts(
    trained: Trained, device: torch.device, prompt: str | None, embeddings: str, encoder_at: str, guided: bool
) -> Prompts:
    """What to draw, by the encoder of the training or from stored embeddings.

    Raises: ValueError if neither is to be had, or they don't fit the training.
    """
    if prompt is not None and (prompt.strip() or encoder_at):
        encoder = load_encoder(trained.text, encoder_at, device)
        warn_of_cut(encoder, prompt)
        text_emb, empty = torch.from_numpy(encoder([prompt, ""])).split(1)
        return Prompts([prompt], text_emb, empty[0])
    if embeddings:
        text_emb = read_embeddings(Path(embeddings), trained.text)
        empty = text_emb[0] if not guided else stored_empty(trained, device, encoder_at)
        return Prompts([f"{Path(embeddings).name} {i}" for i in range(len(text_emb))], text_emb, empty)
    if prompt is not None:
        empty = stored_empty(trained, device, encoder_at)
        return Prompts([""], empty[None], empty)
    datasets = find_data(trained)
    if trained.run.get("text", {}).get("mode") == "online":
        encoder = load_encoder(trained.text, encoder_at, device)
        for dataset in datasets:
            dataset.encoder = encoder
    stored = stored_prompts(datasets, trained.text, trained.run["sample"]["prompts"])
    text_emb = torch.stack([torch.from_numpy(embedding) for _, embedding in stored])
    return Prompts([caption for caption, _ in stored], text_emb, stored_empty(trained, device, encoder_at))


def find_data(trained: Trained) -> list[Dataset]:
    """The datasets of the training.

    Raises: ValueError if they are not here, or embedded otherwise by now.
    """
    data: DataConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), trained.run["data"]))  # type: ignore[assignment]
    try:
        datasets = find_datasets(data)
        metas = [TextMeta.read(dataset.text) for dataset in datasets]
    except ValueError as error:
        raise ValueError(
            f"the data of the training, with its captions, is not here ({error}): give a prompt=, or embeddings="
        ) from None
    for dataset, meta in zip(datasets, metas, strict=True):
        if meta != trained.text:
            raise ValueError(
                f"the embeddings in '{dataset.text}' are others than those of the training, made by "
                f"{meta.encoder}: give a prompt=, or embeddings="
            )
    return datasets


def stored_empty(trained: Trained, device: torch.device, encoder_at: str) -> Tensor:
    """[L, D], the empty caption, from beside the embeddings of the training, or by its encoder where that is named.

    Raises: ValueError.
    """
    if encoder_at:
        return torch.from_numpy(load_encoder(trained.text, encoder_at, device)([""])[0])
    try:
        return torch.from_numpy(read_empty(find_data(trained)[0].text, trained.text).copy())
    except ValueError as error:
        raise ValueError(
            f"no embedding of the empty caption, which guidance needs ({error}): "
            "name the encoder=, or set guidance_scale=1"
        ) from None


def read_embeddings(path: Path, meta: TextMeta) -> Tensor:
    """[P, L, D] from a .npy file; nothing is unpickled.

    Raises: ValueError if it holds anything but such embeddings as the net was trained on.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"embeddings={path} cannot be read as .npy: {error}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        raise ValueError(f"embeddings={path} is not one array of floating-point numbers: save it with np.save")
    if values.ndim not in (2, 3) or values.shape[-2:] != (meta.tokens, meta.dim) or not len(values):
        raise ValueError(
            f"embeddings={path} is {list(values.shape)}, the net was trained on [{meta.tokens}, {meta.dim}], "
            f"by {meta.encoder}: give one such array, or several as [P, {meta.tokens}, {meta.dim}]"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"embeddings={path} has values that are not finite: embed the captions anew")
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, meta.tokens, meta.dim)


def warn_of_cut(encoder: TextEncoder, prompt: str) -> None:
    """Say what of a prompt is beyond the tokens that the net was trained with."""
    ids = encoder.tokenizer(encoder.clean(prompt), add_special_tokens=False, verbose=False).input_ids
    room = encoder.tokens - encoder.tokenizer.num_special_tokens_to_add()
    if len(ids) > room:
        kept, cut = encoder.tokenizer.decode(ids[:room]), encoder.tokenizer.decode(ids[room:])
        print(
            f"warning: the prompt has {len(ids)} tokens, of which the net takes {room}; left out: {cut!r}; "
            f"kept: {kept!r}",
            file=sys.stderr,
        )
