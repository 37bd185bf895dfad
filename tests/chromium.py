"""The browser that tests drive: Debian's Chromium, without a word to the outside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--metrics-recording-only",
    # even a request that no listener sees finds no host to go to
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine, or ``None``."""
    wanted = os.environ.get("PLLM_CHROMIUM")
    if wanted:
        return shutil.which(wanted)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    return next((p for p in map(shutil.which, names) if p), str(mac) if mac.exists() else None)
