"""Weights of a diffusers folder on the hub: which files are read, and their download into huggingface_hub's cache."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data.storage.hub import HubName, ask, told


def fetch_weights(name: HubName, files: Sequence[str]) -> Path:
    """The folder of a commit in the cache, with the first of these files that the repository has and what it needs.

    Another copy of the weights is not fetched, so a cache that another program filled decides nothing.
    files: of weights, or indices of their shards.
    Raises: ValueError if it has none of them, or the hub does not give them; OSError if they cannot be written.
    """
    from huggingface_hub import get_cached_repo_tree

    _download(name, ["*config.json", "*.index*.json"])
    there = {file.path for file in get_cached_repo_tree(name.repo, revision=name.revision)}
    chosen = next((file for file in files if file in there), "")
    if not chosen:
        raise ValueError(f"{name} holds no diffusion_pytorch_model.*, in unet/ or beside its card")
    wanted = [chosen]
    if chosen.endswith(".json"):
        wanted = _shards(_download(name, [chosen]) / chosen, PurePosixPath(chosen).parent)
    return _download(name, ["*config.json", "*.index*.json", *wanted])


def _shards(index: Path, folder: PurePosixPath) -> list[str]:
    """The files that an index names; one that is none is told by who reads it."""
    try:
        return sorted(
            {str(folder / file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _download(name: HubName, patterns: list[str]) -> Path:
    """The folder of a commit in the cache, with the files of these patterns. Raises: as fetch_weights."""
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
