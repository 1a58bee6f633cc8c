"""What an error of a disk, an object store or the network means: try again, wait for room, ask the user, or a bug.

The one place that knows the error numbers of the operating system and the names that the clients of stores give their
errors. Whoever writes a disk or calls a store turns what it catches into pipelines.errors by what `judge` says.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from base.errors import UserError
from pipelines.errors import InfrastructureError, causes


class Fault(Enum):
    """What to do about an error."""

    TRANSIENT = auto()  # it may pass by itself: try again, then InfrastructureError
    FULL = auto()  # no use trying again at once, but nothing is wrong with the request: InfrastructureError
    USER = auto()  # rights, names, credentials, settings: UserError
    BUG = auto()  # the request itself makes no sense


def _numbers(names: str) -> frozenset[int]:
    """Error numbers by name; a name that this system does not have is left out."""
    return frozenset(number for name in names.split() if (number := getattr(errno, name, None)) is not None)


FULL_NUMBERS = _numbers("ENOSPC EDQUOT")
USER_NUMBERS = _numbers(
    "EACCES EPERM EROFS ENOTDIR EISDIR EEXIST ENOTEMPTY ENAMETOOLONG ELOOP EFBIG EILSEQ EXDEV EMLINK ENOSYS ENOTSUP "
    "EOPNOTSUPP EKEYEXPIRED EKEYREVOKED EKEYREJECTED ENOKEY"
)
_NETWORK_NUMBERS = _numbers(
    "EPIPE ECONNRESET ECONNREFUSED ECONNABORTED ENOTCONN ESHUTDOWN ETIMEDOUT ENETDOWN ENETUNREACH ENETRESET EHOSTDOWN "
    "EHOSTUNREACH ENONET ENOLINK ECOMM EREMCHG"
)
TRANSIENT_NUMBERS = _NETWORK_NUMBERS | _numbers(
    # the disk, or the server that a network file system stands on
    "EIO EBUSY ESTALE EAGAIN EWOULDBLOCK EINTR ERESTART ENOLCK EDEADLK EDEADLOCK ETXTBSY EREMOTEIO EUCLEAN ENODEV "
    "ENXIO ENOMEDIUM EMEDIUMTYPE ECANCELED EALREADY EINPROGRESS EOWNERDEAD ENOTRECOVERABLE EBADMSG EPROTO "
    "ENODATA ETIME "
    # the machine
    "ENOMEM ENFILE EMFILE ENOBUFS ENOSR EUSERS ETOOMANYREFS EADDRINUSE EADDRNOTAVAIL"
)
_FULL_CODES = {  # of S3 and the stores that speak it, Google, Azure
    "InsufficientCapacity",
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
    "XMinioStorageFull",
    "507",
}
_TRANSIENT_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "EC2ThrottledException",
    "IncompleteBody",
    "InternalError",
    "InternalServerError",
    "LimitExceededException",
    "OperationAborted",
    "OperationTimedOut",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "RestoreAlreadyInProgress",
    "ServerBusy",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "TemporaryRedirect",
    "Throttling",
    "ThrottledException",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "TransactionInProgressException",
    "XAmzContentSHA256Mismatch",
}
_BUG_CODES = {  # we asked for something that no store could do
    "EntityTooSmall",
    "InvalidDigest",
    "InvalidPart",
    "InvalidPartOrder",
    "InvalidRange",
    "MalformedXML",
    "MethodNotAllowed",
    "MissingContentLength",
    "MissingRequestBodyError",
    "NoSuchUpload",
    "PreconditionFailed",
    "UnexpectedContent",
    "412",
    "416",
}
_TRANSIENT_STATUSES = {408, 409, 425, 429}  # and 5xx
_USER_TYPES = {  # without an answer of the store; botocore, google.auth, azure.identity
    "ClientAuthenticationError",
    "ConfigNotFound",
    "ConfigParseError",
    "CredentialUnavailableError",
    "DefaultCredentialsError",
    "InvalidConfigError",
    "InvalidProxiesConfigError",
    "InvalidRegionError",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "UnknownEndpointError",
    "UnknownRegionError",
    "UnknownServiceError",
}
CREDENTIAL_TYPES = {
    "ClientAuthenticationError",
    "CredentialUnavailableError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_TRANSIENT_TYPES = {  # botocore, urllib3, http.client, aiohttp, requests, google, azure: bases of many more
    "ChecksumError",
    "ChecksumMismatchError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "CredentialRetrievalError",
    "EndpointConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "HTTPException",
    "IncompleteReadError",
    "MetadataRetrievalError",
    "ProtocolError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
    "WaiterError",
}


@dataclass(frozen=True)
class Judgement:
    """What an error means, and the code, number or class that says so."""

    fault: Fault
    code: str
    error: BaseException  # of those in the chain, the one that was judged


def judge(error: BaseException) -> Judgement:
    """Judge an error by what is most certain in it: the store's own code, then its HTTP status, then class and number.

    Clients of stores translate errors (s3fs makes EINVAL of many) and keep the original as the cause.
    """
    chain = list(causes(error))
    for cause in chain:
        code, status = _answer(cause)
        if code or status:
            return Judgement(_of_answer(code, status), code or f"HTTP status {status}", cause)
    for cause in reversed(chain):  # the innermost is the least translated
        fault = _of_type(cause)
        if fault is not None:
            return Judgement(fault, type(cause).__name__, cause)
    for cause in chain:
        if isinstance(cause, OSError):
            return Judgement(of_number(cause), errno.errorcode.get(cause.errno or 0, type(cause).__name__), cause)
    return Judgement(Fault.BUG, type(error).__name__, error)


def of_number(error: OSError) -> Fault:
    """What an operating system error means by its number, or by its class where it has none."""
    if isinstance(error, ConnectionError | TimeoutError):
        return Fault.TRANSIENT
    if error.errno in FULL_NUMBERS:
        return Fault.FULL
    if error.errno in TRANSIENT_NUMBERS:
        return Fault.TRANSIENT
    if error.errno in USER_NUMBERS or isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
        return Fault.USER
    return Fault.BUG


@contextmanager
def explained_disk(path: Path | str | None = None) -> Iterator[None]:
    """Turn errors of a disk into UserError or InfrastructureError that name the file (`path` where they name none).

    A missing file (FileNotFoundError) passes: what it means, the caller knows.
    """
    try:
        yield
    except (UserError, InfrastructureError):
        raise
    except OSError as error:
        explained = explain_disk(error, path)
        if explained is None:
            raise
        raise explained from error
    except Exception as error:
        if not _says_no_space(error):
            raise
        raise InfrastructureError(
            f"{path or 'a disk'}: no space is left ({error}). Make room, then the same command resumes: finished work "
            "is kept."
        ) from error


def explain_disk(error: OSError, path: Path | str | None = None) -> UserError | InfrastructureError | None:
    """The error of ours that says what a disk's error means; None for a bug.

    Args: path: what was written or read, for errors that do not name it; those of the network are not of any file.
    """
    fault = of_number(error)
    if isinstance(error, FileExistsError) or fault is Fault.BUG:
        return None
    if isinstance(error, ConnectionError | TimeoutError) or error.errno in _NETWORK_NUMBERS:
        path = None
    file, what = error.filename or path, error.strerror or str(error) or "no message"
    where = file if file else type(error).__name__
    if fault is Fault.USER:
        return UserError(f"{where}: {what}. Allow it, or choose another place, and run again: finished work is kept.")
    if fault is Fault.FULL:
        return InfrastructureError(f"{where}: {what}. Make room, then the same command resumes: finished work is kept.")
    if file:
        return InfrastructureError(
            f"{where}: {what}. Check that disk; the same command resumes: finished work is kept."
        )
    return InfrastructureError(f"{where}: {what}")


def _says_no_space(error: BaseException) -> bool:
    """Whether a library that hides the error's number (safetensors, torch, arrow) says that the disk is full."""
    text = str(error).lower()
    return any(words in text for words in ("no space left", "disk quota exceeded", "os error 28", "os error 122"))


