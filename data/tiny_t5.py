"""A tiny T5 encoder with seeded random weights, for runs without a download: `python -m data.tiny_t5 out=DIR`.

Its embeddings have no meaning; it is for trying out the commands. It reads bytes, so its tokenizer needs no files.
"""

from dataclasses import dataclass
from pathlib import Path

from data.checks import check_at_least
from data.cli import command, location
from data.storage.atomic import atomic_folder


@dataclass
class TinyT5:
    """Writes a tiny T5 encoder and its tokenizer as a folder that transformers loads.

    out: the folder; one that exists is left as it is.
    dim: width of the hidden states, a multiple of 16.
    layers: number of layers.
    seed: of the weights.
    """

    out: str = location()
    dim: int = 64
    layers: int = 2
    seed: int = 0


def write_tiny_t5(args: TinyT5) -> None:
    """Write the folder, unless it exists.

    Raises: ValueError if a number cannot be; OSError.
    """
    if args.dim < 16 or args.dim % 16:
        raise ValueError(f"dim={args.dim} must be a multiple of 16, the width of a head")
    check_at_least("layers", args.layers, 1)
    out = Path(args.out)
    if out.exists():
        print(f"{out} exists already")
        return
    # Imported here, for they take seconds.
    import torch
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer = ByT5Tokenizer(extra_ids=0)
    torch.manual_seed(args.seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.dim, d_kv=16, num_heads=args.dim // 16, d_ff=2 * args.dim,
        num_layers=args.layers, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with atomic_folder(out) as folder:
        T5EncoderModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{out}: a T5 encoder, {args.dim} wide, {args.layers} layers, weights drawn with seed {args.seed}")


def main(argv: list[str] | None = None) -> None:
    command(write_tiny_t5, TinyT5, argv)


if __name__ == "__main__":
    main()
