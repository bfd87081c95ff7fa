"""A tiny T5 encoder with seeded random weights, for runs without a download: `python -m data.tiny_t5 out=DIR`.

Its embeddings have no meaning; it is for trying out the commands. Each word of the demo captions is a token of its own,
so that a small net can learn them in a minute; of other texts bytes and their frequent pieces are tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.checks import check_at_least
from data.cli import command, location
from data.storage.atomic import atomic_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, END = "<pad>", "</s>"


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
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), pad_token=PAD, eos_token=END)
    torch.manual_seed(args.seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.dim, d_kv=16, num_heads=args.dim // 16, d_ff=2 * args.dim,
        num_layers=args.layers, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with atomic_folder(out) as folder:
        T5EncoderModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{out}: a T5 encoder, {args.dim} wide, {args.layers} layers, weights drawn with seed {args.seed}")


def train_tokenizer() -> "Tokenizer":
    """A byte-level BPE, in which each word of the demo captions is one token; a text ends with END.

    Source: Sennrich et al. 2016, over bytes as in GPT-2.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    from data.prepare.scenes import VOCABULARY

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), decoders.ByteLevel()
    # The vocabulary is as large as it takes to merge every word.
    trainer = BpeTrainer(
        vocab_size=10_000, special_tokens=[PAD, END], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(VOCABULARY, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    command(write_tiny_t5, TinyT5, argv)


if __name__ == "__main__":
    main()
