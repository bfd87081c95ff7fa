"""The frozen text encoder: any of transformers' with a last_hidden_state, by name or folder."""

import hashlib

import numpy as np
import torch
from transformers import AutoModelForTextEncoding, AutoTokenizer

from data.captions import CLEANING, clean
from data.text import TextMeta

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TextEncoder:
    """Captions to hidden states [tokens, dim], cut or padded to a fixed number of tokens.

    The encoder sees its attention mask. The states at the padding are kept, since IF's UNet is given them too.
    compute: 'float32' or 'bfloat16'; T5 v1.1 overflows in float16.
    Raises: ValueError if the encoder cannot be loaded.
    """

    def __init__(self, name: str, tokens: int, compute: str, device: torch.device) -> None:
        if compute not in DTYPES:
            raise ValueError(f"compute={compute} must be one of {', '.join(DTYPES)} (float16 overflows in T5 v1.1)")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForTextEncoding.from_pretrained(name, dtype=DTYPES[compute])
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the encoder '{name}' cannot be loaded ({str(error).splitlines()[0]}): "
                "give a folder that holds it and its tokenizer, or the name of one on the hub"
            ) from None
        self.name, self.tokens, self.compute, self.device = name, tokens, compute, device
        self.model = model.to(device).eval().requires_grad_(False)
        self.dim: int = model.config.hidden_size

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> np.ndarray:
        """[N, tokens, dim] float32.

        Raises: ValueError if a state is not finite.
        """
        inputs = self.tokenizer(
            [clean(caption) for caption in captions], padding="max_length", max_length=self.tokens, truncation=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        states = self.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state.float()
        finite = torch.isfinite(states).flatten(1).all(1)
        if not finite.all():
            caption = captions[int((~finite).nonzero()[0])]
            raise ValueError(
                f"the encoder '{self.name}' is not finite in {self.compute} on the caption {caption[:80]!r}: "
                "use compute=float32"
            )
        return states.cpu().numpy()

    def meta(self, dtype: str) -> TextMeta:
        """What decides the embeddings that this encoder makes."""
        weights = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            weights.update(name.encode())
            weights.update(value.cpu().contiguous().view(torch.uint8).numpy())
        tokenizer = hashlib.sha256(repr((sorted(self.tokenizer.get_vocab().items()), self.tokenizer("aA 1"))).encode())
        return TextMeta(
            encoder=self.name, weights_sha256=weights.hexdigest(), tokenizer_sha256=tokenizer.hexdigest(),
            tokens=self.tokens, dim=self.dim, dtype=dtype, compute=self.compute, cleaning=CLEANING,
        )  # fmt: skip
