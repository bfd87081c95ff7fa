"""A tiny T5 encoder with seeded random weights, for runs that shall need no download: `python -m data.tiny_t5 out=DIR`.

It shows the plumbing, not the meaning of words. It reads bytes, so its tokenizer needs no files.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from data.cli import command


@dataclass
class TinyT5:
    """Writes a tiny T5 encoder and its tokenizer as a folder that transformers loads."""

    out: str = MISSING
    dim: int = 64
    layers: int = 2
    seed: int = 0


def write_tiny_t5(args: TinyT5) -> None:
    """Write the folder aside, then rename; one that is there is left as it is."""
    if args.dim < 16 or args.dim % 16:
        raise SystemExit(f"dim={args.dim} must be a multiple of 16, the width of a head")
    out = Path(args.out)
    if out.exists():
        print(f"{out} is there already")
        return
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    torch.manual_seed(args.seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.dim, d_kv=16, num_heads=args.dim // 16, d_ff=2 * args.dim,
        num_layers=args.layers, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    os.replace(aside, out)
    print(f"{out}: a T5 encoder, {args.dim} wide, {args.layers} layers, weights drawn with seed {args.seed}")


if __name__ == "__main__":
    command(write_tiny_t5, TinyT5)
