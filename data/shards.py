"""Which shards there are and how many samples each holds."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from data.tars import stats_path


@dataclass(frozen=True, slots=True)
class Shard:
    """One webdataset tar and the number of its samples."""

    path: Path
    count: int


def find_shards(folder: str | Path) -> list[Shard]:
    """The *.tar of a folder in the order of their names.

    Counts come from NNNNN_stats.json as img2dataset writes it, else from the tar's headers.
    Raises: ValueError if there is no folder, no shard or no sample.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder '{folder}': make shards with `python -m data.demo out={folder}` or `data.pack`")
    shards = [Shard(path, _count(path)) for path in sorted(folder.glob("*.tar"))]
    if not shards:
        raise ValueError(f"no shards (*.tar) in '{folder}': make some with `python -m data.pack` or `data.demo`")
    if not any(shard.count for shard in shards):
        raise ValueError(f"the {len(shards)} shards in '{folder}' hold no samples")
    return shards


def _count(path: Path) -> int:
    stats = stats_path(path)
    if stats.exists():
        try:
            return int(json.loads(stats.read_text(encoding="utf-8"))["successes"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{stats}' has no readable \"successes\" ({error}): delete it and the tar is counted"
            ) from None
    try:
        with tarfile.open(path) as tar:
            return len({base_plus_ext(member.name)[0] for member in tar if member.isreg()} - {None})
    except tarfile.TarError as error:
        raise ValueError(
            f"'{path}' is not a readable tar ({str(error).splitlines()[0]}): remove it or make it anew"
        ) from None
