"""Microsoft's Fluent 3D emoji with their names, 1,564 real captioned pictures, as shards.

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    npm pack cldr-annotations-full@41.0.0 cldr-annotations-derived-full@41.0.0
    python -m data.fluent packages=. out=DIR

Pictures: MIT licence; names: CLDR, Unicode licence.
"""

import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from data.cli import command, location
from data.config import ImageRules
from data.prepare.packing import check_shard_size, find_changes, record_recipe, write_changes
from data.prepare.rows import Row

PICTURES = "lobehub-fluent-emoji-3d-1.1.0.tgz"
# Pinned: later releases name more emoji and change the case of a few names, which would make another dataset.
NAMES = {
    "cldr-annotations-full-41.0.0.tgz": "annotations",
    "cldr-annotations-derived-full-41.0.0.tgz": "annotationsDerived",
}
NPM = "npm pack @lobehub/fluent-emoji-3d@1.1.0 cldr-annotations-full@41.0.0 cldr-annotations-derived-full@41.0.0"
# Two thirds of all files have one of these in their name: variants that differ in little, or pictures of text.
LEFT_OUT = ("skin tone", "flag", "keycap")
VARIATION_SELECTOR = "fe0f"


@dataclass
class Fluent:
    """Makes shards of Microsoft's Fluent 3D emoji and their names from three packages of npm.

    A rerun makes only what is missing.

    packages: folder with the three .tgz files that `npm pack` leaves there (see data/fluent.py).
    out: folder for the shards.
    shard_size: pictures in a shard.
    """

    packages: str = location()
    out: str = location()
    shard_size: int = 100


def names_of(packages: Path) -> dict[str, str]:
    """The English name that CLDR gives each emoji, by the emoji's characters without variation selectors."""
    names = {}
    for file, kind in NAMES.items():
        with tarfile.open(packages / file) as tar:
            stored = tar.extractfile(f"package/{kind}/en/annotations.json")
            assert stored is not None
            for emoji, entry in json.load(stored)[kind]["annotations"].items():
                if "tts" in entry:
                    names[emoji] = entry["tts"][0]
    return names


def captioned(packages: Path, names: dict[str, str]) -> dict[str, tuple[str, bytes]]:
    """File name -> (caption, webp bytes) of the emoji that have a name and are not left out, sorted by file name."""
    found = {}
    with tarfile.open(packages / PICTURES) as tar:
        for member in tar:
            file = Path(member.name).name
            if not re.fullmatch(r"[0-9a-f]+(-[0-9a-f]+)*\.webp", file):
                continue
            points = file.removesuffix(".webp").split("-")
            name = names.get("".join(chr(int(point, 16)) for point in points if point != VARIATION_SELECTOR))
            stored = tar.extractfile(member)
            if name and stored and not any(word in name for word in LEFT_OUT):
                found[file] = (name, stored.read())
    return dict(sorted(found.items()))


def to_jpeg(webp: bytes) -> bytes:
    """The picture on white, as JPEG."""
    # Pillow 9.2.0's libwebp has a known hole (CVE-2023-4863). What is read here comes from one pinned version of one
    # package; never point it at the open web.
    picture = Image.open(io.BytesIO(webp), formats=["WEBP"]).convert("RGBA")
    jpeg = io.BytesIO()
    white = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(white, picture).convert("RGB").save(jpeg, "JPEG", quality=95)
    return jpeg.getvalue()


def write_fluent(args: Fluent) -> None:
    """Write the shards that are not there yet.

    Raises: ValueError if an argument cannot be, a package is missing, or out holds another dataset; OSError.
    """
    check_shard_size(args.shard_size)
    packages, out = Path(args.packages), Path(args.out)
    files = (PICTURES, *NAMES)
    missing = [file for file in files if not (packages / file).is_file()]
    if missing:
        raise ValueError(f"'{packages.absolute()}' lacks {', '.join(missing)}; get them there with: {NPM}")
    hashes = {file: hashlib.sha256((packages / file).read_bytes()).hexdigest() for file in files}
    record_recipe(out, "fluent.json", {"packages": hashes, "shard_size": args.shard_size})
    emoji = captioned(packages, names_of(packages))
    if not emoji:
        raise ValueError(f"'{(packages / PICTURES).absolute()}' holds no emoji that {' or '.join(NAMES)} names")
    rows = [Row(file, partial(to_jpeg, webp), caption) for file, (caption, webp) in emoji.items()]
    rules = ImageRules()
    write_changes(find_changes(rows, out, rules), out, args.shard_size, rules)


def main(argv: list[str] | None = None) -> None:
    command(write_fluent, Fluent, argv)


if __name__ == "__main__":
    main()
