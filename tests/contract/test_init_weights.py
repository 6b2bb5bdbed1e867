"""Start weights from a real object store (SeaweedFS), pinned by their SHA-256."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import IntegrityError
from configs.settings import load_settings
from ml import checkpoint
from ml.net import build
from ml.objects import ObjectMissing, ObjectStore
from tests.support.s3 import unique
from tests.support.stack import object_store


def test_start_weights_come_from_the_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = build("convnet", 3), build("convnet", 3)
    torch.save({"weights": old.state_dict()}, tmp_path / "w.pt")
    pin, key = checkpoint.sha256(tmp_path / "w.pt"), unique("weights")
    with object_store(tmp_path / "s3") as store:
        settings = load_settings().model_copy(update={"object_store": store})
        monkeypatch.setattr(checkpoint, "settings", lambda: settings)
        ObjectStore(store).put_file(store.models_bucket, key, tmp_path / "w.pt")
        checkpoint.initialise(new, f"s3://{store.models_bucket}/{key}", pin)
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
        with pytest.raises(IntegrityError, match="expected 000000000000"):
            checkpoint.initialise(new, f"s3://{store.models_bucket}/{key}", "0" * 64)
        with pytest.raises(ObjectMissing):
            checkpoint.initialise(new, f"s3://{store.models_bucket}/{key}-gone", pin)
