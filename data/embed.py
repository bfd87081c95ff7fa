"""Captions of shards to sidecar shards of text embeddings: `python -m data.embed shards=DIR out=DIR encoder=NAME`."""

from dataclasses import dataclass

from data.cli import command, location
from data.storage.caption_fields import TXT, check_fields
from data.storage.locations import make_folder
from data.storage.shards import find_shards
from data.text.captions import CLEANING, cleaner
from data.text.meta import COMPUTE, DTYPES, LOWRANK, caption_folder
from data.text.sidecar_check import (
    CHANGED,
    DAMAGED,
    check_embeddings,
    cleaned_away_line,
    not_text_line,
    unreadable_line,
)

MODES = ("embed", "meta", "check", "repair", "fidelity")
# What lowrank can do: its coefficients are rounded to 2^-10, and of much more nothing is left.
LEAST_ERROR, MOST_ERROR = 0.003, 0.3
# What is taken where neither the arguments nor a meta file says otherwise.
DEFAULTS = {
    "encoder": "DeepFloyd/t5-v1_1-xxl", "tokens": 77, "compute": "bfloat16", "dtype": "float16", "error": 0.01,
    "cleaning": CLEANING,
}  # fmt: skip


@dataclass
class Embed:
    """Runs a frozen text encoder over the captions of shards and writes its hidden states as sidecar shards.

    A rerun makes only what is missing and what changed in the shards; several processes may work on one folder at once.

    shards: the image shards, as data.shards of a training.
    out: folder for the embeddings, or s3://BUCKET/FOLDER; with mode=check any location that can be read, with
    mode=fidelity none.
    encoder: folder, or name on the hub as ORG/NAME or ORG/NAME@REVISION, of an encoder that transformers loads;
    default: that of out's meta file, else DeepFloyd/t5-v1_1-xxl.
    tokens: number of tokens that each caption is cut or padded to; 0 takes that of out's meta file, else 77.
    compute: precision that the encoder runs in, bfloat16 or float32; default: that of out's meta file, else bfloat16.
    dtype: form that embeddings are stored in, float16, float32, bfloat16, int8 or lowrank; default: that of out's meta
    file, else float16.
    error: of dtype=lowrank, the root mean square error in standard deviations of a channel, 0.003 to 0.3; default: that
    of out's meta file, else 0.01. With mode=fidelity the error for which a form is recommended.
    batch: captions in one forward pass.
    cleaning: what is done to captions before the tokenizer, if-1 or lower-strip (data/text/captions.py); default: that
    of out's meta file, else if-1.
    mode: embed; meta writes only the meta file and the empty caption's embedding, for text.mode=online; check compares
    all embeddings with the captions; repair embeds again what check finds wrong; fidelity writes nothing, and compares
    the forms by bytes, error and speed on some of the captions, with this encoder.
    caption: the field of the captions, as in data.captions of a training: txt, or NAME for KEY.NAME.txt, KEY.NAME or
    the entry NAME of KEY.json. The embeddings of NAME lie in the folder out/NAME.
    """

    shards: str = location()
    out: str = location("")
    encoder: str = location("")
    tokens: int = 0
    compute: str = ""
    dtype: str = ""
    error: float = 0.0
    batch: int = 64
    cleaning: str = ""
    mode: str = "embed"
    caption: str = TXT


def embed(args: Embed) -> None:
    """Do what the arguments say. Shards that cannot be read do not stop the others, and are named at the end.

    Raises: ValueError if the folder holds embeddings that were made otherwise, the encoder does not fit, a shard cannot
    be read, or a check finds something wrong; OSError.
    """
    _check_arguments(args)
    unreadable: dict[str, str] = {}
    shards = [] if args.mode == "meta" else find_shards(args.shards, unreadable)
    if args.mode == "check":
        check_embeddings(shards, args.out, unreadable, args.caption)
        return
    if args.mode == "fidelity":
        from data.text.fidelity import compare_forms

        settings = {name: getattr(args, name) or value for name, value in DEFAULTS.items()}
        compare_forms(shards, settings, args.batch, args.caption)
        return
    # Here, since it imports torch and transformers, which take seconds.
    from data.text.embedding_job import open_embeddings, write_sidecars

    out = args.out
    chosen = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name)}
    encoder, meta = open_embeddings(out, chosen, DEFAULTS, shards, args.caption)
    if args.mode == "meta":
        print(f"{out}: the meta file of {meta.encoder}, {meta.tokens} x {meta.dim}, and the empty caption's embedding")
        return
    out = caption_folder(out, args.caption)
    make_folder(out)
    work = write_sidecars(shards, out, encoder, meta, args.batch, args.mode == "repair", args.caption)
    unreadable |= work.unreadable
    made = len(shards) - len(work.unreadable)
    counts = f"{work.new} new" + (f", {work.anew.total()} made again" if work.anew else "")
    print(f"{out}: {made} shards of embeddings, {meta.tokens} x {meta.dim} {meta.dtype}, {counts}")
    if work.anew:
        reasons = {CHANGED: "shards were packed anew", DAMAGED: "sidecars were damaged or of other captions"}
        causes = ", ".join(f"{count} {reasons[reason]}" for reason, count in work.anew.items())
        print(f"{causes}: {work.embedded} captions embedded, {work.kept} kept")
    if work.without_caption:
        print(_without_caption_line(work.without_caption, args.caption))
    for line in (not_text_line(work.not_text), cleaned_away_line(work.cleaned_away, meta.cleaning)):
        if line:
            print(line)
    if unreadable:
        raise ValueError(unreadable_line(unreadable))


def _without_caption_line(samples: int, caption: str) -> str:
    if caption == TXT:
        return f"{samples} samples have no caption and so no embedding; the training will skip them"
    return (
        f"{samples} samples have no caption {caption} and so no such embedding; the training takes another caption of "
        "data.captions that they have, and skips those that have none"
    )


def _check_arguments(args: Embed) -> None:
    for name, value, known in (
        ("mode", args.mode, MODES),
        ("dtype", args.dtype or "float16", DTYPES),
        ("compute", args.compute or "float32", COMPUTE),
    ):
        if value not in known:
            raise ValueError(f"{name}={value} must be one of {', '.join(known)}")
    if bool(args.out) == (args.mode == "fidelity"):
        raise ValueError("out= is the folder of the embeddings: name it, but not with mode=fidelity, which writes none")
    if args.mode == "meta" and args.dtype == LOWRANK:
        raise ValueError("mode=meta stores no captions, which dtype=lowrank is measured on: leave out dtype")
    if args.error and (args.mode != "fidelity" and args.dtype not in ("", LOWRANK)):
        raise ValueError(f"error={args.error:g} belongs to dtype=lowrank or mode=fidelity")
    if args.error and not LEAST_ERROR <= args.error <= MOST_ERROR:
        raise ValueError(f"error={args.error:g} must be from {LEAST_ERROR:g} to {MOST_ERROR:g}")
    check_fields("caption", [args.caption])
    if args.cleaning:
        cleaner(args.cleaning)
    if args.tokens < 0 or args.batch < 1:
        raise ValueError(f"tokens={args.tokens} and batch={args.batch} must be at least 1")


def main(argv: list[str] | None = None) -> None:
    command(embed, Embed, argv)


if __name__ == "__main__":
    main()
