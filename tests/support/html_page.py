"""Read an HTML page the way a strict reader would: what it loads, whether its tags close, what its links point to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Self

_VOID = {"meta", "img", "br", "wbr", "link", "input", "hr", "base", "source"}
# Elements and attributes through which a browser fetches something by itself.
_LOADING = {
    ("img", "src"), ("img", "srcset"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("iframe", "srcdoc"),
    ("object", "data"), ("embed", "src"), ("video", "src"), ("audio", "src"), ("source", "src"), ("source", "srcset"),
    ("image", "href"), ("image", "xlink:href"), ("use", "href"), ("use", "xlink:href"), ("base", "href"),
    ("form", "action"), ("video", "poster"), ("body", "background"), ("a", "ping"),
}  # fmt: skip
_CSS_LOAD = re.compile(r"url\(\s*['\"]?([^'\")]*)|@import\s+([^;]+)", re.IGNORECASE)


@dataclass
class Page(HTMLParser):
    """A parsed page. `loads` are addresses it would fetch, `problems` what is wrong with its structure."""

    tags: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    handlers: list[str] = field(default_factory=list)
    images_without_alt: int = 0
    charts_without_label: int = 0
    text: str = ""
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    @classmethod
    def read(cls, html: str) -> Self:
        """Parse a whole page."""
        page = cls()
        page.feed(html)
        page.close()
        page.problems += [f"<{tag}> is never closed" for tag in page._open]
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self._note_loads(tag, given)
        self.handlers += [name for name in given if name.startswith("on")]
        if tag == "a":
            self.links.append(given.get("href", ""))
        if "id" in given:
            if given["id"] in self.ids:
                self.problems.append(f"id {given['id']} stands twice")
            self.ids.add(given["id"])
        self.images_without_alt += tag == "img" and not given.get("alt")
        self.charts_without_label += given.get("role") == "img" and not given.get("aria-label")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:] or 'nothing'}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self._note_css(data)
        else:
            self.text += data

    def _note_loads(self, tag: str, given: dict[str, str]) -> None:
        self.loads += [given[name] for of, name in _LOADING if of == tag and name in given]
        self._note_css(given.get("style", ""))
        if tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            self.loads.append(given.get("content", ""))

    def _note_css(self, css: str) -> None:
        self.loads += [a or b for a, b in _CSS_LOAD.findall(css)]

    @property
    def external(self) -> list[str]:
        """What the page would fetch from somewhere else."""
        return [address for address in self.loads if not address.startswith("data:")]
