"""A process that publishes, for tests that kill it: `python -m tests.support.publish_child JOB.json`.

It prints a line before every request to the store, so that the test can choose where to strike.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from configs.areas import ObjectStoreSettings
from ml.objects import ObjectStore
from ml.version import Version
from tasks.registry import Registry
from tests.support.records import a_lineage


def main(job_file: Path) -> None:
    """Reserve and publish as the job says."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    secret = SecretStr(job["store"].pop("secret_access_key"))
    store = ObjectStore(ObjectStoreSettings(**job["store"], secret_access_key=secret))
    store._s3.raw = _announcing(store._s3.raw())  # type: ignore[method-assign]
    registry = Registry(store, job["bucket"], signing_key=Path(job["key"]), trusted_keys=[Path(job["trusted"])])
    version: Version = registry.reserve(owner=job["owner"])
    registry.publish(
        version,
        Path(job["folder"]),
        lineage=a_lineage(release_id=job["owner"]),
        metrics={"accuracy": 0.94},
        created_by="asha@field-laptop",
    )
    print("published", flush=True)


def _announcing(client: Any) -> Callable[[], Any]:
    def before(params: dict[str, Any], model: Any, **_: Any) -> None:
        print(model.name, params.get("url_path", ""), flush=True)

    client.meta.events.register("before-call.s3", before)
    return lambda: client


if __name__ == "__main__":
    main(Path(sys.argv[1]))
