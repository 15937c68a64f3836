"""What a built site links to: broken links are named, links to elsewhere are only collected."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Tags whose file the browser fetches by itself, and the attribute that says which."""

NOT_FETCHED = {"canonical", "next", "prev", "author", "index", "search", "license"}


@dataclass
class Page(HTMLParser):
    """The ids of an HTML page and what it links to, as (tag, address)."""

    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element's id and link."""
        attributes = {name: value or "" for name, value in attrs}
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}
        address = attributes.get(LOADED.get(tag, "href" if tag == "a" else ""))
        if address is None or attributes.get("rel", "") in NOT_FETCHED:
            return
        self.links.append((tag, address))


def read(site: Path) -> dict[Path, Page]:
    """The pages of the site in the folder `site`, by their path."""
    pages = {}
    for path in sorted(site.resolve().rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def checked(site: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The faults of a built site, a sentence each, and the pages by the outer address they link to.

    A fault is a link to a page, a file or an anchor that is not there, and a script, style or
    picture from elsewhere: the site must work without a network.
    """
    pages, faults, outer = read(site), [], defaultdict(list)
    site = site.resolve()
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for tag, address in page.links:
            parts = urlsplit(address)
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            if parts.scheme or parts.netloc:
                if name not in outer[address]:
                    outer[address].append(name)
                if tag in LOADED:
                    faults.append(f"{name}: <{tag}> fetches {address}, which is elsewhere")
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            anchors = pages[target].ids if target in pages else None
            if not target.is_file():
                faults.append(f"{name}: a link to {address}, which is not there")
            elif parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors:
                faults.append(f"{name}: a link to {address}, a page without this anchor")
    return faults, dict(outer)
