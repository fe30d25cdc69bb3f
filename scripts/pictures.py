"""Renew the pictures of the README and the documentation from a dashboard and a live page of nano.

    python scripts/pictures.py                          # all, of data/demo.zarr
    python scripts/pictures.py transcript graph         # those of these names
    python scripts/pictures.py --run runs/demo.zarr     # of another run of nano

It needs Chromium and the packages of `pip install -e .[test]`.
"""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, sync_playwright

from workbench.child_processes import python

ROOT = Path(__file__).parents[1]
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
_SECONDS = 600  # for a server to start, or for a page to be drawn
_RECIPE = {
    "recipe": 1,
    "user": "24*29",
    "effort": "medium",
    "interventions": [{"kind": "forbid", "cells": [[1, expert] for expert in range(3, 12)]}],
}
# name: address, width, height, and the text that is shown when the page is complete
PICTURES = {
    "dashboard": ("overview", 1280, 960, "Paired within prompts"),
    "transcript": (
        "transcript?" + urlencode({"sequence": 8, "pin": 60, "colour": "expert", "layer": 2, "expert": 8}),
        1280,
        720,
        "",
    ),
    "graph": ("graph", 1280, 900, ""),
    "live": ("live?" + urlencode({"recipe": json.dumps(_RECIPE)}), 1280, 1180, ""),
}


def free_port() -> int:
    """Return a port on which a server can listen."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(run: Path) -> Iterator[str]:
    """Serve a dashboard of the run with the live page of nano; yield its address."""
    port = free_port()
    command = python("-m", "workbench.cli", "dashboard", str(run), "--model", "nano", "--port", str(port))
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(2 * _SECONDS):
            if server.poll() is not None:
                raise SystemExit(f"the dashboard ended with exit status {server.returncode}")
            with socket.socket() as probe:
                if probe.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://localhost:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def settle(page: Page, text: str) -> None:
    """Wait until a text is shown and the page has neither been busy nor changed for three seconds."""
    if text:
        page.get_by_text(text).first.wait_for(timeout=1000 * _SECONDS)
    size = """() => { let n = 0, busy = document.documentElement.matches('.wb-waits');
        const walk = root => { for (const e of root.querySelectorAll('*')) {
          n += 1 + (e.childElementCount ? 0 : (e.textContent || '').length); busy ||= e.matches('.loader.spin');
          if (e.shadowRoot) walk(e.shadowRoot); } };
        walk(document); return busy ? 0 : n }"""
    before, equal = -1, 0
    for _ in range(2 * _SECONDS):
        page.wait_for_timeout(500)
        now = page.evaluate(size)
        equal = equal + 1 if now == before and now else 0
        before = now
        if equal == 6:
            return


def picture(browser: Browser, base: str, name: str) -> None:
    """Write docs/NAME.png."""
    address, width, height, text = PICTURES[name]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(f"{base}/{address}", timeout=1000 * _SECONDS)
    settle(page, text)
    if name == "live":
        page.get_by_role("button", name="Run", exact=True).click()
        ended = page.locator(".wb-note.good, .wb-note.danger, .wb-note:has-text('Stopped')").first
        ended.wait_for(timeout=1000 * _SECONDS)
        if (status := ended.inner_text()) != "Done.":
            raise SystemExit(f"the live page did not finish its answers: {status}")
        settle(page, "")
    page.screenshot(path=ROOT / "docs" / f"{name}.png")
    print(f"docs/{name}.png")
    page.close()


def main() -> None:
    """Renew the pictures that the command line names."""
    parser = argparse.ArgumentParser(description="Renew the pictures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--run", type=Path, default=ROOT / "data" / "demo.zarr", help="a run of nano")
    given = parser.parse_args()
    names = given.names or list(PICTURES)
    if unknown := set(names) - set(PICTURES):
        parser.error(f"unknown picture {', '.join(sorted(unknown))}: expected some of {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo.zarr"
        shutil.copytree(given.run, run)  # the graph is beside the run
        if "graph" in names:
            graph = ["graph", "nano", "--prompt", "24*29", "--effort", "high", "--out", f"{folder}/why.json"]
            subprocess.run(python("-m", "workbench.cli", *graph), check=True, stdout=subprocess.DEVNULL)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        with served(run) as base, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
            for name in names:
                picture(browser, base, name)


if __name__ == "__main__":
    main()
