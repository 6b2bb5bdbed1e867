"""`python -m tasks.cluster.node`: run the local node with this process's settings."""

from __future__ import annotations

import logging
import sys

from configs.errors import KhetError
from configs.settings import settings
from tasks.cluster.node.server import run


def main() -> int:
    """Run until stopped. Returns the exit code of the error that ended it, 0 for an orderly end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        run(settings())
    except KhetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
