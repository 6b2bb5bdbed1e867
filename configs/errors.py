"""The error hierarchy of the whole project.

It lives beside the settings because `configs` and `ml` raise these too and may not import `tasks`.
A message says what happened, what was left unchanged, and what to do next.
"""

from __future__ import annotations


class KhetError(Exception):
    """Root of every error this project raises on purpose. `exit_code` is what `khet` exits with."""

    exit_code = 1


class ConfigError(KhetError):
    """A setting, file or argument is wrong; nothing was started."""

    exit_code = 2


class GateError(KhetError):
    """A check said no: the candidate is not good enough, or a precondition does not hold."""

    exit_code = 3


class IntegrityError(KhetError):
    """A checksum, signature, count or format does not match what was promised."""

    exit_code = 4


class ExternalError(KhetError):
    """A system did not answer as it should. `retryable` says whether asking again may help."""

    exit_code = 5

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_external, (str(self), self.retryable))


class SafetyError(KhetError):
    """A guard stopped the step before it could do harm (a lease is held, a share would be exceeded)."""

    exit_code = 6


def _rebuild_external(message: str, retryable: bool) -> ExternalError:
    return ExternalError(message, retryable=retryable)


def is_retryable(error: BaseException) -> bool:
    """Whether repeating the same call may succeed."""
    return isinstance(error, ExternalError) and error.retryable
