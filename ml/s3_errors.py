"""What an S3 client's exception means: try again, a wrong setting, a missing bucket or object, or a refusal."""

from __future__ import annotations

import enum
from typing import Any


class Kind(enum.StrEnum):
    """How to answer a failed call."""

    retry = "retry"
    key_missing = "key missing"
    bucket_missing = "bucket missing"
    exists = "exists"
    config = "config"
    refused = "refused"


# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; the numbers are what HEAD answers give.
_CODES = {
    "NoSuchKey": Kind.key_missing,
    "NoSuchUpload": Kind.key_missing,
    "NotFound": Kind.key_missing,
    "404": Kind.key_missing,
    "NoSuchBucket": Kind.bucket_missing,
    "PreconditionFailed": Kind.exists,
    "412": Kind.exists,
    "ConditionalRequestConflict": Kind.retry,
    "OperationAborted": Kind.retry,
    "RequestTimeout": Kind.retry,
    "SlowDown": Kind.retry,
    "BadDigest": Kind.retry,
    "InvalidAccessKeyId": Kind.config,
    "SignatureDoesNotMatch": Kind.config,
    "AuthorizationHeaderMalformed": Kind.config,
    "RequestTimeTooSkewed": Kind.config,
    "ExpiredToken": Kind.config,
    "InvalidBucketName": Kind.config,
    "AccessDenied": Kind.config,
    "403": Kind.config,
}
_HINTS = {
    "InvalidAccessKeyId": "the service does not know object_store.access_key_id",
    "SignatureDoesNotMatch": "object_store.secret_access_key does not belong to object_store.access_key_id",
    "AuthorizationHeaderMalformed": "object_store.region is not the region of this service",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "ExpiredToken": "the session credentials have expired",
    "AccessDenied": "these credentials may not do this",
    "403": "the credentials are wrong or may not do this",
}


def client_errors() -> tuple[type[Exception], ...]:
    """Everything that a boto3 call or the reading of its body may raise."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    # ValueError: botocore refuses a malformed endpoint with it.
    return (BotoCoreError, ClientError, HTTPClientError, ResponseParserError, HTTPError, ValueError)


def classify(error: Exception) -> Kind:
    """Say how to answer `error`, one of `client_errors()`."""
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    if isinstance(error, boto.ClientError):
        return _classify_answer(error.response)
    if isinstance(error, boto.SSLError):
        return Kind.config
    broken = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.ChecksumError, HTTPError)
    if isinstance(error, broken):
        return Kind.retry
    if isinstance(error, (boto.BotoCoreError, ValueError)):
        return Kind.config
    return Kind.refused


def _classify_answer(response: dict[str, Any]) -> Kind:
    code = str(response.get("Error", {}).get("Code", ""))
    if code in _CODES:
        return _CODES[code]
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return Kind.retry if status >= 500 or status == 429 else Kind.refused


def reason(error: Exception) -> str:
    """One line for people. Never holds a secret: neither exceptions of the client nor answers carry one."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        answer = error.response.get("Error", {})
        code = str(answer.get("Code", "?"))
        return _HINTS.get(code) or f"{code}: {answer.get('Message') or 'no explanation'}"
    if isinstance(error, boto.EndpointConnectionError):
        return "connection refused, or no such host"
    if isinstance(error, (boto.ReadTimeoutError, boto.ConnectTimeoutError)):
        return "no answer in time"
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return "no credentials: object_store.access_key_id and secret_access_key are not set"
    return f"{type(error).__name__}: {error}"
