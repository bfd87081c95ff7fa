"""The cleaning of captions before the tokenizer, by name. Training, sampling and export use the same.

'if-1' is the cleaning of IF's training stage, run twice. Its result is that of diffusers'
IFPipeline(clean_caption=True); 'lower-strip' gives that of clean_caption=False. The rules are IF's, the matching is
not: IF's patterns scan the same characters many times, these scan them once, so that the time grows with a caption's
length alone.
"""

import html
import re
import warnings
from collections.abc import Callable
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, ParserRejectedMarkup

CLEANING = "if-1"
# Python's HTML parser searches all following text for the end of each unfinished tag: 32,000 characters of such tags
# take 40 s. A caption with markup is therefore cut after so many characters, ten times what the encoder's tokens hold.
MARKUP_LIMIT = 1 << 12

warnings.filterwarnings("ignore", category=MarkupResemblesLocatorWarning)

Rules = list[tuple[re.Pattern[str], str]]

_DOMAIN_RUN = re.compile(r"[a-zA-Z0-9.\-]+")
_DOMAIN_END = re.compile(r"\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)")
_WORD_EDGE = re.compile(r"\b")
_SCHEMES = [re.compile(rf"\b{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])") for scheme in ("https?", "www")]
# Python parses numbers of at most 4300 digits. One that is cut to 20 digits does not name a character either.
_LONG_NUMBER = re.compile(r"(&#[0-9]{20})[0-9]+|(&#[xX][0-9a-fA-F]{20})[0-9a-fA-F]+")
# Of a prompt: its words, and the runs of letters, digits or CJK within a word.
PROMPT_WORDS = 128
_WORD, _PART, _LETTERS = re.compile(r"\S+"), re.compile("[\u31c0-\u9fff]+|[^\\W\u31c0-\u9fff]+"), re.compile(r"\w+")
_EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
_DASHES += "\ufe31\ufe32\ufe58\ufe63\uff0d"


def _rules(*rules: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_BEFORE_REPAIR = _rules(
    (r"@\w+", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters and their signs
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # internet addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.(?:{_EXTENSIONS})", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
)
_AFTER_REPAIR = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_EXTENSIONS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    (r"\b\d+(?:\.\d*)?[x\u0445\u00d7]\d+(?:\.\d*)?\b", ""),  # sizes
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def lower_strip(caption: str) -> str:
    """The caption in lower case, without white space at its ends."""
    return _without_surrogates(caption).lower().strip()


def if_twice(caption: str) -> str:
    """IF's cleaning, applied twice. Of a caption with markup only the first MARKUP_LIMIT characters are used."""
    return _clean_once(_clean_once(_without_surrogates(caption)))


def _without_surrogates(caption: str) -> str:
    """Surrogate pairs joined, and single surrogates replaced, since no tokenizer accepts them."""
    return caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _clean_once(caption: str) -> str:
    caption = unquote_plus(caption).strip().lower()
    caption = caption.replace("<person>", "person")
    for scheme in _SCHEMES:
        caption = _without_urls(caption, scheme)
    caption = _apply(_BEFORE_REPAIR, _without_markup(caption))
    if caption.count("-") + caption.count("_") > 3:
        caption = caption.replace("-", " ").replace("_", " ")
    caption = ftfy.fix_text(caption)
    for _ in range(2):
        caption = html.unescape(_LONG_NUMBER.sub(r"\1\2", caption))
    return _apply(_AFTER_REPAIR, caption).strip()


def _apply(rules: Rules, caption: str) -> str:
    for pattern, replacement in rules:
        caption = pattern.sub(replacement, caption)
    return caption


def _without_urls(caption: str, scheme: re.Pattern[str]) -> str:
    """The caption without its URLs, which begin with the scheme or contain a well-known domain.

    IF's pattern is \\b(SCHEME|RUN END) with the greedy RUN [a-zA-Z0-9.-]+ and END, the .com/path of a domain. The last
    END in a run counts, wherever in the run the match begins, so each run is scanned once.
    """
    domains = []
    for run in _DOMAIN_RUN.finditer(caption):
        dot = caption.rfind(".", run.start() + 1, run.end())
        while dot > 0:
            if end := _DOMAIN_END.match(caption, dot):
                domains.append((run.start(), dot, end.end()))
                break
            dot = caption.rfind(".", run.start() + 1, dot)
    kept, position, found = [], 0, scheme.search(caption)
    for start, dot, domain_end in [*domains, (len(caption), 0, 0)]:
        while found and found.start() < max(start, dot):
            # A scheme that begins in a domain's run is not part of the domain: its colon, which ends the run, lies
            # behind the domain.
            if found.start() >= position:
                kept.append(caption[position : found.start()])
                position = found.end()
            found = scheme.search(caption, position)
        edge = _WORD_EDGE.search(caption, max(start, position)) if position < dot else None
        if edge and edge.start() < dot:
            kept.append(caption[position : edge.start()])
            position = domain_end
    return "".join([*kept, caption[position:]])


def _without_markup(caption: str) -> str:
    """The text of HTML; the caption itself if the parser rejects it."""
    if "<" not in caption and "&" not in caption:
        return caption
    caption = caption[:MARKUP_LIMIT]
    try:
        return BeautifulSoup(caption, features="html.parser").text
    except ParserRejectedMarkup:
        return caption


CLEANINGS: dict[str, Callable[[str], str]] = {"if-1": if_twice, "lower-strip": lower_strip}


def cleaner(name: str) -> Callable[[str], str]:
    """The cleaning with this name.

    Raises: ValueError if there is none.
    """
    if name not in CLEANINGS:
        raise ValueError(f"cleaning={name} must be one of {', '.join(CLEANINGS)}; this version knows no other")
    return CLEANINGS[name]


def lost_words(prompt: str, clean: Callable[[str], str]) -> list[str]:
    """The words of a prompt that a cleaning cuts away, such as codes, @names, <tags> and CJK, in their order.

    A word is lost if the prompt without it comes out with the same letters and digits. Of a long prompt only the first
    PROMPT_WORDS words and MARKUP_LIMIT characters are looked at, which is more than the tokens hold.
    """
    prompt = prompt[:MARKUP_LIMIT]

    def letters(caption: str) -> list[str]:
        return _LETTERS.findall(clean(caption))

    whole, lost = letters(prompt), []
    for word in list(_WORD.finditer(prompt))[:PROMPT_WORDS]:
        parts = list(_PART.finditer(prompt, *word.span()))
        for piece in [word] + (parts if len(parts) > 1 else []):
            if parts and letters(prompt[: piece.start()] + prompt[piece.end() :]) == whole:
                lost.append(piece[0])
                if piece is word:
                    break
    return lost
