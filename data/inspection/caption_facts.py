"""What is told of captions beside their words: their scripts, and their lengths in tokens."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from data.storage.hub import hub_name
from data.text.captions import CLEANINGS
from data.text.meta import TextMeta

NO_LETTERS = "no letters"
# Letters of a caption that are looked at.
MAX_LETTERS = 1000
# Scripts that make up one way to write a language; others go by the first word of their letters' names.
JAPANESE, CHINESE = "Japanese (with kana)", "Chinese characters"


def script(caption: str) -> str:
    """The script of most of a caption's letters, such as Latin; of a caption with any kana Japanese."""
    counts = Counter(filter(None, map(_script_of, caption[:MAX_LETTERS])))
    if counts[JAPANESE]:
        return JAPANESE
    return counts.most_common(1)[0][0] if counts else NO_LETTERS


def scripts(captions: Iterable[str]) -> Counter[str]:
    """How many captions are in which script. A language is not guessed: captions are too short for it."""
    return Counter(map(script, captions))


@cache
def _script_of(letter: str) -> str:
    if not letter.isalpha():
        return ""
    name = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    first = name.partition(" ")[0].partition("-")[0]
    return {"HIRAGANA": JAPANESE, "KATAKANA": JAPANESE, "CJK": CHINESE}.get(first, first.capitalize() or "others")


def token_counts(captions: list[str], meta: TextMeta | None) -> list[int] | None:
    """The tokens of each caption after the cleaning, with the end mark, before they are cut to meta.tokens.

    None if the tokenizer of the embeddings' encoder is not on this machine, or there are no embeddings.
    """
    tokenizer = _tokenizer(meta.encoder) if meta and captions and meta.cleaning in CLEANINGS else None
    if meta is None or tokenizer is None:
        return None
    clean = CLEANINGS[meta.cleaning]
    return [len(ids) for ids in tokenizer([clean(caption) for caption in captions], verbose=False)["input_ids"]]


def _tokenizer(encoder: str) -> Any:
    """The tokenizer of an encoder in a folder or in the hub's cache; None if it is not there."""
    if encoder.startswith((".", "/")) and not Path(encoder).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer  # here, since its import is slow

    try:
        if name := hub_name(encoder, bare=True):
            cached = try_to_load_from_cache(name.repo, "config.json", revision=name.revision or None)
            if not isinstance(cached, str):
                return None
            encoder = str(Path(cached).parent)
        return AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    except (OSError, ValueError):
        return None
