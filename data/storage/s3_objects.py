"""Objects of S3 that are written, looked at, removed, or written only if nobody else wrote them meanwhile."""

import logging
import os
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data.storage.clients import S3_TRIES, s3_client, s3_reason, split_s3

logger = logging.getLogger(__name__)

NOT_THERE, NOT_IMPLEMENTED = (404,), (501,)
# The answers to a conditional write whose condition does not hold. With an ETag also 404, since the object may be gone;
# without one that means that there is no such bucket.
REFUSED = (409, 412)
# Buckets in which this process has seen what a condition does.
_tried: set[str] = set()


class Facts(NamedTuple):
    """What S3 says of an object.  size: bytes.  etag: changes with the content.  age: seconds by the server's clock."""

    size: int
    etag: str
    age: float


def facts(location: str) -> Facts:
    """The facts of an object.

    Raises: FileNotFoundError if there is none; OSError.
    """
    found = _call(location, "head_object")
    now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Facts(found["ContentLength"], found["ETag"], (now - found["LastModified"]).total_seconds())


def upload(file: Path, location: str) -> None:
    """Store a file as an object, in parts where it is large. The object appears when all of them are there.

    Raises: OSError.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(location)
    try:
        s3_client(os.getpid(), S3_TRIES).upload_file(str(file), bucket, key)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise OSError(f"{location} could not be written: {s3_reason(error)}") from None


def put_if(location: str, data: bytes, etag: str = "") -> str:
    """Store an object if there is none, or if the one there has this ETag.

    A storage that knows no conditions is named in a warning, once. The first object that is new in a bucket is put
    twice, which tells those that ignore a condition.
    Returns: the new ETag, '' if the condition did not hold.
    Raises: OSError.
    """
    bucket = split_s3(location)[0]
    try:
        if etag:
            return _put(location, data, REFUSED + NOT_THERE, IfMatch=etag)
        new = _put(location, data, REFUSED, IfNoneMatch="*")
        if not new or bucket in _tried:
            return new
        _tried.add(bucket)
        if again := _put(location, data, REFUSED, IfNoneMatch="*"):
            _warn_of_no_conditions(bucket)
        return again or new
    except NotImplementedError:
        _warn_of_no_conditions(bucket)
        return _put(location, data, ())


def remove(location: str) -> None:
    """Remove an object; nothing happens if there is none.

    Raises: OSError.
    """
    _call(location, "delete_object", NOT_THERE)


def _put(location: str, data: bytes, refused: tuple[int, ...], **condition: str) -> str:
    return _call(location, "put_object", refused, Body=data, **condition).get("ETag", "")


@cache
def _warn_of_no_conditions(bucket: str) -> None:
    logger.warning("s3://%s: this storage has no conditional writes: let one process at a time write here", bucket)


def _call(location: str, name: str, ignored: tuple[int, ...] = (), **arguments: Any) -> dict[str, Any]:
    """A request about one object; {} for an answer with a status that is ignored.

    Raises: FileNotFoundError; NotImplementedError; OSError.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(location)
    try:
        return getattr(s3_client(os.getpid(), S3_TRIES), name)(Bucket=bucket, Key=key, **arguments)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status in ignored:
            return {}
        if status in NOT_IMPLEMENTED:
            raise NotImplementedError from None
        if status in NOT_THERE:
            raise FileNotFoundError(f"{location} is not there: {s3_reason(error)}") from None
        raise OSError(f"{location}: {s3_reason(error)}") from None
    except BotoCoreError as error:
        raise OSError(f"{location}: {s3_reason(error)}") from None
