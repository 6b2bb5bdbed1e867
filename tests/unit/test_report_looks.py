"""The report in a real browser, where one is installed: nothing is wider than the screen, and both schemes differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageStat

from configs.errors import ConfigError
from tasks.report.render import render_html
from tests.support import report_example as example
from tests.support import screenshot as camera

needs_browser = pytest.mark.skipif(camera.browser() is None, reason="no Chromium on PATH")


@needs_browser
def test_the_page_follows_the_colour_scheme(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_html(example.rolled_back()), encoding="utf-8")
    light = camera.screenshot(str(page), tmp_path / "light.png", height=700, colors=0)
    dark = camera.screenshot(str(page), tmp_path / "dark.png", height=700, colors=0, dark=True)
    assert _brightness(light) > 200
    assert _brightness(dark) < 80


@needs_browser
def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    """What is too wide would be painted over the page's right margin; 500 is the narrowest window Chromium opens."""
    page = tmp_path / "report.html"
    page.write_text(render_html(example.many_classes()), encoding="utf-8")
    shot = camera.screenshot(str(page), tmp_path / "phone.png", width=500, height=9000, colors=0)
    with Image.open(shot) as image:
        margin = image.convert("RGB").crop((image.width - 6, 0, image.width, image.height))
    assert len(margin.getcolors(maxcolors=100_000) or []) == 1


def test_a_missing_browser_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="No Chromium on PATH"):
        camera.screenshot("x.html", tmp_path / "x.png")


def _brightness(png: Path) -> float:
    with Image.open(png) as image:
        return float(ImageStat.Stat(image.convert("L")).mean[0])
