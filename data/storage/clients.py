"""One request for a part of a file, over HTTP or from S3, and what went wrong put in the same words for both.

A client belongs to the process that made it: a forked loader worker makes its own, for connections must not be shared.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import requests

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
CHUNK = 1 << 16
NOT_SATISFIABLE = 416
WORTH_ANOTHER_TRY = (408, 425, 429)


class Passing(OSError):
    """A failure that another try may not meet: a stall, a cut connection, a server's own error."""


class Unreadable(OSError):
    """A file can't be read, or not to its end, and trying again will not help."""


class Part(NamedTuple):
    """What a server sends of a file, the file's size in bytes, and a mark that changes with the file."""

    chunks: Iterator[bytes]
    size: int
    version: str


@contextmanager
def http_part(location: str, start: int, end: int) -> Iterator[Part]:
    """The bytes [start, end) of a URL, or as many as there are.

    Raises: Passing, Unreadable, FileNotFoundError, PermissionError.
    """
    # Compressed on the way, the bytes would not be those of the range.
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    try:
        with _session(os.getpid()).get(location, headers=headers, stream=True, timeout=timeout) as answer:
            if answer.status_code == NOT_SATISFIABLE and start == 0:
                yield Part(iter(()), 0, "")
                return
            _check_status(location, answer.status_code)
            size = answer.headers.get("Content-Length", "")
            if answer.status_code == 206:
                span, _, size = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
                if span.partition("-")[0] != str(start):
                    raise Unreadable(f"{location}: asked for byte {start}, the server sent '{span}'")
            elif start:
                raise Unreadable(f"{location}: the server sends whole files only; it must know HTTP's Range")
            if not size.isdigit():
                raise Unreadable(f"{location}: the server does not say how large the file is")
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
            yield Part(answer.iter_content(CHUNK), int(size), version)
    except requests.RequestException as error:
        raise Passing(_in_words(error)) from None


@contextmanager
def s3_part(location: str, start: int, end: int) -> Iterator[Part]:
    """The bytes [start, end) of s3://BUCKET/KEY, or as many as there are.

    Raises: as http_part.
    """
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    bucket, key = split_s3(location)
    try:
        answer = s3(os.getpid()).get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
        with closing(answer["Body"]) as body:
            size = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
            yield Part(body.iter_chunks(CHUNK), int(size), answer["ETag"])
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status != NOT_SATISFIABLE or start:
            _check_status(location, status)
            raise Unreadable(f"{location}: {error}") from None
        yield Part(iter(()), 0, "")
    except (HTTPClientError, IncompleteReadError, HTTPError) as error:
        raise Passing(_in_words(error)) from None
    except BotoCoreError as error:
        raise Unreadable(f"{location}: {error}") from None


def list_s3(folder: str) -> list[str]:
    """The names in s3://BUCKET/FOLDER, which may be very many.

    Raises: Unreadable.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(folder.rstrip("/") + "/")
    pages = s3(os.getpid(), tries=8).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key, Delimiter="/")
    try:
        return [entry["Key"][len(key) :] for page in pages for entry in page.get("Contents", ())]
    except (BotoCoreError, ClientError) as error:
        raise Unreadable(f"{folder}: {error}") from None


def write_s3(location: str, data: bytes) -> None:
    """Store an object, whole or not at all.

    Raises: Unreadable.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(location)
    try:
        s3(os.getpid(), tries=8).put_object(Bucket=bucket, Key=key, Body=data)
    except (BotoCoreError, ClientError) as error:
        raise Unreadable(f"{location}: {error}") from None


def split_s3(location: str) -> tuple[str, str]:
    """Bucket and key of s3://BUCKET/KEY."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, key


@lru_cache(maxsize=1)
def _session(process: int) -> requests.Session:
    return requests.Session()


@lru_cache(maxsize=2)
def s3(process: int, tries: int = 1) -> Any:
    """boto3's client of a process; keys, region and AWS_ENDPOINT_URL come from where boto3 looks for them."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": tries, "mode": "standard"}
    config = Config(connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT, retries=retries)
    return boto3.client("s3", config=config)


def _check_status(location: str, status: int) -> None:
    if status in (404, 410):
        raise FileNotFoundError(f"{location} is not there (status {status})")
    if status in (401, 403):
        raise PermissionError(f"{location} may not be read (status {status})")
    if status >= 500 or status in WORTH_ANOTHER_TRY:
        raise Passing(f"status {status}")
    if status >= 300:
        raise Unreadable(f"{location}: status {status}")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
