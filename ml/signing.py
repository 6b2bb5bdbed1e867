"""Ed25519 signatures (RFC 8032) over manifests: who published a version, and that nobody changed it since.

A signature is the raw 64 bytes, so that OpenSSL alone can check it:
`openssl pkeyutl -verify -pubin -inkey signing.pub -rawin -in manifest.json -sigfile manifest.json.sig`
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_FINGERPRINT_CHARS = 16


def generate_keypair(private: Path, public: Path) -> str:
    """Write a new key pair as PEM, the private key with mode 0600, and return its fingerprint.

    Raises:
        ConfigError: one of the files exists (a key is never overwritten), or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    for path in (private, public):
        if path.exists():
            raise ConfigError(f"{path} exists already; a key is never overwritten. Nothing was changed.")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    _write_new(private, secret, 0o600)
    _write_new(
        public, key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo), mode=0o644
    )
    return _fingerprint(key.public_key())


class Signer:
    """Signs with one private key. The key is read once and never shown."""

    def __init__(self, private: Path) -> None:
        """Raises ConfigError: the file is missing, unreadable, or holds no Ed25519 private key."""
        self._path = private
        self._key = _load_private(private)

    def __repr__(self) -> str:
        return f"Signer({self._path}, key {self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the public key."""
        return _fingerprint(self._key.public_key())

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of `data`."""
        return self._key.sign(data)


def verify(data: bytes, signature: bytes, trusted: Sequence[Path]) -> str:
    """Return the fingerprint of the trusted key that signed `data`.

    Raises:
        ConfigError: no key is trusted, or one of the files holds no public key.
        IntegrityError: none of the trusted keys made this signature.
    """
    from cryptography.exceptions import InvalidSignature

    if not trusted:
        raise ConfigError(
            "registry.trusted_keys is empty, so no signature can be accepted. Nothing was loaded.\n"
            "Next: list the public keys of those who may publish (`khet up` does it for the local stack)."
        )
    keys = [load_public(path) for path in trusted]
    for key in keys:
        try:
            key.verify(signature, data)
        except InvalidSignature:
            continue
        return _fingerprint(key)
    known = ", ".join(_fingerprint(key) for key in keys)
    raise IntegrityError(f"the signature was made by none of the trusted keys ({known}), or the content was changed")


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key (PEM). Raises ConfigError when the file holds none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is not a public key in PEM form. Nothing was loaded.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is a public key of another kind; Ed25519 is expected. Nothing was loaded.")
    return key


def fingerprint(public: Path) -> str:
    """The fingerprint of a public key file."""
    return _fingerprint(load_public(public))


def _load_private(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Not chained: the parser's words could quote the file.
        raise ConfigError(f"{path} is not an unencrypted private key in PEM form. Nothing was signed.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is a private key of another kind; Ed25519 is expected. Nothing was signed.")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The key {path} cannot be read: {error.strerror or error}. Nothing was signed or loaded.\n"
            "Next: correct registry.signing_key and registry.trusted_keys."
        ) from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)  # whatever the umask was
            file.write(data)
            file.flush()
            os.fsync(handle)
    except OSError as error:
        raise ConfigError(f"The key {path} cannot be written: {error.strerror or error}.") from error


def _fingerprint(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:_FINGERPRINT_CHARS]
