"""Which columns of a table hold the pictures, the captions, and what goes into KEY.json; a row from their cells."""

import datetime
import decimal
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.checks import did_you_mean, one_line
from data.prepare.rows import Row, Unusable, caption_text

IMAGE_COLUMNS = ("path", "image", "file", "file_name", "filename", "url")
CAPTION_COLUMNS = ("caption", "text")
# The entries of KEY.json that data.pack makes itself. Of a column with the name of one of them nothing is taken.
OWN = ("caption", "key", "status", "width", "height")
# What KEY.json calls the address of a picture, whatever the case in the table: LAION writes URL.
ADDRESS = "url"


class Found(NamedTuple):
    """The columns of one table.  more: column of each entry of KEY.json."""

    image: str
    caption: str
    more: dict[str, str]


class Columns:
    """The columns as a user named them.

    image, caption: '' takes the first of IMAGE_COLUMNS and of CAPTION_COLUMNS that a table has.
    more: columns that go into KEY.json; none takes all others that hold texts, numbers, dates or truth values.
    left_out: columns of which something was left out because it is none of these, or has one of OWN for its name.
    """

    def __init__(self, image: str = "", caption: str = "", more: Sequence[str] = ()) -> None:
        self.image, self.caption, self.more = image, caption, tuple(more)
        self.left_out: dict[str, None] = {}

    def find(self, table: Path, names: Sequence[str], with_bytes: Sequence[str] = ()) -> Found:
        """The columns of a table with these names. with_bytes: those that hold bytes.

        Raises: ValueError.
        """
        embedded = [name for name in with_bytes if name.lower() in IMAGE_COLUMNS]
        candidates = names if self.image else embedded or names
        image = _pick(table, "image_column", (self.image,) if self.image else IMAGE_COLUMNS, candidates, self.image)
        captions = (self.caption,) if self.caption else CAPTION_COLUMNS
        caption = _pick(table, "caption_column", captions, names, self.caption)
        if refused := [name for name in self.more if name.lower() in OWN]:
            raise ValueError(f"columns={refused[0]}: KEY.json has a {refused[0].lower()} of data.pack's own")
        chosen = [_pick(table, "columns", (name,), names, name) for name in self.more]
        others = [name for name in names if name not in (image, caption)]
        own = {name for name in others if name in OWN}
        self.left_out |= dict.fromkeys(own if not chosen else ())
        nameless = [name for name in others if not name.strip()]  # such as the index of a table of pandas
        self.left_out |= dict.fromkeys(["a column without a name"] if nameless and not chosen else ())
        more = chosen or [name for name in others if name not in own and name not in nameless]
        for name in (image, caption, *more):
            if names.count(name) > 1:
                raise ValueError(
                    f"'{table.absolute()}' has {names.count(name)} columns '{one_line(name)}': "
                    "rename them, or name those that go into KEY.json by columns="
                )
        return Found(image, caption, {ADDRESS if name.lower() == ADDRESS else _utf8(name): name for name in more})

    def row(self, table: Path, name: Any, caption: Any, more: Mapping[str, Any], problem: str = "") -> Row:
        """A row whose picture is a file, at a path from the table's folder. A missing value becomes an empty one.

        more: the values of the further columns, by the entry of KEY.json.
        A value may be an Unusable that says why there is none: of the path or the caption it becomes the row's problem.
        """
        try:
            path, text = _text(name, "path"), _text(caption, "caption")
        except Unusable as error:
            return Row(name if isinstance(name, str) else "", problem=str(error))
        file = path.removeprefix("file://")
        where = file if "://" in file else os.path.join(table.parent, file)
        return Row(path, where, text, more=self._json(more), problem=problem)

    def _json(self, more: Mapping[str, Any]) -> str:
        kept = {}
        for name, value in more.items():
            try:
                kept[name] = _plain(value)
            except Unusable:
                kept[name] = self.left_out[name] = None
            except TypeError:
                self.left_out[name] = None
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":")) if kept else ""


def _pick(table: Path, option: str, wanted: Sequence[str], names: Sequence[str], given: str) -> str:
    """The first wanted column, in any case (LAION writes URL and TEXT). given: the wanted one, if a user named it."""
    by_name = {name.lower(): name for name in reversed(names)}
    for name in wanted:
        if name in names or name.lower() in by_name:
            return name if name in names else by_name[name.lower()]
    what = f"no column '{one_line(given)}'{did_you_mean(given, names)}"
    what = what if given else f"no column {' or '.join(wanted)}"
    listed = one_line(", ".join(names), 300) or "none, it is empty"
    hint = "" if given or not names else f": name one by {option}="
    raise ValueError(f"'{table.absolute()}' has {what}; its columns: {listed}{hint}")


def _text(value: Any, what: str) -> str:
    """A cell as text. NaN is what pandas leaves for a missing one. Raises: Unusable for what is no text."""
    if isinstance(value, Unusable):
        raise Unusable(f"{what} {value}")
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return caption_text(value)
    if isinstance(value, (list, dict)):
        raise Unusable(f"its {what} is a {'list' if isinstance(value, list) else 'group of values'}, not a text")
    return str(value)


def _plain(value: Any) -> Any:
    """A cell as JSON has it; null for a number that is none.

    Raises: TypeError for what is no single value; Unusable for one that could not be read.
    """
    if isinstance(value, Unusable):
        raise value
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _utf8(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise TypeError


def _utf8(text: str) -> str:
    """A text with '?' for each character that UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()
