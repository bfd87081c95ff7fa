"""The frozen text encoder: any encoder of transformers that has a last_hidden_state, by name or folder."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForTextEncoding, AutoTokenizer

from data.storage.hub import hub_name, pinned
from data.storage.hub_files import fetch
from data.text.captions import CLEANING, cleaner
from data.text.meta import COMPUTE, TextMeta

# Files of an encoder's weights, as transformers looks for them, and endings of what else it and the tokenizer read.
WEIGHTS = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
BESIDE = (".json", ".model", ".txt", ".jinja")
# What is so of a name whose files the hub does not give.
NOT_HERE = "there is no such folder, it is not in the hub's cache, and "


class TextEncoder:
    """Turns captions into hidden states [tokens, dim], cut or padded to a fixed number of tokens.

    The encoder sees its attention mask. The states at the padding are kept, since IF's UNet is given them too.
    name: a folder, or a name on the hub, ORG/NAME or ORG/NAME@REVISION, of which the attribute has the commit.
    compute: 'float32' or 'bfloat16'; T5 v1.1 overflows in float16.  cleaning: its name in data.text.captions.
    Raises: ValueError if the encoder cannot be loaded, or its tokenizer does not fit it.
    """

    def __init__(self, name: str, tokens: int, compute: str, device: torch.device, cleaning: str = CLEANING) -> None:
        if compute not in COMPUTE:
            raise ValueError(f"compute={compute} must be one of {', '.join(COMPUTE)} (float16 overflows in T5 v1.1)")
        self.clean = cleaner(cleaning)
        name = _pinned(name)
        try:
            self.tokenizer, model = _from_pretrained(name, getattr(torch, compute))
        except (OSError, ValueError) as error:
            raise _not_loaded(name, error) from None
        self.name, self.tokens, self.compute, self.device, self.cleaning = name, tokens, compute, device, cleaning
        self.model = model.to(device).eval().requires_grad_(False)
        self.dim: int = model.config.hidden_size
        highest, rows = max(self.tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
        if highest >= rows:
            raise ValueError(
                f"the tokenizer of '{name}' gives ids up to {highest}, its encoder knows {rows}: "
                "they are not of one model; give a folder that holds an encoder and its own tokenizer"
            )

    def token_ids(self, captions: list[str]) -> np.ndarray:
        """[N, tokens] int32, -1 at the padding."""
        inputs = self.tokenizer(
            [self.clean(caption) for caption in captions], padding="max_length", max_length=self.tokens,
            truncation=True, return_tensors="np",
        )  # fmt: skip
        return np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -1).astype(np.int32)

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        self.device, self.model = device, self.model.to(device)

    @torch.no_grad()  # not inference_mode: a net that is trained on the states keeps them for its backward
    def states(self, token_ids: Tensor) -> Tensor:
        """[N, tokens, dim] in the compute dtype, on the device. token_ids: [N, tokens] int32, as from token_ids()."""
        ids = token_ids.to(self.device, torch.int64, non_blocking=True)
        padding = ids < 0
        # As attention adds it, [N, 1, tokens, tokens]: of a mask [N, tokens] transformers reads on the host whether it
        # masks anything.
        mask = torch.zeros(ids.shape, dtype=self.model.dtype, device=ids.device)
        mask = mask.masked_fill(padding, torch.finfo(mask.dtype).min)[:, None, None].expand(-1, 1, ids.shape[1], -1)
        ids = ids.masked_fill(padding, self.tokenizer.pad_token_id)
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def start(self, token_ids: Tensor) -> Callable[[], Tensor]:
        """Start a batch. Returns a function that waits for its states [N, tokens, dim] on the host.

        A GPU that is given the next batch meanwhile does not wait for what is done with the states of this one.
        """
        states = self.states(token_ids)
        if self.device.type != "cuda":
            return lambda: states
        host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        host.copy_(states, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def fetch() -> Tensor:
            copied.synchronize()
            return host

        return fetch

    def __call__(self, captions: list[str]) -> np.ndarray:
        """[N, tokens, dim] float32.

        Raises: ValueError if a state is not finite.
        """
        states = self.states(torch.from_numpy(self.token_ids(captions))).float()
        self.check_finite(states, captions)
        return states.cpu().numpy()

    def check_finite(self, states: Tensor, captions: list[str]) -> None:
        """Raises: ValueError that names the first caption whose states [N, tokens, dim] are not all finite."""
        finite = torch.isfinite(states).flatten(1).all(1)
        if not finite.all():
            caption = captions[int((~finite).nonzero()[0])]
            raise ValueError(
                f"the encoder '{self.name}' is not finite in {self.compute} on the caption {caption[:80]!r}: "
                "use compute=float32"
            )

    def meta(self, dtype: str) -> TextMeta:
        """Everything that decides the embeddings of this encoder, stored as dtype.

        The weights' hash is of their values rounded to bfloat16, so it is the same whether they are stored or loaded in
        float32 or bfloat16.
        """
        weights = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            weights.update(name.encode())
            if value.is_floating_point():
                value = value.bfloat16()
            weights.update(value.cpu().contiguous().view(torch.uint8).numpy())
        tokenizer = hashlib.sha256(repr((sorted(self.tokenizer.get_vocab().items()), self.tokenizer("aA 1"))).encode())
        return TextMeta(
            encoder=self.name, weights_sha256=weights.hexdigest(), tokenizer_sha256=tokenizer.hexdigest(),
            tokens=self.tokens, dim=self.dim, dtype=dtype, compute=self.compute, cleaning=self.cleaning,
        )  # fmt: skip


def _pinned(name: str, recorded: str = "") -> str:
    """A name on the hub with its commit, a folder as it is.  recorded: where the encoder was before.

    Raises: ValueError.
    """
    try:
        return pinned(name, recorded, bare=True)
    except ValueError as error:
        raise _not_loaded(name, ValueError(f"{NOT_HERE}{error}")) from None


def _not_loaded(name: str, error: Exception) -> ValueError:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return ValueError(
        f"the encoder '{name}' cannot be loaded ({said}): give a folder that holds it "
        "and its tokenizer, or the name of one on the hub, ORG/NAME or ORG/NAME@REVISION"
    )


def _from_pretrained(location: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The tokenizer and the encoder of a folder, or of the hub.

    Files of the hub are fetched first and read as a folder: transformers asks it for more, also of what is in the
    cache, and tries each file again for half a minute where the hub is not there.
    location: of the hub with its commit.
    Raises: OSError, ValueError.
    """
    name, folder = hub_name(location, bare=True), Path(location)
    if name:
        try:
            folder = fetch(name, WEIGHTS, lambda file: "/" not in file and file.endswith(BESIDE))
        except ValueError as error:
            raise ValueError(f"{NOT_HERE}{error}") from None
    elif not folder.is_dir():
        raise ValueError("there is no such folder")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModelForTextEncoding.from_pretrained(folder, dtype=dtype, local_files_only=True)


