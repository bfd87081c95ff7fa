"""What each stored form makes of an encoder's states: bytes, errors and the speed of decoding, and which to choose."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.device import default_device
from data.storage.caption_fields import TXT
from data.storage.shards import Shard
from data.text.embeddings import from_bytes, loaded_array, read_into, store
from data.text.encoder import TextEncoder
from data.text.lowrank import measure_channels
from data.text.meta import LOWRANK, TextMeta
from data.text.some_captions import MEASURED, encode_captions, some_captions

# Captions that are stored and read again, beside those that the channels are measured on.
TRIED = 200
# Of these the forms are made, besides the error that is asked for.
ERRORS = (0.005, 0.01, 0.02, 0.05)
DECODE_SECONDS = 0.5


@dataclass(slots=True)
class Form:
    """A form, and what it makes of some captions.

    kilobytes: a caption, on average.  tokens, padding: root mean square of the error in standard deviations of each
    channel, over the tokens and over the padding.  worst: the same of the worst token or padding.
    relative_tokens, relative_padding: root mean square of the error over that of the states.
    cosine: the lowest between a token's states as they are and as they are read.  per_second: captions read, one core.
    """

    name: str
    kilobytes: float
    tokens: float
    padding: float
    worst: float
    relative_tokens: float
    relative_padding: float
    cosine: float
    per_second: float

    @property
    def error(self) -> float:
        return max(self.tokens, self.padding)


HEADER = (
    "| form | KB a caption | error of tokens | of padding | worst | relative RMS of tokens | of padding | least cosine "
    "| captions/s |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def row_of(form: Form) -> str:
    """The row of a form in a table of Markdown below HEADER."""
    return (
        f"| `{form.name}` | {form.kilobytes:.1f} | {form.tokens:.2%} | {form.padding:.2%} | {form.worst:.2%} "
        f"| {form.relative_tokens:.2%} | {form.relative_padding:.2%} | {form.cosine:.5f} | {form.per_second:.0f} |"
    )


def measure_forms(
    states: np.ndarray, lengths: np.ndarray, meta: TextMeta, errors: tuple[float, ...] = ERRORS, measured: int = 0,
    say: Callable[[str], object] = print,
) -> list[Form]:  # fmt: skip
    """All forms of states [N, tokens, dim] float32, of which lengths [N] tokens are no padding.

    measured: so many of the first captions are for the channels alone; half by default.  say: is told of each form that
    does not hold the states, and is left out.
    """
    measured = measured or len(states) // 2
    known = measure_channels(states[:measured], lengths[:measured])
    tried = states[measured:], lengths[measured:], known.scale
    plain = ("float16", "bfloat16", "int8")
    metas = {dtype: replace(meta, dtype=dtype, error=0.0, channels="") for dtype in plain}
    for error in errors:
        metas[f"lowrank error={error:g}"] = replace(meta, dtype=LOWRANK, error=error, channels=known.to_text())
    forms = []
    for name, of_form in metas.items():
        try:
            forms.append(_measure(name, of_form, *tried))
        except ValueError as error:
            say(f"{name} is left out: {error}")
    return forms


def _measure(name: str, meta: TextMeta, states: np.ndarray, lengths: np.ndarray, scale: np.ndarray) -> Form:
    stored = [store(rows, int(length), meta) for rows, length in zip(states, lengths, strict=True)]
    found = np.stack([from_bytes(data, meta) for data in stored]).astype(np.float32)
    padding = np.arange(states.shape[1]) >= lengths[:, None]
    off = found - states
    scaled = np.square(off / scale).mean(2)
    cosine = (found * states).sum(2) / np.maximum(np.linalg.norm(found, axis=2) * np.linalg.norm(states, axis=2), 1e-30)

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0

    def relative(which: np.ndarray) -> float:
        return rms(off[which]) / max(rms(states[which]), 1e-30)

    return Form(
        name, float(np.mean([len(data) for data in stored])) / 1e3, rms(np.sqrt(scaled[~padding])),
        rms(np.sqrt(scaled[padding])), float(np.sqrt(scaled.max())), relative(~padding), relative(padding),
        float(cosine.min()), _decoded_per_second(stored, meta),
    )  # fmt: skip


def _decoded_per_second(stored: list[bytes], meta: TextMeta) -> float:
    out, done, start = loaded_array(meta), 0, time.process_time()
    while (passed := time.process_time() - start) < DECODE_SECONDS:
        read_into(out, stored[done % len(stored)], meta)
        done += 1
    return done / passed


def recommend(forms: list[Form], error: float) -> Form:
    """The smallest form whose error is at most this; the most exact one if there is none."""
    fitting = [form for form in forms if form.error <= error * 1.01]
    return min(fitting, key=lambda form: form.kilobytes) if fitting else min(forms, key=lambda form: form.error)


def compare_forms(
    shards: list[Shard], settings: Mapping[str, Any], batch: int, caption: str = TXT,
    say: Callable[[str], object] = print,
) -> None:  # fmt: skip
    """Encode some captions of the shards, and print what each form makes of them and which one to choose.

    settings: encoder, tokens, compute, cleaning and error, as of data.embed.
    Raises: ValueError if the encoder cannot be used or there are too few captions.
    """
    captions = some_captions(shards, MEASURED + TRIED, caption)
    if len(captions) < 2:
        raise ValueError(f"the shards have {len(captions)} different captions {caption}: at least 2 are needed")
    encoder = TextEncoder(
        settings["encoder"], settings["tokens"], settings["compute"], default_device(), settings["cleaning"]
    )
    states, lengths = encode_captions(encoder, captions, batch)
    meta, error = encoder.meta("float32"), settings["error"]
    measured = min(MEASURED, len(captions) // 2)
    forms = measure_forms(states, lengths, meta, tuple(sorted({*ERRORS, error})), measured, say)
    say(
        f"{len(captions) - measured} captions of {lengths[measured:].mean():.1f} tokens on average, {meta.tokens} x "
        f"{meta.dim}; the channels are measured on {measured} others\n\n{HEADER}"
    )
    for form in forms:
        say(row_of(form))
    best = recommend(forms, error)
    chosen = f"dtype={best.name}"
    if best.error > error * 1.01:
        say(f"\nno form has an error of {error:g}; the most exact is {chosen}, {best.error:.2g}")
    else:
        say(f"\nfor error={error:g}: {chosen}, {best.kilobytes:.1f} KB a caption, {best.kilobytes:.3g} TB a billion")
