"""What to sample: a prompt, embedded by the encoder of the training, or stored embeddings."""

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
from data.text.captions import cleaner, lost_words
from data.text.embeddings import read_empty
from data.text.encoder import TextEncoder, load_encoder
from data.text.meta import TextMeta
from train.checkpoint.checkpoint import Checkpoint


@dataclass
class Prompts:
    """Captions and their embeddings.  Shapes: text_emb [P, L, D]; empty [L, D], that of the empty caption."""

    captions: list[str]
    text_emb: Tensor
    empty: Tensor


def find_prompts(
    checkpoint: Checkpoint, device: torch.device, prompt: str | None, embeddings: str, encoder: str, guided: bool
) -> Prompts:
    """The prompt, or the embeddings of a file, or without either the prompts of the run's grids.

    encoder: its folder or name on the hub, '' for what the checkpoint names.
    Raises: ValueError if what is needed is missing, or does not fit the training.
    """
    meta = checkpoint.text
    if prompt is not None and (prompt.strip() or encoder):
        text_encoder = load_encoder(meta, encoder, device)
        warn_of_cut(text_encoder, prompt)
        warn_of_lost_words(prompt, meta.cleaning)
        text_emb, empty = torch.from_numpy(text_encoder([prompt, ""])).split(1)
        return Prompts([prompt], text_emb, empty[0])
    if embeddings:
        text_emb = read_embeddings(Path(embeddings), meta)
        empty = text_emb[0] if not guided else find_empty(checkpoint, device, encoder)
        return Prompts([f"{Path(embeddings).name} {i}" for i in range(len(text_emb))], text_emb, empty)
    if prompt is not None:
        empty = find_empty(checkpoint, device, encoder)
        return Prompts([""], empty[None], empty)
    of_run = checkpoint.config["sample"]["prompts"]
    if isinstance(of_run, list):
        states = torch.from_numpy(load_encoder(meta, encoder, device)([*of_run, ""]))
        return Prompts(of_run, states[:-1], states[-1])
    datasets = find_data(checkpoint)
    if checkpoint.config["text"]["mode"] == "online":
        text_encoder = load_encoder(meta, encoder, device)
        for dataset in datasets:
            dataset.encoder = text_encoder
    stored = stored_prompts(datasets, meta, of_run)
    text_emb = torch.stack([torch.from_numpy(embedding) for _, embedding in stored])
    return Prompts([caption for caption, _ in stored], text_emb, find_empty(checkpoint, device, encoder))


def find_strip(
    checkpoint: Checkpoint, device: torch.device, prompt: str, to: str, encoder: str, pictures: int
) -> Prompts:
    """The way from one prompt to another in `pictures` equal parts, both of them included.

    The text states of the two are mixed linearly, state by state: the i-th of the one with the i-th of the other.
    encoder: its folder or name on the hub, '' for what the checkpoint names.
    Raises: ValueError if the encoder is missing, or is not that of the training.
    """
    text_encoder = load_encoder(checkpoint.text, encoder, device)
    for words in (prompt, to):
        warn_of_cut(text_encoder, words)
        warn_of_lost_words(words, checkpoint.text.cleaning)
    start, end, empty = torch.from_numpy(text_encoder([prompt, to, ""]))
    shares = torch.linspace(0, 1, pictures)
    captions = [prompt, *(f"{share:.0%} of the way" for share in shares[1:-1].tolist()), to]
    return Prompts(captions, torch.lerp(start, end, shares[:, None, None]), empty)


def find_data(checkpoint: Checkpoint) -> list[Dataset]:
    """The datasets of the training.

    Raises: ValueError if they are missing here, or their embeddings are not those of the training.
    """
    schema = OmegaConf.structured(DataConfig)
    data: DataConfig = OmegaConf.to_object(OmegaConf.merge(schema, checkpoint.config["data"]))  # type: ignore[assignment]
    try:
        datasets = find_datasets(data)
        metas = [TextMeta.read(dataset.text) for dataset in datasets]
    except ValueError as error:
        raise ValueError(
            f"the data of the training, with its captions, is not here ({error}): give a prompt=, or embeddings="
        ) from None
    for dataset, meta in zip(datasets, metas, strict=True):
        if meta != checkpoint.text:
            raise ValueError(
                f"the embeddings in '{dataset.text}' are not those of the training, but made by {meta.encoder}: "
                "give a prompt=, or embeddings="
            )
    return datasets


def find_empty(checkpoint: Checkpoint, device: torch.device, encoder: str) -> Tensor:
    """[L, D], the embedding of the empty caption: by the encoder if one is named, else as stored for the training.

    Raises: ValueError.
    """
    if encoder:
        return torch.from_numpy(load_encoder(checkpoint.text, encoder, device)([""])[0])
    try:
        return torch.from_numpy(read_empty(find_data(checkpoint)[0].text, checkpoint.text).copy())
    except ValueError as error:
        raise ValueError(
            f"no embedding of the empty caption, which guidance needs ({error}): "
            "name the encoder=, or set guidance_scale=1"
        ) from None


def read_embeddings(path: Path, meta: TextMeta) -> Tensor:
    """[P, L, D] from a .npy file; nothing is unpickled.

    Raises: ValueError if it holds anything but embeddings of the shape that the net was trained on.
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
        raise ValueError(f"embeddings={path} has values that are not finite: embed the captions again")
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, meta.tokens, meta.dim)


def warn_of_cut(encoder: TextEncoder, prompt: str) -> None:
    """Print the part of a prompt that lies beyond the tokens that the net was trained with."""
    ids = encoder.tokenizer(encoder.clean(prompt), add_special_tokens=False, verbose=False).input_ids
    limit = encoder.tokens - encoder.tokenizer.num_special_tokens_to_add()
    if len(ids) > limit:
        kept, cut = (encoder.tokenizer.decode(part).strip() for part in (ids[:limit], ids[limit:]))
        print(
            f"warning: the prompt has {len(ids)} tokens, of which the net takes {limit}; left out: {cut!r}; "
            f"kept: {kept!r}",
            file=sys.stderr,
        )


def warn_of_lost_words(prompt: str, cleaning: str) -> None:
    """Print the words that the cleaning removes from a prompt: the net is given the prompt without them."""
    clean = cleaner(cleaning)
    if lost := lost_words(prompt, clean):
        words = ", ".join(repr(word[:40]) for word in lost[:8])
        print(
            f"warning: caption cleaning ({cleaning!r}) removes {words} from the prompt {prompt[:80]!r}, and the net is "
            f"given {clean(prompt)[:80]!r}: for a rare word take a few letters without digits or signs, such as zwx",
            file=sys.stderr,
        )