def load_encoder(meta: TextMeta, name: str = "", device: torch.device | None = None) -> TextEncoder:
    """The encoder that a meta describes, checked by its hashes to be the same one; on the CPU by default.

    name: a folder or a name on the hub, where the encoder is now; that of the meta by default. If it is the repository
    of the meta without a commit, the commit of the meta is taken.
    Raises: ValueError if it cannot be loaded or is another.
    """
    name = _pinned(name or meta.encoder, meta.encoder)
    encoder = TextEncoder(name, meta.tokens, meta.compute, device or torch.device("cpu"), meta.cleaning)
    if encoder.dim != meta.dim:
        raise ValueError(
            f"'{name}' is {encoder.dim} wide, the embeddings of '{meta.encoder}' are {meta.dim}: "
            "name the encoder that the captions were embedded with"
        )
    now = encoder.meta(meta.dtype)
    earlier = hub_name(meta.encoder, bare=True)
    remedy = "name that one"
    if earlier and not earlier.is_commit:
        remedy += f"; if the repository has changed since, with its earlier commit, {earlier.repo}@COMMIT"
    for what, loaded, recorded in (
        ("another encoder than", now.weights_sha256, meta.weights_sha256),
        ("an encoder with another tokenizer than", now.tokenizer_sha256, meta.tokenizer_sha256),
    ):
        if loaded != recorded:
            raise ValueError(
                f"'{name}' is {what} the one that the captions were embedded with ({meta.encoder}): {remedy}"
            )
    return encoder
