"""Replicas of the e2e stack: the real service, with the faults that `KHET_TEST_FAULTS` lists for this version.

The variable names a JSON file, {"v1.1.0": {"latency_ms": 300, "error_share": 0.1}}; any other version is served
as it is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ml.serve import main
from tests.support.faulty_serve import Faults


def add_faults(app: Any) -> Any:
    """Wrap the app where the file asks for it."""
    listed = json.loads(Path(os.environ["KHET_TEST_FAULTS"]).read_text())
    wanted = listed.get(os.environ.get("MODEL_VERSION", ""))
    return Faults(app, wanted.get("latency_ms", 0) / 1000, wanted.get("error_share", 0.0)) if wanted else app


if __name__ == "__main__":
    sys.exit(main(wrap=add_faults))
