"""Where the local stack keeps its things, and how it writes them: private, and never half."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders below the home folder. Nothing of the stack is written anywhere else."""

    root: Path

    @property
    def run(self) -> Path:
        """Who runs: pids, the supervisor's lock, the published state."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """One log a part."""
        return self.root / "logs"

    @property
    def keys(self) -> Path:
        """The signing key pair."""
        return self.root / "keys"

    @property
    def prefect(self) -> Path:
        """PREFECT_HOME of the server, the worker and the flow runs."""
        return self.root / "prefect"

    @property
    def credentials(self) -> Path:
        """Generated once per home folder."""
        return self.root / "credentials.json"

    @property
    def settings(self) -> Path:
        """What `configs.settings` reads above the profile."""
        return self.root / "settings.yaml"

    @property
    def ports(self) -> Path:
        """The ports that were chosen."""
        return self.root / "ports.json"

    @property
    def state(self) -> Path:
        """The supervisor's published view of the stack."""
        return self.run / "state.json"

    @property
    def supervisor(self) -> Path:
        """Which process supervises."""
        return self.run / "supervisor.json"

    def data(self, part: str) -> Path:
        """Where one part keeps its data."""
        return self.root / "data" / part

    def log(self, part: str) -> Path:
        """The log of one part."""
        return self.logs / f"{part}.log"

    def temp(self, part: str) -> Path:
        """TMPDIR and HOME of one part, so that it writes nowhere else."""
        return self.root / "tmp" / part

    def pid(self, part: str) -> Path:
        """Which process is this part."""
        return self.run / f"{part}.json"

    def make(self) -> None:
        """Create the folders, readable by this user only.

        Raises:
            ConfigError: the home folder cannot be written.
        """
        try:
            for folder in (self.root, self.run, self.logs, self.keys, self.prefect, self.root / "data"):
                private_folder(folder)
        except OSError as error:
            raise ConfigError(
                f"{self.root}: cannot be written ({error.strerror}). Nothing was started. "
                "Next: make it writable, or set KHET_HOME to a folder that is."
            ) from error


def private_folder(folder: Path) -> Path:
    """Create `folder` with mode 0700, its parents included, and repair its mode."""
    folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o777 != PRIVATE_FOLDER:
        folder.chmod(PRIVATE_FOLDER)
    return folder


def write_private(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` in one step by a file of mode 0600: a reader sees the old text or the new, never a part.

    `durable` waits until it is on the disk; state that only describes running processes need not be.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_private` of `value` as JSON."""
    write_private(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file, or none that is whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
