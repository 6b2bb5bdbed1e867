"""Passwords, tokens and the signing key pair: generated once per home folder, readable by its owner only."""

from __future__ import annotations

import base64
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from configs.errors import IntegrityError
from deployments.local.files import PRIVATE_FILE, private_folder, read_json, write_json, write_private


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """Every secret of one local stack. It has no repr: secrets do not end up in logs."""

    s3_access_key: str
    s3_secret_key: str
    weed_write_key: str
    weed_read_key: str
    filer_write_key: str
    filer_read_key: str
    postgres_password: str
    khetguard_password: str
    prefect_database_password: str
    prefect_encryption_key: str
    prefect_password: str
    node_token: str


def load_or_create(path: Path) -> Credentials:
    """The credentials in `path`; those that are missing are generated and stored.

    Raises:
        IntegrityError: the file is there but is not whole; its secrets belong to existing data and are not replaced.
    """
    stored = read_json(path)
    if stored is None and path.exists():
        raise IntegrityError(
            f"{path} is not readable JSON. It holds the passwords of the data in {path.parent}; nothing was changed. "
            "Next: restore the file, or move the whole folder away and start anew."
        )
    known = {f.name: str(stored[f.name]) for f in fields(Credentials) if stored and stored.get(f.name)}
    result = Credentials(**{f.name: known.get(f.name) or _generate(f.name) for f in fields(Credentials)})
    if stored != asdict(result):
        write_json(path, asdict(result))
    path.chmod(PRIVATE_FILE)
    return result


def signing_keys(folder: Path) -> tuple[Path, Path]:
    """The Ed25519 key pair (private PKCS#8, public SubjectPublicKeyInfo, both PEM), generated once."""
    private, public = folder / "signing-key.pem", folder / "signing-key.pub.pem"
    if not private.exists() or not public.exists():
        _generate_pair(private_folder(folder), private, public)
    private.chmod(PRIVATE_FILE)
    return private, public


def _generate_pair(folder: Path, private: Path, public: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if private.exists():
        key = s.load_pem_private_key(private.read_bytes(), password=None)
    else:
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        write_private(private, pem.decode("ascii"))
    spki = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    write_private(folder / public.name, spki.decode("ascii"))


def _generate(name: str) -> str:
    if name == "s3_access_key":
        return "KHET" + secrets.token_hex(8).upper()
    if name == "prefect_encryption_key":  # a Fernet key
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode("ascii")
    return secrets.token_urlsafe(30)
