"""The model registry: signed, immutable versions and the aliases that say which of them serves."""

from tasks.registry.records import (
    ALIASES,
    AliasMove,
    AliasName,
    AliasState,
    FileCheck,
    Reservation,
    VerifyReport,
    VersionInfo,
)
from tasks.registry.s3 import Registry

__all__ = [
    "ALIASES",
    "AliasMove",
    "AliasName",
    "AliasState",
    "FileCheck",
    "Registry",
    "Reservation",
    "VerifyReport",
    "VersionInfo",
]
