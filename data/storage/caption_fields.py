"""The captions of a sample by their fields: KEY.txt, other texts beside the image, and entries of its KEY.json."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The caption that every dataset has, and the one that is taken where nothing else is said.
TXT = "txt"
NAME = re.compile(r"[A-Za-z0-9_-]+")
# A larger KEY.json is not parsed: img2dataset's take 1 KB, with all of EXIF some 100 KB.
MAX_JSON = 1 << 20


def check_fields(key: str, fields: Sequence[str]) -> None:
    """Raises: ValueError if one of the fields has no name that a caption can have, or two have the same.

    key: the key of the command line that they come from.
    """
    for field in fields:
        if not NAME.fullmatch(field) or field.lower() == "json" or (field.lower() == TXT and field != TXT):
            raise ValueError(
                f"{key}: '{field}' cannot name a caption: write txt, or NAME (letters, digits, _ and -) for "
                "KEY.NAME.txt, KEY.NAME or the entry NAME of KEY.json"
            )
    if not fields or len({field.lower() for field in fields}) < len(fields):
        raise ValueError(f"{key}: the fields [{', '.join(fields)}] must be one or more different ones")


def caption_extensions(fields: Iterable[str]) -> set[str]:
    """The extensions of the files in which find_captions looks."""
    others = {field.lower() for field in fields if field != TXT}
    found = {name for other in others for name in (f"{other}.txt", other, "json")}
    return found | ({TXT} if TXT in fields else set())


def find_captions(members: Mapping[str, bytes], fields: Iterable[str]) -> dict[str, bytes]:
    """The captions that a sample has, by field, byte for byte as they are stored; those of KEY.json in UTF-8.

    txt is KEY.txt. NAME is KEY.NAME.txt, else KEY.NAME, else the entry NAME of KEY.json if that is a text.
    members: {extension: bytes} of the sample's files; nothing in them can make this fail.
    """
    found: dict[str, bytes] = {}
    facts: dict[str, Any] | None = None
    for field in fields:
        name = field.lower()
        places = (TXT,) if field == TXT else (f"{name}.txt", name)
        caption = next((members[place] for place in places if place in members), None)
        if caption is None and field != TXT and "json" in members:
            facts = _parse(members["json"]) if facts is None else facts
            entry = facts.get(field)
            # A lone surrogate, which JSON can write, gives bytes that are not UTF-8, and so a caption that is no text.
            caption = entry.encode("utf-8", "surrogatepass") if isinstance(entry, str) else None
        if caption is not None:
            found[field] = caption
    return found


def _parse(data: bytes) -> dict[str, Any]:
    """The entries of a KEY.json, none if it cannot be read."""
    try:
        facts = json.loads(data) if len(data) <= MAX_JSON else None
    except (ValueError, RecursionError):  # not JSON, not UTF-8, thousands of digits; thousands of brackets
        return {}
    return facts if isinstance(facts, dict) else {}
