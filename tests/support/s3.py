"""What tests of the object store share: names that no other test uses, and settings with little patience."""

from __future__ import annotations

import uuid

from configs.areas import ObjectStoreSettings
from ml.objects import ObjectStore


def as_environment(settings: ObjectStoreSettings, **overrides: object) -> dict[str, str]:
    """The variables by which another process reaches the same store."""
    assert settings.secret_access_key is not None
    values: dict[str, object] = {
        "endpoint_url": settings.endpoint_url,
        "access_key_id": settings.access_key_id,
        "secret_access_key": settings.secret_access_key.get_secret_value(),
        **overrides,
    }
    return {f"KHET_OBJECT_STORE__{name.upper()}": str(value) for name, value in values.items()}


def unique(stem: str) -> str:
    """A key prefix or bucket name of the test's own."""
    return f"{stem}-{uuid.uuid4().hex[:12]}"


def impatient(settings: ObjectStoreSettings, **overrides: object) -> ObjectStore:
    """A client that gives up quickly."""
    quick = {"patience_s": 0.5, "max_attempts": 1, "connect_timeout_s": 0.5, "read_timeout_s": 1.0}
    return ObjectStore(settings.model_copy(update=quick | overrides))
