"""Some captions of shards, and their states: what an encoder's states look like is measured on them."""

from collections.abc import Callable

import numpy as np
import torch

from data.progress import Progress
from data.storage.caption_fields import TXT, caption_extensions, find_captions
from data.storage.machine import raise_if_machine
from data.storage.shards import Shard
from data.storage.tar_headers import DamagedTar
from data.storage.tars import read_shard
from data.text.decode import decode_caption
from data.text.encoder import TextEncoder

# Shards among which the captions are taken, at most; and captions that the channels of lowrank are measured on.
SHARDS, MEASURED = 8, 256


def some_captions(shards: list[Shard], number: int, field: str = TXT) -> list[str]:
    """Up to so many different captions, the first of some shards that lie evenly among all.

    Shards that cannot be read give none.
    """
    chosen = [shards[len(shards) * i // SHARDS] for i in range(SHARDS)] if len(shards) > SHARDS else shards
    found: dict[str, None] = {}
    for i, shard in enumerate(chosen):
        wanted = number * (i + 1) // len(chosen)
        try:
            for _, members in read_shard(shard.location, caption_extensions([field])):
                if len(found) >= wanted:
                    break
                if caption := find_captions(members, [field]).get(field):
                    try:
                        found[decode_caption(caption)] = None
                    except ValueError:
                        continue
        except (DamagedTar, OSError) as error:
            if isinstance(error, OSError):
                raise_if_machine(error, shard.location)
    return list(found)


def encode_captions(
    encoder: TextEncoder, captions: list[str], batch: int, after_each: Callable[[], object] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """The states [N, tokens, dim] float32 of captions, and how many tokens [N] are no padding.

    after_each: called after each batch.
    Raises: ValueError if a state is not finite.
    """
    states, lengths = np.empty((len(captions), encoder.tokens, encoder.dim), np.float32), np.empty(len(captions), int)
    with Progress("encode", len(captions), "caption") as progress:
        for first in range(0, len(captions), batch):
            part = captions[first : first + batch]
            ids = encoder.token_ids(part)
            found = encoder.states(torch.from_numpy(ids)).float()
            encoder.check_finite(found, part)
            states[first : first + batch], lengths[first : first + batch] = found.cpu().numpy(), (ids >= 0).sum(1)
            after_each()
            progress.update(len(part))
    return states, lengths
