"""Ed25519 keys and signatures."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from configs.errors import ConfigError, IntegrityError
from ml.signing import Signer, fingerprint, generate_keypair, verify


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    private, public = tmp_path / "keys" / "signing.key", tmp_path / "keys" / "signing.pub"
    generate_keypair(private, public)
    return private, public


def test_a_signature_verifies_with_the_key_that_made_it(pair: tuple[Path, Path]) -> None:
    private, public = pair
    signature = Signer(private).sign(b"manifest")
    assert len(signature) == 64
    assert verify(b"manifest", signature, [public]) == fingerprint(public) == Signer(private).fingerprint
    assert Signer(private).sign(b"manifest") == signature, "the same bytes always sign the same"


@pytest.mark.parametrize("change", ["content", "signature", "cut", "empty"])
def test_any_change_is_noticed(pair: tuple[Path, Path], change: str) -> None:
    private, public = pair
    signature = Signer(private).sign(b"manifest")
    forged = {"content": signature, "signature": bytes(64), "cut": signature[:63], "empty": b""}[change]
    with pytest.raises(IntegrityError, match="none of the trusted keys"):
        verify(b"manifesto" if change == "content" else b"manifest", forged, [public])


def test_one_of_several_trusted_keys_is_enough(pair: tuple[Path, Path], tmp_path: Path) -> None:
    generate_keypair(tmp_path / "b.key", tmp_path / "b.pub")
    signature = Signer(pair[0]).sign(b"x")
    assert verify(b"x", signature, [tmp_path / "b.pub", pair[1]]) == fingerprint(pair[1])
    with pytest.raises(IntegrityError):
        verify(b"x", signature, [tmp_path / "b.pub"])
    with pytest.raises(ConfigError, match="trusted_keys is empty"):
        verify(b"x", signature, [])


def test_the_private_key_is_private_and_never_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = pair
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    for attempt in ((private, tmp_path / "new.pub"), (tmp_path / "new.key", public)):
        with pytest.raises(ConfigError, match="never overwritten"):
            generate_keypair(*attempt)
    assert private.read_bytes() == before
    assert not (tmp_path / "new.key").exists()


def test_a_loose_umask_does_not_open_the_key(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        generate_keypair(tmp_path / "a.key", tmp_path / "a.pub")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600


def test_a_file_that_is_no_key_is_named_and_not_quoted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match=r"junk\.pem is not an unencrypted private key") as caught:
        Signer(junk)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(ConfigError, match=r"junk\.pem is not a public key"):
        verify(b"", b"", [junk])
    with pytest.raises(ConfigError, match=r"gone\.key cannot be read"):
        Signer(tmp_path / "gone.key")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        Signer(tmp_path)
    with pytest.raises(ConfigError, match="is not an unencrypted private key"):
        Signer(pair[1])
    with pytest.raises(ConfigError, match="is not a public key"):
        verify(b"", b"", [pair[0]])


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    key = generate_private_key(SECP256R1())
    private, public = tmp_path / "ec.key", tmp_path / "ec.pub"
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="Ed25519 is expected"):
        Signer(private)
    with pytest.raises(ConfigError, match="Ed25519 is expected"):
        verify(b"", b"", [public])


def test_the_signer_shows_its_fingerprint_only(pair: tuple[Path, Path]) -> None:
    assert repr(Signer(pair[0])) == f"Signer({pair[0]}, key {fingerprint(pair[1])})"
