"""Look at every page of the built site in a browser: `make site-look`, after `make site`.

Each page is opened wide, narrow (360 px) and dark. Named are: what axe finds serious or critical, a
page that is wider than its window, a formula that MathJax cannot read, a message in the console,
and anything that is fetched from elsewhere. Screenshots of all go to `outputs/site-look/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from staging import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from install_browser import OPTIONS, browser_path

WINDOWS = {
    "wide": ({"width": 1400, "height": 900}, "light"),
    "narrow": ({"width": 360, "height": 800}, "light"),
    "dark": ({"width": 1400, "height": 900}, "dark"),
}
ADDRESS = "http://localhost/"  # answered from the folder: of a file, axe may not read the styles
TYPESET = "addEventListener('load', () => window.MathJax?.startup.promise.then(() => typeset = 1))"
SETTLED = "document.readyState === 'complete' && (!window.MathJax || window.typeset)"
SECONDS = 300  # for a page to settle, on a busy machine
SERIOUS = ("serious", "critical")


def answer(route: Any, site: Path) -> None:
    """A file of the site for a request to ADDRESS; anything else gets nothing."""
    path = site / unquote(urlsplit(route.request.url).path).lstrip("/")
    if route.request.url.startswith(ADDRESS) and path.is_file():
        route.fulfill(path=path)
    else:
        route.abort()


def faults_of(page: Any, name: str) -> list[str]:
    """What is wrong with the page `name` of the site, opened in the browser's `page`."""
    found: list[str] = []
    page.on("console", lambda m: m.type in ("error", "warning") and found.append(f"says {m.text}"))
    page.on("pageerror", lambda error: found.append(f"fails: {error}"))
    page.on(
        "request",
        lambda request: (
            request.url.startswith((ADDRESS, "data:", "blob:"))
            or found.append(f"fetches {request.url}")
        ),
    )
    page.add_init_script(TYPESET)
    page.goto(ADDRESS + name)
    page.wait_for_function(SETTLED)
    wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    if wider > 0:
        found.append(f"is {wider} px wider than its window")
    if errors := page.locator("mjx-merror").count():
        found.append(f"has {errors} formulas that MathJax cannot read")
    faults = found.copy()  # what axe itself fetches and says is no fault of the page
    for violation in Axe().run(page).response["violations"]:
        if violation["impact"] in SERIOUS:
            nodes = violation["nodes"]
            first = nodes[0]["html"][:120].replace("\n", " ")
            faults.append(f"axe, {violation['impact']}: {violation['id']}, {len(nodes)} × {first}")
    return faults


def look(site: Path, shots: Path, pattern: str = "*.html") -> Iterator[str]:
    """The faults of the pages of `site`, as they are found; screenshots go to `shots`."""
    shots.mkdir(parents=True, exist_ok=True)
    pages = [path for path in sorted(site.rglob(pattern)) if "_static" not in path.parts]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=OPTIONS)
        for window, (viewport, scheme) in WINDOWS.items():
            context = browser.new_context(viewport=viewport, color_scheme=scheme)
            context.set_default_timeout(SECONDS * 1000)
            context.route("**/*", lambda route: answer(route, site))
            for path in pages:
                page, name = context.new_page(), path.relative_to(site).as_posix()
                yield from (f"{name}, {window}: {fault}" for fault in faults_of(page, name))
                page.screenshot(path=shots / f"{name.replace('/', '-')}-{window}.png")
                page.close()
        browser.close()


def main(arguments: Sequence[str]) -> int:
    """Look at the built site; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=ROOT / "outputs" / "site")
    parser.add_argument("--pages", default="*.html", help="which of them, as in 'notebooks/*.html'")
    options = parser.parse_args(arguments)
    if not (options.site / "index.html").is_file():
        print(f"error: {options.site} has no site: run `make site` first", file=sys.stderr)
        return 2
    count = 0
    for fault in look(options.site.resolve(), ROOT / "outputs" / "site-look", options.pages):
        count += 1
        print(fault, flush=True)
    print(f"{count} faults")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