def _answer(error: BaseException) -> tuple[str, int]:
    """The store's code and HTTP status in an error, "" and 0 where it carries none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        code = str(response.get("Error", {}).get("Code", ""))
        return code, _status(response.get("ResponseMetadata", {}).get("HTTPStatusCode")) or _status(code)
    if "HttpProcessingError" in {base.__name__ for base in type(error).__mro__}:  # aiohttp's own, of a garbled answer
        return "", 0
    for name in ("status_code", "status", "code"):  # azure, aiohttp, gcsfs
        status = _status(getattr(error, name, None))
        if status:
            return str(getattr(error, "error_code", "") or ""), status
    return "", 0


def _status(value: Any) -> int:
    text = str(value)
    return int(text) if text.isdigit() and 300 <= int(text) <= 599 else 0


def _of_answer(code: str, status: int) -> Fault:
    if code in _FULL_CODES or status == 507:
        return Fault.FULL
    if code in _TRANSIENT_CODES or (status >= 500 and status != 501) or status in _TRANSIENT_STATUSES:
        return Fault.TRANSIENT
    if code in _BUG_CODES:
        return Fault.BUG
    return Fault.USER  # the store understood and refuses: rights, names, region, what it cannot do


def _of_type(error: BaseException) -> Fault | None:
    if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Fault.USER
    if isinstance(error, ssl.SSLError):
        return Fault.TRANSIENT
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):  # botocore
        return Fault.USER
    names = {base.__name__ for base in type(error).__mro__}
    if names & _USER_TYPES:
        return Fault.USER
    if isinstance(error, TimeoutError) or names & _TRANSIENT_TYPES:
        return Fault.TRANSIENT
    return None
