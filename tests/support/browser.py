"""A page of HTML in a real browser, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
_FLAGS += ("--disable-component-update", "--disable-sync", "--no-first-run")


def opened(page: Path, script: str, folder: Path) -> str:
    """The text that `script`, an expression of JavaScript, gives once the page is there; skips without a browser.

    The browser has no network; a page that wants one would have to say so in what the script looks at.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser here ({', '.join(NAMES)})")
    probe = folder / "probe.html"
    inside = f"<script>document.title = '<<' + String({script}) + '>>'</script></body>"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", inside), encoding="utf-8")
    words = [browser, *_FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'browser'}"]
    command = [*words, "--window-size=500,900", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.partition("<title>&lt;&lt;")[2].partition("&gt;&gt;</title>")[0]
