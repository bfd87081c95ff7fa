"""What each stored form makes of text states: bytes, errors, decoding. Rate against error on several encoders.

    python -m tests.benchmarks.text_states minilm=FOLDER tokenizer=FOLDER picture=FILE.png

The captions are pieces of LICENSE, a text that stays. Encoders: a real one, whose 384 channels stand for 4096
(minilm), and T5 with random weights at full width, whose padding depends on the place a little, smoothly or roughly, as
its relative bias is drawn. Of a trained T5 nothing is known here: `python -m data.embed mode=fidelity` measures yours.
Besides the forms of data.embed: int8 through zstd, and a rotation with blocks of few bits. What the device does for
lowrank is counted. Needs no network; four minutes of a core.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from matplotlib import pyplot as plt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from data.cli import command, location
from data.text.embeddings import encode_states, loaded_array, read_into, store
from data.text.encoder import TextEncoder
from data.text.fidelity import HEADER, Form, measure_forms, row_of
from data.text.lowrank import measure_channels
from data.text.lowrank_factors import used_bytes
from data.text.lowrank_product import LowrankProduct
from data.text.meta import LOWRANK, TextMeta
from data.text.some_captions import encode_captions
from train.monitor.plots import save_figure

TOKENS, BLOCK, MICRO_BATCH = 77, 64, 6
# Channels that are made so many times as large, as a few of trained transformers are.
OUTLIERS = {7: 30.0, 100: 100.0}
ERRORS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)


@dataclass
class TextStates:
    """Prints the tables, and draws bits a value against the error.

    minilm: folder of a real encoder; '' leaves it out.
    tokenizer: folder of T5's tokenizer; '' leaves T5 out.
    words: of a caption on average.
    captions: half of them measure the channels, the others are stored.
    dim: width of the T5, a multiple of 64.
    layers: of the T5.
    errors: of lowrank.
    picture: a .png.
    """

    minilm: str = location("")
    tokenizer: str = location("")
    words: int = 16
    captions: int = 60
    dim: int = 4096
    layers: int = 2
    errors: list[float] = field(default_factory=lambda: list(ERRORS))
    picture: str = location("")


def pieces(words: int, number: int) -> list[str]:
    """Pieces of the licence's text, one after the other, of half to one and a half times so many words."""
    text, found, at = re.findall(r"[A-Za-z][A-Za-z'-]*", (Path(__file__).parents[2] / "LICENSE").read_text()), [], 0
    for i in range(number):
        size = words // 2 + words // 4 * (i % 5)
        found.append(" ".join(text[(at + k) % len(text)] for k in range(size)))
        at += size
    return found


def write_t5(folder: Path, tokenizer: str, dim: int, layers: int, bias: Callable[[int], torch.Tensor] | None) -> str:
    """A T5 with random weights.

    bias: gives for so many heads the relative bias [32, heads]; None for that which transformers draws.
    """
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=dim, d_kv=64, num_heads=dim // 64, d_ff=2 * dim, num_layers=layers,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config)
    if bias is not None:
        table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        table.data.copy_(bias(config.num_heads))
        for block in model.encoder.block:  # queries that prefer some keys
            block.layer[0].SelfAttention.q.weight.data *= 4
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def smooth_bias(heads: int) -> torch.Tensor:
    """[32, heads]: falls or rises with the bucket of the distance by a slope of each head's own, in both directions."""
    bucket = torch.arange(16)[:, None] / 8
    return torch.cat([bucket * (torch.randn(heads) - 1) + 0.3 * torch.randn(heads) for _ in range(2)])


def rough_bias(heads: int) -> torch.Tensor:
    """[32, heads]: each bucket is drawn by itself, so that the bias jumps where the distance passes to the next one."""
    return torch.randn(32, heads)


def int8_zstd(states: np.ndarray, level: int = 9) -> float:
    """KB a caption of int8 through a generic codec."""
    codec = pa.Codec("zstd", level)
    return float(np.mean([len(codec.compress(encode_states(s, "int8").tobytes(), asbytes=True)) for s in states])) / 1e3


