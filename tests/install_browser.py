"""Where the browser of the widget's tests is, and `python tests/install_browser.py` to get one.

Takes what is there; else Debian's Chromium where apt may be used, else Playwright's own. Without
any it says so, loudly, and the tests that need one are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "NO BROWSER: its tests are SKIPPED, so the pages of the widgets are NOT tested"

OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""For a browser that tests drive: no window, no sandbox, nothing fetched by itself."""


def browser_path() -> str | None:
    """The path of a Chromium: the system's, or Playwright's."""
    if path := next(filter(None, map(shutil.which, NAMES)), None):
        return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def main() -> None:
    """Install a browser if there is none."""
    if browser_path():
        return
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        install = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]
        commands = [["apt-get", "update"], install, *commands]
    for command in commands:
        print("no browser yet:", " ".join(command), flush=True)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        if browser_path():
            return
    print(f"\n*** {MISSING} ***\n")


if __name__ == "__main__":
    main()
