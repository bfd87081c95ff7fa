"""Azure's blob storage by its own library, the part of it that is not asynchronous: az://CONTAINER/PATH."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from data.storage import clients
from data.storage.clients import (
    RANGE_NOT_SATISFIABLE,
    S3_TRIES,
    RangeResponse,
    TransientError,
    UnreadableError,
    check_status,
)

CONNECTION, ACCOUNT = "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT"
SECRETS = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN")


@contextmanager
def azure_range(location: str, start: int, end: int) -> Iterator[RangeResponse]:
    """The bytes [start, end) of az://CONTAINER/PATH.

    Raises: as http_range.
    """
    with _errors(location):
        from azure.core.exceptions import HttpResponseError

        try:
            stream = _blob(location, 0).download_blob(offset=start, length=end - start, max_concurrency=1)
        except HttpResponseError as error:
            if error.status_code != RANGE_NOT_SATISFIABLE or start:
                raise
            yield RangeResponse(iter(()), 0, "")
            return
        found = stream.properties
        size = (found.content_range or "").rpartition("/")[2]
        yield RangeResponse(stream.chunks(), int(size) if size.isdigit() else found.size, found.etag)


def list_azure(folder: str) -> list[str]:
    """The names in az://CONTAINER/FOLDER, however many.

    Raises: OSError.
    """
    container, _, key = folder.removeprefix("az://").rstrip("/").partition("/")
    prefix = f"{key}/" if key else ""
    with _errors(folder):
        found = _service(os.getpid(), S3_TRIES).get_container_client(container).walk_blobs(prefix, delimiter="/")
        return [blob.name[len(prefix) :] for blob in found if not blob.name.endswith("/")]


def write_azure(location: str, data: bytes) -> None:
    """Store a blob, whole or not at all.

    Raises: OSError.
    """
    with _errors(location):
        _blob(location, S3_TRIES).upload_blob(data, overwrite=True)


def _blob(location: str, tries: int) -> Any:
    container, _, key = location.removeprefix("az://").partition("/")
    return _service(os.getpid(), tries).get_blob_client(container, key)


@lru_cache(maxsize=2)
def _service(process: int, tries: int) -> Any:
    """The client of a process. Raises: OSError without the library or credentials."""
    try:
        from azure.storage.blob import BlobServiceClient
    except ImportError:
        raise UnreadableError("az:// needs azure-storage-blob: pip install azure-storage-blob") from None
    times = {"connection_timeout": clients.CONNECT_TIMEOUT, "read_timeout": clients.READ_TIMEOUT}
    options: dict[str, Any] = {"retry_total": tries, **times}
    if text := os.environ.get(CONNECTION):
        try:
            return BlobServiceClient.from_connection_string(text, **options)
        except ValueError as error:
            raise PermissionError(f"{CONNECTION} cannot be used: {error}") from None
    account, secret = (
        os.environ.get(ACCOUNT),
        next((os.environ[name] for name in SECRETS if os.environ.get(name)), None),
    )
    if not account or not secret:
        raise PermissionError(f"no credentials for az://: set {CONNECTION}, or {ACCOUNT} and {' or '.join(SECRETS)}")
    return BlobServiceClient(f"https://{account}.blob.core.windows.net", credential=secret, **options)


@contextmanager
def _errors(location: str) -> Iterator[None]:
    _service(os.getpid(), 0)  # what it raises needs no translation, and says when the library is missing
    from azure.core.exceptions import AzureError, HttpResponseError, ServiceRequestError, ServiceResponseError

    try:
        yield
    except HttpResponseError as error:
        line = str(error.message or error).splitlines()[0][:200]
        if error.status_code is None:  # cut off within the answer
            raise TransientError(line) from None
        check_status(location, error.status_code)
        raise UnreadableError(f"{location}: {line}") from None
    except (ServiceRequestError, ServiceResponseError) as error:
        raise TransientError(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from None
    except AzureError as error:
        raise UnreadableError(f"{location}: {str(error).splitlines()[0][:200]}") from None
