"""Claims on objects of S3, for processes that share nothing but the bucket; files: data.storage.claims."""

import tempfile
import time
from pathlib import Path

from data.storage.claims import STALE_AFTER, Claim, claim, is_dead, new_holder
from data.storage.locations import read_bytes, split
from data.storage.s3_objects import facts, put_if, remove

# Seconds between renewals, each of which is a request.
RENEW_EVERY = 60.0


class ObjectClaim:
    """A process's claim on an object: LOCATION.claim, which only one process can write. It is removed when it ends.

    As with a Claim two processes may make the same object if one of them hangs. Each writes a file of its own, `aside`,
    in TMPDIR, which then becomes the object as a whole.
    """

    def __init__(self, location: str, holder: str, etag: str) -> None:
        self._object, self._holder, self._etag, self._times = _claim_of(location), holder, etag, 0
        self._renewed = time.monotonic()
        self.aside = _aside(location, holder)

    def __enter__(self) -> "ObjectClaim":
        return self

    def __exit__(self, *_: object) -> None:
        self.aside.unlink(missing_ok=True)
        if self.is_held():
            remove(self._object)

    def is_held(self) -> bool:
        """Whether this process still holds the claim."""
        try:
            return _holder(self._object) == self._holder
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Show that the holder is alive; may be called often."""
        if time.monotonic() - self._renewed < RENEW_EVERY:
            return
        # Another content each time, so that who takes it for stale at this moment does not get it.
        self._times, self._renewed = self._times + 1, time.monotonic()
        self._etag = _replace(self._object, self._holder, f"{self._holder} {self._times}", self._etag or "lost")


def claim_location(location: str) -> "Claim | ObjectClaim | None":
    """Claim a path or an object of S3; None if another process holds it.

    Raises: OSError.
    """
    return claim_object(location) if location.startswith("s3://") else claim(Path(location))


def claim_object(location: str) -> ObjectClaim | None:
    """Claim an object; None if another process holds it. The claim of a dead holder is taken over.

    Raises: OSError.
    """
    holder, where = new_holder(), _claim_of(location)
    if etag := put_if(where, holder.encode()):
        return ObjectClaim(location, holder, etag)
    try:
        found, before = facts(where), _holder(where)
    except FileNotFoundError:
        return None
    if before == holder:  # a request that was answered too late, and sent again
        return ObjectClaim(location, holder, found.etag)
    if not is_dead(before) and found.age <= STALE_AFTER:
        return None
    # Of several processes that find it stale one succeeds: then it has another ETag.
    etag = _replace(where, holder, holder, found.etag)
    if etag and is_dead(before):
        _aside(location, before).unlink(missing_ok=True)
    return ObjectClaim(location, holder, etag) if etag else None


def _replace(where: str, holder: str, content: str, etag: str) -> str:
    """Write this holder's claim if the one there has this ETag. Returns: the new ETag, '' if another holds it."""
    if new := put_if(where, content.encode(), etag):
        return new
    try:  # if the answer was lost, the request was sent again, and refused because of the first
        found = facts(where)
        return found.etag if _holder(where) == holder else ""
    except FileNotFoundError:
        return ""


def _claim_of(location: str) -> str:
    return f"{location}.claim"


def _aside(location: str, holder: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{split(location)[1]}.{holder}.part"


def _holder(where: str) -> str:
    return read_bytes(where).decode("utf-8", "replace").partition(" ")[0]
