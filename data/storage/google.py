"""Google Cloud Storage by its XML API over plain HTTP: gs://BUCKET/PATH. google-auth finds the credentials."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import quote
from xml.etree import ElementTree

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from data.storage.clients import (
    CONNECT_TIMEOUT,
    READ_TIMEOUT,
    RETRY_STATUSES,
    S3_TRIES,
    RangeResponse,
    TransientError,
    UnreadableError,
    check_status,
    http_range,
)

# As Google's own libraries name it; a server that needs no credentials.
EMULATOR = "STORAGE_EMULATOR_HOST"
ENDPOINT = "https://storage.googleapis.com"
REMEDY = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
RETRIES = Retry(total=S3_TRIES, backoff_factor=0.5, status_forcelist=(*RETRY_STATUSES, 500, 502, 503, 504))


@contextmanager
def google_range(location: str, start: int, end: int) -> Iterator[RangeResponse]:
    """The bytes [start, end) of gs://BUCKET/PATH.

    Raises: as http_range.
    """
    session = _session(os.getpid(), 0)
    with _refusals(location), http_range(location, start, end, url=_url(location), session=session) as response:
        yield response


def list_google(folder: str) -> list[str]:
    """The names in gs://BUCKET/FOLDER, however many.

    Raises: OSError.
    """
    bucket, _, key = folder.removeprefix("gs://").rstrip("/").partition("/")
    prefix = f"{key}/" if key else ""
    names, query = [], {"list-type": "2", "prefix": prefix, "delimiter": "/"}
    while True:
        page = ElementTree.fromstring(_request("GET", folder, f"{_endpoint()}/{bucket}", params=query))
        names += [found.text[len(prefix) :] for found in page.findall("{*}Contents/{*}Key") if found.text]
        if not (token := page.findtext("{*}NextContinuationToken")):
            return names
        query["continuation-token"] = token


def write_google(location: str, data: bytes) -> None:
    """Store an object, whole or not at all.

    Raises: OSError.
    """
    _request("PUT", location, _url(location), data=data)


def _request(method: str, location: str, url: str, **more: object) -> bytes:
    session, timeout = _session(os.getpid(), S3_TRIES), (CONNECT_TIMEOUT, READ_TIMEOUT)
    try:
        with _refusals(location):
            response = session.request(method, url, timeout=timeout, **more)  # type: ignore[arg-type]
    except requests.RequestException as error:
        raise UnreadableError(f"{location}: {type(error).__name__}: {error}") from None
    check_status(location, response.status_code)
    return response.content


@contextmanager
def _refusals(location: str) -> Iterator[None]:
    """Raises: TransientError, PermissionError in place of google-auth's own errors, as where a token ended."""
    try:
        from google.auth.exceptions import GoogleAuthError, TransportError
    except ImportError:  # then there are no credentials that could fail
        yield
        return
    try:
        yield
    except TransportError as error:
        raise TransientError(f"{type(error).__name__}: {str(error)[:200]}") from None
    except GoogleAuthError as error:
        raise PermissionError(f"{location}: {str(error).splitlines()[0][:200]}: {REMEDY}") from None


def _url(location: str) -> str:
    return f"{_endpoint()}/{quote(location.removeprefix('gs://'))}"


def _endpoint() -> str:
    host = os.environ.get(EMULATOR, "")
    return (host if "://" in host else f"http://{host}") if host else ENDPOINT


@lru_cache(maxsize=2)
def _session(process: int, tries: int) -> requests.Session:
    """A session of a process. Raises: OSError without google-auth or credentials."""
    session = requests.Session()
    if not os.environ.get(EMULATOR):
        try:
            import google.auth
            from google.auth.exceptions import GoogleAuthError
            from google.auth.transport.requests import AuthorizedSession
        except ImportError:
            raise UnreadableError("gs:// needs google-auth: pip install google-auth") from None
        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
        except GoogleAuthError as error:
            raise PermissionError(f"no credentials for gs:// ({str(error).splitlines()[0][:200]}): {REMEDY}") from None
        session = AuthorizedSession(credentials)
    if tries:
        session.mount("https://", HTTPAdapter(max_retries=RETRIES))
        session.mount("http://", HTTPAdapter(max_retries=RETRIES))
    return session