def rotated(states: np.ndarray, bits: int, scale: np.ndarray, lengths: np.ndarray) -> tuple[float, float, float]:
    """KB, error of tokens and error of padding of an orthogonal rotation, then whole numbers of so many bits.

    Blocks of BLOCK values have a float16 step. Signs of the channels are drawn before the Hadamard matrix is applied.
    """
    n, tokens, dim = states.shape
    width = 1 << (dim - 1).bit_length()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], width).astype(np.float32)
    rows = np.zeros((n * tokens, width), np.float32)
    rows[:, :dim] = states.reshape(-1, dim)
    blocks = hadamard(rows * signs).reshape(-1, width // BLOCK, BLOCK)
    step = (np.abs(blocks).max(2, keepdims=True) / (2 ** (bits - 1) - 0.5)).astype(np.float16).astype(np.float32)
    kept = np.clip(np.floor(blocks / step) + 0.5, -(2 ** (bits - 1)), 2 ** (bits - 1)) * step
    found = (hadamard(kept.reshape(-1, width)) * signs)[:, :dim].reshape(states.shape)
    off = np.square((found - states) / scale).mean(2)
    padding = np.arange(tokens) >= lengths[:, None]
    size = tokens * width * (bits + 16 / BLOCK) / 8e3
    return size, float(np.sqrt(off[~padding].mean())), float(np.sqrt(off[padding].mean())) if padding.any() else 0.0


def hadamard(rows: np.ndarray) -> np.ndarray:
    """rows [N, 2^k] times the orthonormal Hadamard matrix."""
    width, half = rows.shape[1], 1
    while half < width:
        pairs = rows.reshape(len(rows), -1, 2, half)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(len(rows), width)
        half *= 2
    return rows / np.float32(width**0.5)


def table(title: str, states: np.ndarray, lengths: np.ndarray, meta: TextMeta, errors: list[float]) -> list[Form]:
    """Print the table of some states [N, tokens, dim]; returns the rows of data.embed's forms."""
    half = len(states) // 2
    tried = lengths[half:]
    print(f"\n### {title}\n\n{meta.tokens} x {meta.dim}, {tried.mean():.1f} tokens a caption\n\n{HEADER}", flush=True)
    forms = measure_forms(states, lengths, meta, tuple(errors))
    for form in forms:
        print(row_of(form), flush=True)
    print(f"| int8, zstd | {int8_zstd(states[half:]):.1f} | | | | | | | |")
    known = states[:half][np.arange(meta.tokens) < lengths[:half, None]]
    scale = np.maximum(known.std(0), np.median(known.std(0)) / 16)
    for bits in (4, 6, 8):
        size, tokens, padding = rotated(states[half:], bits, scale, tried)
        print(f"| rotation, {bits} bits | {size:.1f} | {tokens:.2%} | {padding:.2%} | | | | | |", flush=True)
    for error in errors if len(tried) >= MICRO_BATCH else ():
        print(count_device(states, lengths, meta, error), flush=True)
    return forms


class Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(one.nbytes for one in tree_leaves((args, out)) if isinstance(one, torch.Tensor))
        return out


def count_device(states: np.ndarray, lengths: np.ndarray, meta: TextMeta, error: float) -> str:
    """What crosses to the device in micro batches of lowrank, and what the device does, of each caption."""
    half = len(states) // 2
    channels = measure_channels(states[:half], lengths[:half]).to_text()
    meta = replace(meta, dtype=LOWRANK, error=error, channels=channels)
    factors = np.stack([loaded_array(meta) for _ in states[half:]])
    for out, rows, length in zip(factors, states[half:], lengths[half:], strict=True):
        read_into(out, store(rows, int(length), meta), meta)
    product, batches = LowrankProduct(states[0], torch.device("cpu")), len(factors) // MICRO_BATCH
    captions = batches * MICRO_BATCH
    sent = [torch.from_numpy(batch[:, : used_bytes(batch)]) for batch in np.split(factors[:captions], batches)]
    with FlopCounterMode(display=False) as flop, Moved() as moved:
        for batch in sent:
            product.states(batch)
    crossed = sum(batch.nbytes for batch in sent)
    return (
        f"error={error:g}, micro batches of {MICRO_BATCH}: {crossed / captions / 1e3:.0f} KB a caption cross to the "
        f"device, of float16 {meta.tokens * meta.dim / 500:.0f}; there {flop.get_total_flops() / captions / 1e6:.1f} "
        f"MFLOP, {moved.bytes / captions / 1e6:.0f} MB moved"
    )


def draw(found: dict[str, tuple[TextMeta, list[Form]]], path: str) -> None:
    """Bits a value against the error, a curve for each encoder."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for title, (meta, forms) in found.items():
        curve = [form for form in forms if form.name.startswith("lowrank")]
        bits = [8e3 * form.kilobytes / (meta.tokens * meta.dim) for form in curve]
        axes.plot([100 * form.error for form in curve], bits, "o--" if "outliers" in title else "o-", ms=3, label=title)
    axes.axhline(8 * 80e3 / (TOKENS * 4096), ls="--", color="grey", lw=1)
    axes.annotate("80 KB of 77 x 4096", (10, 2.1), ha="right", fontsize=8, color="grey")
    axes.set(xscale="log", xlabel="error, % of a channel's standard deviation", ylabel="bits a value, padding included")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_figure(figure, Path(path))


def measure(args: TextStates) -> None:
    """Print all tables."""
    found = {}
    captions, long = pieces(args.words, args.captions), pieces(8 * TOKENS // 4, args.captions // 2)

    def add(title: str, folder: str, captions: list[str], larger: dict[int, float] | None = None) -> None:
        encoder = TextEncoder(folder, TOKENS, "float32", torch.device("cpu"), "lower-strip")
        states, lengths = encode_captions(encoder, captions, 8)
        for channel, factor in (larger or {}).items():
            states[:, :, channel] *= factor
        meta = encoder.meta("float32")
        found[title] = meta, table(title, states, lengths, meta, args.errors)

    if args.minilm:
        add("MiniLM", args.minilm, captions)
        add("MiniLM, outliers", args.minilm, captions, OUTLIERS)
        add("MiniLM, long captions", args.minilm, long)
    biases = {"as drawn": None, "smooth bias": smooth_bias, "rough bias": rough_bias}
    for name, bias in biases.items() if args.tokenizer else ():
        with tempfile.TemporaryDirectory() as folder:
            out = write_t5(Path(folder), args.tokenizer, args.dim, args.layers, bias)
            add(f"T5, {name}", out, captions)
            if bias is smooth_bias:
                add(f"T5, {name}, long captions", out, long)
    if args.picture:
        draw(found, args.picture)


def main(argv: list[str] | None = None) -> None:
    command(measure, TextStates, argv)


if __name__ == "__main__":
    main()
