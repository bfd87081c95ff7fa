"""One request for a range of a file, over HTTP or from S3, with the same errors for both.

A client belongs to the process that made it: a forked loader worker makes its own, since connections cannot be shared.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import requests

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds
CHUNK = 1 << 16
RANGE_NOT_SATISFIABLE = 416
RETRY_STATUSES = (408, 425, 429)  # beside those from 500 on
# How often boto3 tries what is not a read; reads are retried by data.storage.locations.
S3_TRIES = 8
NO_KEYS = "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class TransientError(OSError):
    """A failure that another try may not meet: a stall, a cut connection, an error of the server's own."""


class UnreadableError(OSError):
    """A file cannot be read, or not to its end, and another try will not help."""


class RangeResponse(NamedTuple):
    """The bytes of a range in chunks, the size of the whole file in bytes, and a mark that changes with the file."""

    chunks: Iterator[bytes]
    size: int
    version: str


@contextmanager
def http_range(
    location: str, start: int, end: int, url: str = "", session: requests.Session | None = None
) -> Iterator[RangeResponse]:
    """The bytes [start, end) of a file, or as many of them as it has.

    url: where it lies, if that is not `location`.  session: one that may read it.

    Raises: TransientError, UnreadableError, FileNotFoundError, PermissionError.
    """
    # A compressed response would not hold the bytes of the range.
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    try:
        session = session or _session(os.getpid())
        with session.get(url or location, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == RANGE_NOT_SATISFIABLE and start == 0:
                yield RangeResponse(iter(()), 0, "")
                return
            check_status(location, response.status_code)
            size = response.headers.get("Content-Length", "")
            if response.status_code == 206:
                span, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
                if span.partition("-")[0] != str(start):
                    raise UnreadableError(f"{location}: asked for byte {start}, the server sent '{span}'")
            elif start:
                raise UnreadableError(f"{location}: the server sends whole files only; it must know HTTP's Range")
            if not size.isdigit():
                raise UnreadableError(f"{location}: the server does not say how large the file is")
            version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
            yield RangeResponse(response.iter_content(CHUNK), int(size), version)
    except requests.RequestException as error:
        raise TransientError(_one_line(error)) from None


@contextmanager
def s3_range(location: str, start: int, end: int) -> Iterator[RangeResponse]:
    """The bytes [start, end) of s3://BUCKET/KEY, or as many of them as the object has.

    Raises: as http_range.
    """
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    bucket, key = split_s3(location)
    try:
        response = s3_client(os.getpid()).get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
        with closing(response["Body"]) as body:
            size = response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"]
            yield RangeResponse(body.iter_chunks(CHUNK), int(size), response["ETag"])
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status != RANGE_NOT_SATISFIABLE or start:
            check_status(location, status)
            raise UnreadableError(f"{location}: {error}") from None
        yield RangeResponse(iter(()), 0, "")
    except (HTTPClientError, IncompleteReadError, HTTPError) as error:
        raise TransientError(_one_line(error)) from None
    except BotoCoreError as error:
        raise UnreadableError(f"{location}: {s3_reason(error)}") from None


def list_s3(folder: str) -> list[str]:
    """The names in s3://BUCKET/FOLDER, however many.

    Raises: UnreadableError.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(folder.rstrip("/") + "/")
    paginator = s3_client(os.getpid(), S3_TRIES).get_paginator("list_objects_v2")
    try:
        pages = paginator.paginate(Bucket=bucket, Prefix=key, Delimiter="/")
        return [entry["Key"][len(key) :] for page in pages for entry in page.get("Contents", ())]
    except (BotoCoreError, ClientError) as error:
        raise UnreadableError(f"{folder}: {s3_reason(error)}") from None


def write_s3(location: str, data: bytes) -> None:
    """Store an object, whole or not at all.

    Raises: OSError.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(location)
    try:
        s3_client(os.getpid(), S3_TRIES).put_object(Bucket=bucket, Key=key, Body=data)
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"{location}: {s3_reason(error)}") from None


def s3_reason(error: Exception) -> str:
    """What an error of boto3 says, in one line; where it has no keys, with the remedy."""
    from botocore.exceptions import NoCredentialsError

    line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{line}: {NO_KEYS}" if isinstance(error, NoCredentialsError) else line


def split_s3(location: str) -> tuple[str, str]:
    """Bucket and key of s3://BUCKET/KEY."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, key


@lru_cache(maxsize=1)
def _session(process: int) -> requests.Session:
    return requests.Session()


@lru_cache(maxsize=2)
def s3_client(process: int, tries: int = 1) -> Any:
    """boto3's client of a process. Keys, region and AWS_ENDPOINT_URL come from where boto3 looks for them."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": tries, "mode": "standard"}
    config = Config(connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT, retries=retries)
    return boto3.client("s3", config=config)


def check_status(location: str, status: int) -> None:
    """Raises: OSError that fits the status of an answer, unless it is one of success."""
    if status in (404, 410):
        raise FileNotFoundError(f"{location} is not there (status {status})")
    if status in (401, 403):
        raise PermissionError(f"{location} may not be read (status {status})")
    if status >= 500 or status in RETRY_STATUSES:
        raise TransientError(f"status {status}")
    if status >= 300:
        raise UnreadableError(f"{location}: status {status}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
