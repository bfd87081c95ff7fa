# ruff: noqa: RUF001
"""Caption cleaning against diffusers' own, and in time that grows with the caption alone."""

import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from bs4 import ParserRejectedMarkup
from diffusers import IFPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.text.captions import MARKUP_LIMIT, cleaner, if_twice, lost_words, lower_strip


class Theirs:
    """IFPipeline's treatment of prompts without the pipeline's networks."""

    bad_punct_regex = IFPipeline.bad_punct_regex
    _clean_caption = IFPipeline._clean_caption
    text = IFPipeline._text_preprocessing


def theirs(caption: str) -> str:
    return Theirs().text(caption, clean_caption=True)[0]


# One or more for every rule, and what rules stumble over.
# fmt: off
FRAGMENTS = [
    "http://", "https:", "https:/", "https:/x", "www:", "www://x", "ttps://", "a.com", "b.co", "x.co.uk",
    "foo-bar.org/path_a/b-c/", "a.net@", "e.ru@b", "éa.com", "@", "@nick", "@@", "<b>", "</b>", "<a href='x'>",
    "<script>x</script>", "<style>y</style>", "<!--", "-->", "<", ">", "<p>one<p>two", "<br/>", "</", "<a", "='",
    "<![CDATA[x]]>", "<?php ?>", "<!doctype html>", "<textarea>", "&lt;b&gt;", "&amp;", "&quot;", "&quot",
    "&amp;quot;", "&#65;", "&#x41;", "&#xD800;", "&#55296", "&#0;", "&#128;", "&#9999999999999999999999999;",
    "&bogus;", "&uuml;", "&ampere", "中文", "ㇰ", "㌀", "䷀", "–", "—", "―", "〜", "«", "»", "‘", "’", "´", "`",
    "1.2.3.4",
    "1:23 ", "\\n", "\n", "\r\n", "\t", "#12", "#12345", "#1234a", "123456", "1234567a", "x.png", ".jpg",
    "a.jpeg.png", "a.mp4b", "''", '""', '\'"', "..", "...", "***", "·", "½", "¿", " . ", "a-b_c-d-e", "_", "-",
    "ab123", "abc12d", "1a1", "a1a1a1", "j2d1a2a", "2d", "worldwide   ", "free ", "shipping", "download", " free",
    "click for it", "click on", "png", "png images", "pdf image", "page   12", "3x4", "3.5×2.", "1.x2.3a", "10х20",
    "5.12×3", " : ", "a,b", "a.b", "a/b", ".com", ".it", ".", "é", "İ", "ǅ", "ß", "ﬁ", "ï»¿", "Ã©", "â€™", "＆＃６５；",
    "＆lt；", "😀", "\U0001f469\u200d\U0001f467", "\x00", "\x1b[31m", "\x85", "\u2028", "\u200b", "\ufeff", "\xad",
    "%20", "%C3%A9", "%ff", "%", "+", "%3Cb%3E", "<person>", "<PERSON>", "a", "1", "x", " ", "  ", ":", ";", "'", '"',
    "^", "~", "free download", "AUSVERKAUFT", "|", "||",
]
# fmt: on

ANYTHING = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4), st.characters(exclude_categories=["Cs"]))


@settings(max_examples=1500, deadline=None)
@given(st.lists(ANYTHING, max_size=14).map("".join))
@example("")
@example("see http://a.com.http://b.co@ and c.net/x")
@example("worldwide   free   shipping... 5.12×3.5a")
def test_cleaning_is_that_of_the_pipeline(caption):
    try:
        expected = theirs(caption)
    except ParserRejectedMarkup:  # '<![x': nothing comes out of the pipeline
        assert if_twice(caption) is not None
        return
    assert if_twice(caption) == expected


def corpus() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(3000):
        yield "".join(draw.choice(FRAGMENTS) for _ in range(draw.randrange(1, 40)))
    for pool in ("a.-b com/@", "1.x2a×_ ", "' \".,-:\n", "<a b='c'>&#1;"):
        for _ in range(500):
            yield "".join(draw.choice(pool) for _ in range(draw.randrange(1, 60)))


