"""Pictures for the README: a page as a headless Chromium shows it, small enough to keep in the repository.

python -m tests.support.screenshot .khet/reports/r-....html docs/report.png --height 1500
python -m tests.support.screenshot http://127.0.0.1:4200/artifacts docs/prefect.png --dark --wait-ms 15000
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from configs.errors import ConfigError, ExternalError, KhetError

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
_TIMEOUT_S = 90


def browser() -> str | None:
    """The Chromium on PATH, if there is one."""
    return next((found for name in _BROWSERS if (found := shutil.which(name))), None)


def screenshot(
    page: str,
    png: Path,
    *,
    width: int = 1200,
    height: int = 1500,
    dark: bool = False,
    wait_ms: int = 0,
    colors: int = 128,
) -> Path:
    """Write `page` (an address or a file), `width` x `height` CSS pixels, to `png`.

    `wait_ms`: virtual time a page with scripts gets before the picture; 0 where it has none. `colors`: size of the
    palette, because a page of text needs no more; 0 keeps all.

    Raises:
        ConfigError: no Chromium on PATH.
        ExternalError: it drew nothing.
    """
    program = browser()
    if program is None:
        raise ConfigError("No Chromium on PATH (Debian: apt-get install chromium). No picture was written.")
    with tempfile.TemporaryDirectory(prefix="khet-shot-") as folder:
        raw = Path(folder) / "raw.png"
        flags = [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={raw}"]
        flags += [f"--virtual-time-budget={wait_ms}"] if wait_ms else []
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        _run([program, *_FLAGS, *flags, _address(page)])
        if not raw.exists():
            raise ExternalError(f"{program} drew nothing of {page}. No picture was written.")
        return _store(raw, png, colors)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ExternalError(f"{command[0]} failed: {error}. No picture was written.") from error


def _address(page: str) -> str:
    return page if "://" in page else Path(page).resolve(strict=True).as_uri()


def _store(raw: Path, png: Path, colors: int) -> Path:
    with Image.open(raw) as image:
        flat = image.convert("RGB")
    small = flat.quantize(colors, dither=Image.Dither.NONE) if colors else flat
    png.parent.mkdir(parents=True, exist_ok=True)
    small.save(png, "PNG", optimize=True)
    return png


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", help="an address or an HTML file")
    parser.add_argument("png", type=Path, help="where the picture goes")
    parser.add_argument("--width", type=int, default=1200, help="CSS pixels; 420 is a phone")
    parser.add_argument("--height", type=int, default=1500, help="CSS pixels")
    parser.add_argument("--dark", action="store_true", help="the dark scheme")
    parser.add_argument("--wait-ms", type=int, default=0, help="virtual time for a page with scripts")
    parser.add_argument("--colors", type=int, default=128, help="size of the palette; 0 keeps all colours")
    given = vars(parser.parse_args(arguments))
    try:
        print(screenshot(**given))
    except KhetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
