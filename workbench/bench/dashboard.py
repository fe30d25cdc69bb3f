"""Measure the dashboard of a large run in a real browser: page loads, changes of selection, sessions, server memory.

Browser and server share this machine, so the times are those of a user of a local dashboard. Needs Chromium and
playwright (the extra `dev`).
"""

import asyncio
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from workbench.bench.table import processor, show
from workbench.bench.worker import peak_bytes
from workbench.child_processes import python
from workbench.dashboards.state import RunRegistry
from workbench.errors import InputError
from workbench.registry import studies

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# what each page is for, by a text of its own: a title is drawn with its figure; "=": the text alone; "|": or
PAGES = {
    "overview": "square brackets: 95 % intervals|No difference was verified",
    "experts": "uniform: analysis",
    "sinks": "=Sink attention: analysis",
    "channels": "Findings",
    "effort": "=Accuracy vs. reasoning length",
    "transcript": "Expected",
}
# what the first visitor sees while the studies of the run are made
FIRST = PAGES | {
    "overview": "Tokens by channel and effort",
    "channels": "Expert load: analysis",
    "effort": "Statistical tests",
}
# kind or label of a widget, its new value ("" for another than the present one), and the text that this brings
CHANGES = {
    "experts": [
        ("button", "low", "uniform: analysis, low"),
        ("button", "high", "uniform: analysis, high"),
        ("Channel", "final", "uniform: final, high"),
        ("Layer", "", "Layer {},"),
    ],
    "sinks": [("Channel", "prompt", "=Sink attention: prompt"), ("Layer", "", "Layer {},")],
    "effort": [("Task", "", "length: {}")],
    "transcript": [("button", "next ›", "Expected")],
}
_MOST_MS = 120_000  # for a page
_SEES = """
text => { let found = false; const walk = root => { if (found) return; for (const e of root.querySelectorAll('*')) {
  for (const n of e.childNodes) if (n.nodeType === 3
    && text.split('|').some(t => t[0] === '=' ? n.data.trim() === t.slice(1) : n.data.includes(t))) {
      found = true; return; }
  if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return found; }
"""
# changes a widget as a person does, and waits until the text that this brings is on the page
_CHANGE = f"""
async ([kind, value, text]) => {{
  const sees = {_SEES};
  const all = [];
  const walk = root => {{
    for (const e of root.querySelectorAll('*')) {{ all.push(e); if (e.shadowRoot) walk(e.shadowRoot); }}
  }};
  walk(document);
  const label = all.filter(e => e.tagName === 'LABEL' && e.textContent.trim() === kind)[0];
  const select = label && label.parentNode.querySelector('select');
  const others = select && !value ? Array.from(select.options).filter(o => !o.selected).map(o => o.textContent) : [];
  if (select && !value && !others.length) return -2;
  if (others.length) {{ value = others[others.length >> 1]; text = text.replace('{{}}', value); }}
  if (value !== 'next ›' && sees(text)) return -1;
  const before = all.filter(e => e.tagName === 'IFRAME').map(e => e.srcdoc.length + e.srcdoc.slice(9000, 12000)).join();
  const start = performance.now();
  if (kind === 'button') all.filter(e => e.tagName === 'BUTTON' && e.textContent.trim() === value)[0].click();
  else {{
    select.value = Array.from(select.options).find(o => o.textContent === value).value;
    select.dispatchEvent(new Event('change', {{bubbles: true}}));
  }}
  const drawn = () => {{
    if (value !== 'next ›') return sees(text);
    const now = [];
    const again = root => {{
      for (const e of root.querySelectorAll('*')) {{
        if (e.tagName === 'IFRAME') now.push(e.srcdoc.length + e.srcdoc.slice(9000, 12000));
        if (e.shadowRoot) again(e.shadowRoot);
      }}
    }};
    again(document); return now.length && now.join() !== before;
  }};
  while (!drawn()) {{ if (performance.now() - start > 30000) return null; await new Promise(r => setTimeout(r, 15)); }}
  return (performance.now() - start) / 1000;
}}
"""


