"""What a published model says about itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ml.bundle import METADATA
from ml.results import ModelMetadata
from ml.version import Version
from tasks.registry.s3 import Registry


def model_metadata(registry: Registry, version: Version) -> ModelMetadata:
    """Read and verify `metadata.json` of a version.

    Raises:
        VersionMissing: the version is not published.
        IntegrityError: it does not verify, or holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="khet-metadata-") as folder:
        bundle = registry.fetch(version, Path(folder), only=(METADATA,))
        return ModelMetadata.read(bundle.path(METADATA))