def test_cleaning_is_that_of_the_pipeline_on_a_nasty_corpus():
    captions = list(corpus())
    cleaned = [if_twice(caption) for caption in captions]
    assert len(set(cleaned)) > 3000
    for caption, ours in zip(captions, cleaned, strict=True):
        try:
            assert ours == theirs(caption), caption
        except ParserRejectedMarkup:
            continue


def test_a_megabyte_of_text_is_cleaned_as_the_pipeline_does():
    caption = " ".join(f"A photo, of {i} cats.png at www.cats.com/{i} – «Ã©» free shipping" for i in range(16_000))
    assert len(caption) > 1_000_000
    assert if_twice(caption) == theirs(caption)


def test_markup_is_cut_and_what_no_parser_takes_is_kept():
    long = "<b>word</b> " * 1000
    assert if_twice(long) == theirs(long[:MARKUP_LIMIT])
    with pytest.raises(ParserRejectedMarkup):
        theirs("a cat <![<![")
    assert if_twice("a cat <![<![") == "a cat <! <!"
    number = "a cat ＆＃" + "9" * 5000
    with pytest.raises(ValueError, match="4300"):
        theirs(number + "a")
    assert if_twice(number + "a") == if_twice(number[:30] + "a") == theirs(number[:30] + "a")


def test_halves_of_characters():
    assert if_twice("a \ud83d\ude00 cat \ud800") == if_twice("a 😀 cat �") == "a 😀 cat �"
    assert lower_strip(" A \udc00 Cat ") == "a � cat"
    assert cleaner("lower-strip") is lower_strip


@pytest.mark.parametrize("caption", ["", "  \n", "!?*** ...", "||", "<br>", "http://a.com", "中文"])
def test_what_leaves_nothing_is_the_empty_caption_or_bare_marks(caption):
    assert if_twice(caption) == theirs(caption)
    assert not [letter for letter in if_twice(caption) if letter.isalnum()]


# Each makes the patterns of the pipeline, or its HTML parser, look at the same characters over and over.
HOSTILE = {
    "dots": "'a.' * (n // 2)", "dashes": "'a-' * (n // 2)", "file": "'a' * n", "spaces": "'a' + ' ' * n + 'b'",
    "digits": "'1' * n", "code": "'a1a' + '1' * n + '_'", "size": "'1' * n + 'x'", "number": "'&#' + '9' * n",
    "page": "'page' + ' ' * n", "free": "'free ' * (n // 5)", "tags": "'<a ' * (n // 3)",
    "comment": "'<!--' * (n // 4)", "nested": "'<b>' * (n // 3)", "quotes": "'\"' + 'a ' * (n // 2)",
    "mojibake": "'Ã' * n",
}  # fmt: skip


def test_long_captions_of_anything_take_seconds():
    """What looked again at the same characters would take from hours to years."""
    code = "from data.text.captions import if_twice\nn = 300_000\n"
    code += "\n".join(f"print(len(if_twice({caption})))" for caption in HOSTILE.values())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lengths = list(map(int, done.stdout.split()))
    assert len(lengths) == len(HOSTILE) and max(lengths) <= 600_000, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        ("a photo of a xyz123 toy", ["xyz123"]),
        ("a @sks dog", ["@sks"]),
        ("a <new1> dog", ["<new1>"]),
        ("一只猫 toy", ["一只猫"]),
        ("a zwx猫 toy, dog-xyz123", ["猫", "xyz123"]),
        ("xyz123", ["xyz123"]),
        ("see www.a.com/foo, a cat.png", ["www.a.com/foo,", "cat.png"]),
        ('a (zwx) toy - it\'s "sks", Café & <person>: 12:30, a a V* 1girl', []),
    ],
)
def test_words_that_the_cleaning_cuts_away_are_found(prompt, lost):
    assert lost_words(prompt, if_twice) == lost
    assert not lost_words(prompt, lower_strip)


def test_words_of_a_prompt_without_end_are_looked_for_in_seconds():
    code = "from data.text.captions import if_twice, lost_words\n"
    code += "print(set(lost_words('xyz123 cat ' * 20_000, if_twice)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "{'xyz123'}\n", done.stderr[-3000:]
