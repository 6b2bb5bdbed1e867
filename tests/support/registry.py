"""A registry in a bucket of its own, with a key and a folder to publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ml.bundle import Manifest
from ml.objects import ObjectStore, Progress
from ml.signing import generate_keypair
from ml.version import Version
from tasks.registry import Registry
from tests.support.records import a_lineage


@dataclass(frozen=True)
class Shelf:
    """The registry under test, and ways around it."""

    registry: Registry
    store: ObjectStore
    bucket: str
    folder: Path
    trusted: Sequence[Path]
    fingerprint: str

    @classmethod
    def make(cls, store: ObjectStore, bucket: str, tmp: Path) -> Shelf:
        """A new bucket, a new key pair, a new folder."""
        store.ensure_bucket(bucket)
        private, public = tmp / "signing.key", tmp / "signing.pub"
        fingerprint = generate_keypair(private, public)
        registry = Registry(store, bucket, signing_key=private, trusted_keys=[public])
        return cls(registry, store, bucket, model_folder(tmp / "folder"), [public], fingerprint)

    def publish(self, owner: str, version: Version | None = None, on_progress: Progress | None = None) -> Manifest:
        """Publish the folder for a release, under its next version unless one is named."""
        return self.registry.publish(
            version or self.registry.reserve(owner=owner),
            self.folder,
            lineage=a_lineage(release_id=owner),
            metrics={"accuracy": 0.94},
            created_by="asha@field-laptop",
            on_progress=on_progress,
        )

    def tamper(self, key: str, content: bytes | None) -> None:
        """Do what a person with write access to the bucket could; None deletes."""
        if content is None:
            self.store.delete(self.bucket, [key])
        else:
            self.store.put(self.bucket, key, content)


def model_folder(folder: Path) -> Path:
    """The files of a version in miniature, hidden ones among them."""
    (folder / "mistakes").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "model.onnx").write_bytes(b"w" * 64)
    (folder / "metadata.json").write_text("{}", encoding="utf-8")
    (folder / "model_card.md").write_text("# card\n", encoding="utf-8")
    (folder / "mistakes" / "00.png").write_bytes(b"\x89PNG")
    (folder / ".cache" / "x").write_bytes(b"not published")
    (folder / "manifest.json").write_text("left by a fetch", encoding="utf-8")
    return folder
