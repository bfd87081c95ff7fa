"""The Hugging Face hub: names of repositories there, the commits that they stand for, and what it says in one line.

Files of the hub lie in huggingface_hub's own cache (HF_HOME, HF_HUB_CACHE), which is read where the hub is not there.
"""

import errno
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from data.checks import one_line

if TYPE_CHECKING:  # it takes time to import, and a path needs none of it
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
T = TypeVar("T")

# ORG/NAME or NAME, then a branch, a tag or a commit.
NAME = re.compile(r"(?P<repo>(?:\w[\w.-]*/)?\w[\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds that the hub may take to answer a question; HF_HUB_ETAG_TIMEOUT, huggingface_hub's own variable, sets others.
SECONDS = 2.0
# Errors of writing into the cache.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE}


class NoHub(ValueError):
    """The hub does not answer."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of models on the hub, and a branch, tag or commit of it; '' is its main branch."""

    repo: str
    revision: str = ""

    @property
    def is_commit(self) -> bool:
        return bool(COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def hub_name(location: str, bare: bool = False) -> HubName | None:
    """What a text as ORG/NAME or ORG/NAME@REVISION names on the hub; None if a file lies there, or it is no such name.

    bare: a NAME without ORG is one too.
    """
    found = NAME.fullmatch(location)
    if not found or os.path.exists(location) or ("/" not in found["repo"] and not bare):
        return None
    return HubName(found["repo"], found["revision"] or "")


def pinned(location: str, recorded: str = "", bare: bool = False) -> str:
    """A name on the hub with its commit, ORG/NAME@COMMIT, so that it stays the same; a path as it is.

    recorded: where the same was found before. If that is a commit of this repository it is taken again, and a warning
    says where a branch or tag has moved since.
    Raises: ValueError if the hub has no such repository or revision, or does not answer and its cache has none.
    """
    name = hub_name(location, bare)
    if name is None or name.is_commit:
        return location
    if (kept := as_recorded(location, recorded, bare)) != location:
        _tell_if_moved(name, kept)
        return kept
    try:
        commit = ask(name, lambda api: _commit(api, name))
    except NoHub as error:
        commit = _cached_commit(name, error)
    return str(HubName(name.repo, commit))


def as_recorded(location: str, recorded: str, bare: bool = False) -> str:
    """What was recorded, if that is a commit of the repository that a location names without one; else the location."""
    name, before = hub_name(location, bare), hub_name(recorded, bare)
    if name and before and before.is_commit and not name.is_commit and name.repo == before.repo:
        return recorded
    return location


def ask(name: HubName, question: Callable[["HfApi"], T], seconds: float | None = None) -> T:
    """The hub's answer to a question about a repository, if it comes in time.

    Raises: NoHub if it does not come; ValueError, in one line, if it is a refusal.
    """
    from huggingface_hub import HfApi, constants

    seconds = seconds or float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS)
    if constants.HF_HUB_OFFLINE:
        raise NoHub("HF_HUB_OFFLINE is set")
    found: list[Any] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(question(HfApi()))
        except Exception as error:  # its client has errors of its own for each way that a network can fail
            failed.append(error)

    # In a thread, since no timeout of a client bounds the look-up of the hub's address, and its retries take longer.
    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    if failed:
        raise told(failed[0], name) from None
    if not found:
        raise NoHub(f"the hub does not answer within {seconds:g} seconds")
    return found[0]


def told(error: Exception, name: HubName) -> Exception:
    """An error of huggingface_hub in one line: NoHub if the hub was not reached, else what it refuses, and the remedy.

    Its own text is left out, for it may hold addresses that carry keys. An error of this machine's disk stays as it is.
    """
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, NoHub) or (isinstance(error, OSError) and error.errno in DISK):
        return error
    if type(error) is ValueError:  # what it refuses by itself, such as front matter that is no YAML
        return ValueError(one_line(str(error), 200))
    if isinstance(error, errors.GatedRepoError):
        return ValueError(
            f"the hub gives {name.repo} only to those who accept its conditions: do so on its page, "
            "and log in with `hf auth login` or HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{name.repo} on the hub has no branch, tag or commit '{name.revision or 'main'}'")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"the hub has no {name.repo}, or it is private and no token of those who may read it is set (HF_TOKEN)"
        )
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"'{name.repo}' is not a name of the hub: ORG/NAME of letters, digits, '-', '_' and '.'")
    if status in (401, 403):
        return ValueError(f"the hub does not allow this for {name.repo} with this token (HF_TOKEN, or `hf auth login`)")
    if status:
        more = one_line(str(getattr(error, "server_message", "") or ""))
        return NoHub(f"the hub answers {status} for {name.repo}{f' ({more})' if more else ''}")
    return NoHub(f"the hub is not reached ({type(error.__cause__ or error).__name__})")


def _commit(api: "HfApi", name: HubName) -> str:
    api.model_info(name.repo, revision=name.revision or None)  # where the hub is not there, the next goes to the cache
    return api.resolve_revision(name.repo, revision=name.revision or None).resolved  # and keeps it in the cache


def _cached_commit(name: HubName, error: NoHub) -> str:
    """The commit of a branch or tag in the cache. Raises: the error if it has none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    try:
        found = HfApi().resolve_revision(name.repo, revision=name.revision or None, local_files_only=True)
    except RevisionResolutionError:
        raise error from None
    logger.warning("%s, so %s is commit %s of its cache", error, name, found.resolved)
    return found.resolved


def _tell_if_moved(name: HubName, kept: str) -> None:
    """Warn if a branch or tag is another commit by now; a hub that does not answer changes nothing."""
    try:
        now = ask(name, lambda api: api.model_info(name.repo, revision=name.revision or None)).sha
    except ValueError:
        return
    if now != kept.partition("@")[2]:
        logger.warning(
            "%s of %s on the hub has moved to commit %s; %s is taken, as before", name.revision or "main", name.repo,
            now, kept,
        )  # fmt: skip
