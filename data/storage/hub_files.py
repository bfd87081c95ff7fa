"""Files of a repository on the hub, in huggingface_hub's cache: only those that are read are fetched."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from data.storage.hub import HubName, NoHub, ask, told

logger = logging.getLogger(__name__)

# Small files that say which others there are.
FIRST = ["*config.json", "*.index*.json"]


def fetch(name: HubName, weights: Sequence[str], beside: Callable[[str], bool] = lambda file: False) -> Path:
    """The folder of a commit in the cache, with the first of these weights that the repository has, and its shards.

    Another copy of the weights is not fetched, so what another program has left in the cache decides nothing.
    weights: files, or indices of shards.  beside: which files are wanted too.
    Raises: ValueError if the repository has none of the weights, or the hub does not give them; OSError if they cannot
    be written.
    """
    from huggingface_hub import get_cached_repo_tree

    try:
        folder = _download(name, FIRST)
    except NoHub as error:
        return _without_list(name, weights, error)
    there = [file.path for file in get_cached_repo_tree(name.repo, revision=name.revision)]
    chosen = next((file for file in weights if file in there), "")
    if not chosen:
        first = ", ".join(weights[:2])
        raise ValueError(f"{name} holds none of the {len(weights)} files of weights that are looked for ({first}, ...)")
    wanted = _shards(folder / chosen, PurePosixPath(chosen).parent) if chosen.endswith(".json") else [chosen]
    return _download(name, [*FIRST, *wanted, *filter(beside, there)])


def _shards(index: Path, folder: PurePosixPath) -> list[str]:
    """The files that an index names; one that is none is told by who reads it."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(folder / file) for file in shards})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _download(name: HubName, patterns: list[str]) -> Path:
    """The folder of a commit in the cache, with all files of these patterns. Raises: as fetch."""
    from huggingface_hub import snapshot_download

    if cached := _cached(name, patterns):
        return cached
    ask(name, lambda api: api.model_info(name.repo, revision=name.revision))  # the retries of a download take long
    try:
        return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns))
    except Exception as error:  # its client has errors of its own for each way that a network can fail
        raise told(error, name) from None


def _cached(name: HubName, patterns: list[str]) -> Path | None:
    """The same folder if all of that is in the cache."""
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    try:
        # Without the list of the files a part of a snapshot would pass for all of it.
        get_cached_repo_tree(name.repo, revision=name.revision)
        return Path(
            snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns, local_files_only=True)
        )
    except (errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        return None


def _without_list(name: HubName, weights: Sequence[str], error: NoHub) -> Path:
    """The folder of a commit that another program has put into the cache without the list of its files.

    Raises: the error if none of the weights is there.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in weights:
        found = try_to_load_from_cache(name.repo, file, revision=name.revision)
        if isinstance(found, str):
            logger.warning("%s, so %s of %s is taken from its cache", error, file, name)
            return Path(found).parents[file.count("/")]
    raise error