def run(path: str, rounds: int, sessions: int, results: Path | None = None) -> dict[str, Any]:
    """Measure the dashboard and print the results. results: where those of studies are stored for another time.

    Raises:
        InputError: Chromium or playwright is not installed.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise InputError("no Chromium was found: apt-get install chromium, or put google-chrome into PATH")
    try:
        import playwright.async_api
    except ImportError as error:
        raise InputError("playwright is not installed: pip install gpt-oss-workbench[dev]") from error
    del playwright
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as cache:
        server, url = _serve(path, cache)
        try:
            first = asyncio.run(_pages(url, chromium, FIRST, rounds=1))
        finally:
            _stop(server)
        later = str(results or cache)
        _make_studies(path, Path(later) / "gpt-oss-workbench" / "studies")
        server, url = _serve(path, later)
        try:
            again = asyncio.run(_pages(url, chromium, PAGES, rounds))
            followed = asyncio.run(_pages(url, chromium, PAGES, rounds, after="overview"))
            one = _medians(asyncio.run(_changes(url, chromium, rounds, 1)))
            many = asyncio.run(_changes(url, chromium, rounds, sessions))
            at_once, slowest = _medians(many), {name: max(values) for name, values in many.items()}
            peak = peak_bytes(server.pid) / 1e9
        finally:
            _stop(server)
    load = [round(before, 1), round(os.getloadavg()[0], 1)]
    result = {
        "machine": processor(),
        "load_average": load,
        "first_visit_s": first,
        "page_s": again,
        "next_page_s": followed,
        "change_s": one,
        f"change_of_{sessions}_s": at_once,
        "slowest_change_s": slowest,
        "server_peak_gb": peak,
    }
    table = [[page, *(f"{kind[page]:.2f}" for kind in (first, again, followed))] for page in first]
    show("pages", ["page", "first session, s", "later, s", "after the overview, s"], table)
    kinds = (one, at_once, slowest)
    rows = [[name, *(f"{kind[name]:.3f}" for kind in kinds)] for name in one]
    rows.append(["median", *(f"{statistics.median(kind.values()):.3f}" for kind in kinds)])
    show("changes of selection", ["page and widget", "one, s", f"{sessions} at once, s", "slowest of them, s"], rows)
    print(f"the server's peak: {peak:.2f} GB")
    return result


def _serve(path: str, cache: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = python("-m", "workbench.cli", "dashboard", path, "--port", str(port))
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://localhost:{port}"
        if server.poll() is not None:
            raise InputError(f"the dashboard of {path} did not start")
        time.sleep(0.25)
    _stop(server)
    raise InputError(f"the dashboard of {path} does not answer")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait(30)


def _make_studies(path: str, cache: Path) -> None:
    """Make the studies that the pages show, as the first visitors do; `bench studies` measures them."""
    registry = RunRegistry([path], cache=cache)
    pages = {record.name: record.page or record.name for record in studies(runs=1)}
    asks = [registry.study(name, registry.names[0]) for name, page in pages.items() if page in PAGES]
    while any((answer := ask()).datasets is None and not answer.reason for ask in asks):
        time.sleep(0.2)
    registry.jobs.close()


async def _pages(
    url: str, chromium: str, pages: dict[str, str], rounds: int, after: str | None = None
) -> dict[str, float]:
    """Return the median seconds from the address to what the page is for, each time of a browser without cache.

    after: the page that the visitor opened before, so that the browser has the scripts.
    """
    from playwright.async_api import async_playwright

    seconds = {}
    async with async_playwright() as p:
        browser = await p.chromium.launch(executable_path=chromium, args=FLAGS)
        for page, text in pages.items():
            times = []
            for _ in range(rounds):
                visitor = await browser.new_page(viewport={"width": 1280, "height": 900})
                if after is not None:
                    await visitor.goto(f"{url}/{after}", timeout=_MOST_MS)
                    await visitor.wait_for_function(_SEES, arg=pages[after], timeout=_MOST_MS)
                    await visitor.wait_for_timeout(3000)  # what comes later has come
                start = time.monotonic()
                await visitor.goto(f"{url}/{page}", wait_until="commit", timeout=_MOST_MS)
                await visitor.wait_for_function(_SEES, arg=text, timeout=_MOST_MS)
                times.append(time.monotonic() - start)
                await visitor.close()
            seconds[page] = statistics.median(times)
        await browser.close()
    return seconds


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


async def _changes(url: str, chromium: str, rounds: int, sessions: int) -> dict[str, list[float]]:
    """Return the seconds from a change of selection to the new page, by change, of all concurrent sessions."""
    from playwright.async_api import async_playwright

    times: dict[str, list[float]] = {}
    async with async_playwright() as p:
        browser = await p.chromium.launch(executable_path=chromium, args=FLAGS)
        for page, changes in CHANGES.items():
            for _ in range(rounds):
                visitors = [await browser.new_page(viewport={"width": 1280, "height": 900}) for _ in range(sessions)]
                for visitor in visitors:
                    await visitor.goto(f"{url}/{page}", timeout=_MOST_MS)
                    await visitor.wait_for_function(_SEES, arg=PAGES[page], timeout=_MOST_MS)
                    await visitor.wait_for_timeout(3000)  # what comes later has come
                for change in changes:
                    took = await asyncio.gather(*(visitor.evaluate(_CHANGE, list(change)) for visitor in visitors))
                    if None in took:
                        raise InputError(f"{page}: {change[0]} {change[1]} did not show {change[2]!r} within 30 s")
                    if min(took) == -1:
                        raise InputError(f"{page}: {change[2]!r} is shown before {change[0]} {change[1]} is changed")
                    if min(took) >= 0:  # a list of one value has no other
                        times.setdefault(f"{page}: {change[0]} {change[1] or 'another'}", []).extend(took)
                    await visitors[0].wait_for_timeout(1200)
                for visitor in visitors:
                    await visitor.close()
        await browser.close()
    return times
