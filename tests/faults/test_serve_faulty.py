"""The faulty service that other tests start does what it says, and only to the version it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.replica import photo, running
from tests.support.tiny_model import write_tiny_model

MODULE = "tests.support.faulty_serve"
FAULTS = {"FAULTY_VERSION": "v1.1.0", "FAULTY_LATENCY_MS": "150", "FAULTY_ERROR_SHARE": "0.5"}


@pytest.mark.parametrize(("version", "faulty"), [("v1.1.0", True), ("v1.0.0", False)])
def test_faults_hit_only_the_named_version(tmp_path: Path, version: str, faulty: bool) -> None:
    write_tiny_model(tmp_path / "model")
    environment = FAULTS | {"MODEL_VERSION": version}
    with running(tmp_path, ["--model", str(tmp_path / "model")], environment, module=MODULE) as replica:
        answers = [replica.predict(photo(index)) for index in range(20)]
        failed = sum(answer.status_code == 500 for answer in answers)
        assert (3 <= failed <= 17) if faulty else failed == 0
        if faulty:
            assert min(answer.elapsed.total_seconds() for answer in answers) >= 0.14
        assert replica.get("/readyz").status_code == 200, "probes are not hit"
        assert replica.terminate() == 0
