"""A training that counts what each rank looks at on shared storage: counted_start.py OUT FOLDER OVERRIDES.

OUT/RANK.json: for each folder in FOLDER how often the rank asked for the size of a file there (stat), listed a folder
(list) and opened a file (open); and which files it opened. Loader workers are processes of their own, and not counted.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from data.cli import arguments


def count_looks(folder: str, looks: Counter, opened: set[str]) -> None:
    """Count from now on.  os.stat has no audit event, and safetensors opens files in Rust."""
    process, stat = os.getpid(), os.stat

    def count(kind: str, path: object) -> None:
        if os.getpid() == process and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder):
            below = os.path.relpath(path, folder)
            looks[f"{below.split(os.sep)[0]} {kind}"] += 1
            if kind == "open":
                opened.add(below)

    def counted_stat(path, *args, **kwargs):
        count("stat", path)
        return stat(path, *args, **kwargs)

    kinds = {"open": "open", "os.scandir": "list", "os.listdir": "list"}
    sys.addaudithook(lambda event, args: count(kinds[event], args[0]) if event in kinds else None)
    os.stat = counted_stat
    import train.checkpoint.reader as reader

    safe_open = reader.safe_open

    def counted_open(path, *args, **kwargs):
        count("open", path)
        return safe_open(path, *args, **kwargs)

    reader.safe_open = counted_open


if __name__ == "__main__":
    from train.main import main

    out, folder, *overrides = arguments(None)
    looks: Counter = Counter()
    opened: set[str] = set()
    count_looks(folder, looks, opened)
    try:
        main(overrides)
    finally:
        os.makedirs(out, exist_ok=True)
        Path(out, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps({**looks, "opened": sorted(opened)}))
