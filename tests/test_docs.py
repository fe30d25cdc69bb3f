"""The documentation is true: every code block runs, every command works, every link leads somewhere, the site builds.

Blocks run in a folder that has what a reader would have: nano stands for the real checkpoints, a slice of the demo run
for theirs, and a mock server for vLLM.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
import zarr

import workbench as wb
from docs import commands_page
from tests import test_howto_tasks
from tests.cli.running import run_command
from tests.conftest import DATA
from tests.harmony.hosts.mock_server import FakeHost, chat
from tests.model.fake_gpus import run_on_gpus
from tests.runs.conftest import write_run
from tests.serving import free_port, wait_for
from workbench import registry
from workbench.figures import paper, report

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md"))
# those of `test_howto_tasks` run there, files, commands and Python in their order
RUN_ELSEWHERE = {(ROOT / "docs" / "howto" / page).resolve() for page in test_howto_tasks.PAGES}
WITH_CODE = [p for p in PAGES if p not in RUN_ELSEWHERE and ("```python" in p.read_text() or "```sh" in p.read_text())]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has, made once."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(DATA / "demo.zarr", folder / "run.zarr")
    rows = (DATA / "prompts.jsonl").read_text().splitlines()[::40]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    conversations = [
        {"id": f"c{i}", "messages": [*json.loads(row)["messages"], {"role": "assistant", "content": "7"}]}
        for i, row in enumerate(rows)
    ]
    (folder / "conversations.jsonl").write_text("\n".join(map(json.dumps, conversations)) + "\n")
    prompts, answers = str(folder / "prompts.jsonl"), str(folder / "answers.jsonl")
    assert run_command("generate", "nano", prompts, answers, "--effort", "low", "--effort", "high").code == 0
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it, with the checkpoints and the dashboards in their places."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "openai").mkdir()
    for model in ("gpt-oss-20b", "gpt-oss-120b"):  # the hub ids that the pages name
        (tmp_path / "openai" / model).symlink_to(DATA / "nano")
    (tmp_path / "dashboards").symlink_to(ROOT / "dashboards")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo.zarr").symlink_to(DATA / "demo.zarr")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as for a reader; pages use few prompts
@pytest.mark.parametrize("page", [p for p in WITH_CODE if blocks(p, "python")], ids=name)
def test_the_python_of_a_page_runs_in_its_order(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with no names but the page's own: a process for each page would import torch as often."""
    monkeypatch.chdir(workplace)
    exec(compile("\n".join(blocks(page, "python")), page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_hooks_of_the_how_to_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated GPU, where `device="auto"` puts the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.zarr").symlink_to(DATA / "demo.zarr")
    machine = run_on_gpus(blocks(ROOT / "docs" / "howto" / "hook.md", "python"), monkeypatch)
    assert machine.devices == {torch.device("cuda", 0)}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [p for p in WITH_CODE if blocks(p, "sh")], ids=name)
def test_the_commands_of_a_page_work_in_their_order(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    monkeypatch.chdir(workplace)
    if not long:  # figures and reports of all studies are made by the commands of the README, whose test runs them
        studies = [registry.find(name) for name in ("routing", "effort")]
        for module in (paper, report):
            monkeypatch.setattr(module, "studies", lambda runs: studies)
    text = "\n".join(blocks(page, "sh"))
    host, cluster = None, []
    if "http://localhost:8000" in text:
        host = FakeHost()
        host.reply = reply_of_host
        text = text.replace("http://localhost:8000", host.url)
    if "tcp://localhost:8786" in text:
        port = free_port()
        text = text.replace("localhost:8786", f"127.0.0.1:{port}")
        for words in (
            ["dask_scheduler", "--host", "127.0.0.1", "--port", str(port)],
            ["dask_worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1"],
        ):
            begin = [sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:], "--no-dashboard"]
            cluster.append(subprocess.Popen(begin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for(port, cluster[0])
    try:
        for line in filter(None, (line.split(" #")[0].strip() for line in text.splitlines())):
            run(shlex.split(line))
    finally:
        for process in cluster:
            process.terminate()
            process.wait(300)
        if host is not None:
            host.server.shutdown()
            host.server.server_close()


def reply_of_host(path: str, body: dict[str, Any], n: int) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return an answer to a chat, or continuations of a prefix of ids."""
    if not path.endswith("/completions") or path.endswith("chat/completions") or isinstance(body["prompt"], str):
        return 200, chat("6"), {}
    text = "<|end|><|start|>assistant<|channel|>final<|message|>6<|return|>"
    return 200, {"choices": [{"text": text, "finish_reason": "stop"} for _ in range(body["n"])]}, {}


# options of experiments whose cost is in proportion to them, and a value that is enough for their tables
LESS_WORK = {"controls": 20, "conversations": 1, "samples": 10, "max_new_tokens": 60}


def of_less_work(words: list[str]) -> list[str]:
    """Return options for an experiment that stands there without any, so that it takes seconds."""
    if words[1] != "study" or "--model" not in words or "--sequences" in words:
        return []
    options = [name for name in LESS_WORK if name in registry.find(words[2]).options]
    return ["--sequences", "36", *(part for name in options for part in ("--option", f"{name}={LESS_WORK[name]}"))]


class ServedError(Exception):
    """A command has come to where its server would listen."""


def run(words: list[str]) -> None:
    """One command as it stands, in this process; what serves ends where it would listen.

    That servers answer is tested with the dashboard and the live page, whose processes take seconds to start.
    """
    if words[0] == "panel":
        serve_by_panel(words)
        return
    assert words[0] == "workbench", f"a command that no test runs: {shlex.join(words)}"
    if words[1] not in ("dashboard", "live"):
        done = run_command(*words[1:], *of_less_work(words))
        assert done.code == 0, (shlex.join(words), done.err[-2000:])
        return
    port = free_port()

    def listen(pages: Any, **options: Any) -> None:
        assert callable(pages["/"])
        raise ServedError(options["port"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panel.serve", listen)
        patch.setattr("workbench.dashboards.app._warm", lambda registry: None)  # which would go on afterwards
        with pytest.raises(ServedError, match=f"^{port}$"):
            run_command(*words[1:], "--port", str(port))


def serve_by_panel(words: list[str]) -> None:
    """Start Panel's own server with a page as it stands, and end it when it answers."""
    port = free_port()
    command = [sys.executable, "-m", *words]
    command[command.index("--args") : command.index("--args")] = ["--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(port, server)
    finally:
        server.terminate()
        server.wait(300)


def test_a_command_that_does_not_serve_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run(["workbench", "dashboard", str(tmp_path / "none.zarr")])


def broken_links(page: Path) -> list[str]:
    """Links of a page to files that are not there."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_every_link_leads_somewhere(tmp_path: Path) -> None:
    for page in (*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", DATA / "nano" / "README.md"):
        assert broken_links(page) == [], page
    (tmp_path / "page.md").write_text("[gone](gone.md) and [there](page.md)")
    assert broken_links(tmp_path / "page.md") == ["gone.md"]


def missing_tests(text: str) -> list[str]:
    """The tests that a page names as `tests/FILE.py::TEST` or as a file, and that are not there."""
    missing = []
    for file, test in re.findall(r"`(tests/[\w/*]+(?:\.py)?)(?:::(\w+))?`", text):
        path = ROOT / file
        if not path.exists() or (test and not re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE)):
            missing.append(f"{file}::{test}")
    return missing


def test_the_tests_that_the_page_on_security_names_are_there() -> None:
    """Every promise names a test; one that was renamed is noticed."""
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition("## What is promised")[2].partition("\n## ")[0]
    promises = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(promises) > 30
    assert all("::test_" in line for line in promises)
    assert missing_tests(text) == []
    assert missing_tests("`tests/test_docs.py::test_nothing`") == ["tests/test_docs.py::test_nothing"]


@pytest.mark.parametrize("page", ["commands.md", "benchmarks.md", "studies.md"])
def test_generated_parts_are_written_into_the_pages(page: str) -> None:
    """`python -m docs.commands_page` writes them, so that the repository shows what the site shows."""
    text = (ROOT / "docs" / page).read_text()
    assert commands_page.generated(page, text) == text
    changed = text.replace("workbench capture", "workbench capturing").replace("overview |", "overviews |")
    assert commands_page.generated(page, changed) == text or page == "studies.md", "a stale page is noticed"


def test_every_page_is_reached_and_every_picture_used() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [p for p in PAGES if name(p) not in navigation] == []
    told = "".join(p.read_text() for p in PAGES)
    assert [p.name for p in (ROOT / "docs" / "pictures").iterdir() if p.name not in told] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        asked = re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*(?:rel="stylesheet"|></script>)', page.read_text())
        assert asked == [], page
    api = (tmp_path / "site" / "api" / "kernels" / "index.html").read_text()
    assert '"*stack out group 16"' in re.sub(r"&quot;|&#34;", '"', api)  # shapes are shown
    assert "workbench capture" in (tmp_path / "site" / "commands" / "index.html").read_text()


def test_the_benchmarks_page_has_the_committed_decoding_numbers(tmp_path: Path) -> None:
    row = {
        "batch": 8,
        "context": 4096,
        "tokens_per_s": 54.21,
        "of_memory_speed": 0.61,
        "recorded": 0.04,
        "edited": 0.08,
        "torch_tokens_per_s": 11.2,
        "speed_beside_torch": 4.84,
    }
    result = {
        "processor": "2 cores",
        "threads": 2,
        "layers": 4,
        "kernels": "AVX-512",
        "memory_bytes_per_s": 2.1e10,
        "baselines": ["torch", "llama.cpp"],
        "decode": [row],
    }
    path = tmp_path / "bench_decode.json"
    assert "no numbers" in commands_page.decode_table(path)
    path.write_text(json.dumps({"lengths": [], "decoding": result}))
    shown = commands_page.decode_table(path)
    assert "4 layers" in shown
    (cells,) = [line for line in shown.splitlines() if "4,096" in line]
    assert [c.strip() for c in cells.strip("|").split("|")] == [
        "8",
        "4,096",
        "54.2",
        "61%",
        "+4.0%",
        "+8.0%",
        "11.2 (4.84 ×)",
        "–",
    ]
    path.write_text(json.dumps({"lengths": [], "decoding": result | {"decode": [row | {"tokens_per_s": 26.3}]}}))
    assert commands_page.decode_table(path) != shown  # the page follows the file


def codes_of_the_page(page: str) -> dict[str, dict[int, str]]:
    """Label → code → name, from the table of the page on the store."""
    _, table = page.split("| code | `channel` | `role` | `part` |\n|---|---|---|---|\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n\n")[0].splitlines()]
    return {
        name: {int(row[0]): row[column] for row in rows if row[0].isdecimal() and row[column]}
        for column, name in enumerate(("channel", "role", "part"), 1)
    }


def test_the_store_page_lists_the_codes_that_plain_readers_see(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "store.md").read_text()
    listed = codes_of_the_page(page)
    write_run(tmp_path / "r.zarr")
    run = wb.open_run(tmp_path / "r.zarr")
    by_zarr = zarr.open_group(tmp_path / "r.zarr", mode="r")["tokens"]
    by_xarray = xr.open_zarr(tmp_path / "r.zarr", group="tokens", consolidated=False, mask_and_scale=False)
    used = by_zarr["sequence"][:] >= 0  # rows of a unit that no sequence fills are in no dataset
    for name, codes in listed.items():
        attributes = by_zarr[name].attrs
        assert dict(zip(attributes["flag_values"], attributes["flag_meanings"].split(), strict=True)) == codes
        assert by_xarray[name].attrs["flag_meanings"].split() == list(codes.values())
        labelled = [codes.get(int(code), "") for code in by_zarr[name][:][used]]
        assert labelled == run.dataset[f"{name}_name"].values.tolist()
    swapped = page.replace("| 3 | commentary |", "| 3 | final |").replace("| 4 | final |", "| 4 | commentary |")
    assert codes_of_the_page(swapped) != listed  # a negative control


def test_the_store_page_names_the_recorded_quantities(tmp_path: Path) -> None:
    write_run(tmp_path / "r.zarr")
    page = (ROOT / "docs" / "store.md").read_text()
    group = zarr.open_group(tmp_path / "r.zarr", mode="r")
    assert f"schema {group.attrs['schema']}" in page
    for key in (*group.attrs, *group["units/committed"].attrs):
        assert f"`{key}`" in page, key
    for table in ("sequences", "messages", "tokens", "summaries"):
        for column in group[table].array_keys():
            known = f"`{column}`" in page or f"summaries/{column}" in page or column.startswith("hook_")
            assert known, f"{table}/{column}"
    for path in ("routing/experts", "routing/gates", "attention/sink", "units/committed"):
        assert path in page
        assert path in group


def changelog_problems(text: str) -> list[str]:
    """Return lines of a changelog that are neither a heading nor a change of one line that is stated once."""
    lines = [line for line in text.splitlines() if line]
    headings = ("# Changelog", "## ", "### Added", "### Changed", "### Fixed")
    changes = [line for line in lines if line.startswith("- ")]
    wrong = [line for line in lines if line.startswith("#") and not line.startswith(headings)]
    wrong += [line for line in lines if line.startswith((" ", "* "))]
    return wrong + [line for line in set(changes) if changes.count(line) > 1]


def test_the_changelog_lists_each_change_once_under_three_headings() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert changelog_problems(text) == []
    for wrong in ("### Removed", "- A change.\n- A change.", "- A change\n  of two lines."):  # negative controls
        assert changelog_problems(f"{text}\n{wrong}\n"), wrong
