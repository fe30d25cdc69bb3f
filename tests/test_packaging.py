"""The installation resolves for every platform, and the wheel works outside the checkout."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.serving import free_port, wait_for

ROOT = Path(__file__).parents[1]


PACKAGES = ("workbench", "dashboards", "kernels", "hooks", "data")


def tracked(*folders: str) -> list[str]:
    """The paths that git holds in folders of the checkout, or all, links among them."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--", *folders], capture_output=True, text=True, check=True
    )
    return listed.stdout.rstrip("\0").split("\0")


def copy_sources(target: Path) -> Path:
    """The files that git holds, as they are in the checkout: what an archive of the sources has."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def build(source: Path, out: Path, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", *options, "-o", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkout with git, an sdist, and the wheel that is made of it and not of the checkout."""
    source = copy_sources(tmp_path_factory.mktemp("source") / "checkout")
    git = ["git", "-C", str(source), "-c", "user.name=Test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--no-verify", "-m", "Sources"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    out = tmp_path_factory.mktemp("dist")
    build(source, out)
    return out


def version_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    return re.findall(r"^Version: (\S+)$", about, re.MULTILINE)[0]


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_of_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        about = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    links = {f"workbench/{folder}" for folder in PACKAGES[1:]}
    held = {n if n.startswith("workbench/") else f"workbench/{n}" for n in tracked(*PACKAGES)} - links
    assert names == held
    assert "+" in version_of(wheel), "the version is that of the commit"
    assert set(re.findall(r"Provides-Extra: (\S+)", about)) == {
        "dashboard",
        "figures",
        "notebook",
        "s3",
        "cluster",
        "dev",
    }
    with tarfile.open(sdist) as archive:
        inside = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "workbench/cli/__init__.py"} <= inside


@pytest.mark.slow
def test_an_archive_without_git_builds_the_same_wheel_with_the_fallback_version(built: Path, tmp_path: Path) -> None:
    build(copy_sources(tmp_path / "archive"), tmp_path, "--wheel")
    contents = []
    for folder in (built, tmp_path):
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents.append({n for n in archive.namelist() if ".dist-info/" not in n})
    assert contents[0] == contents[1]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert version_of(wheel) == settings["tool"]["setuptools_scm"]["fallback_version"]


def dependencies(package: Distribution, extra: str) -> set[str]:
    """The distributions that one needs with an extra, directly or through others, as their metadata say."""
    reached: set[tuple[str, str]] = set()
    ahead = [(package, extra)]
    while ahead:
        current, extra = ahead.pop()
        for requirement in map(Requirement, current.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = {(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)} - reached
                ahead += [(distribution(name), extra) for name, extra in needed]
                reached |= needed
    return {name for name, _ in reached}


def record(package: Distribution) -> list[str]:
    """The files of a distribution beside the others' in site-packages; not its commands."""
    lines = (package.read_text("RECORD") or "").splitlines()
    return [path for path in (line.rsplit(",", 2)[0].strip('"') for line in lines) if not path.startswith(("..", "/"))]


def link_distributions(names: set[str], site: Path) -> None:
    """Put links to installed distributions into an environment, as if they were installed there, and to no others."""
    owners = Counter(root for package in distributions() for root in {p.split("/")[0] for p in record(package)})
    for name in names:
        files = record(distribution(name))
        assert files, f"{name} does not list its files"
        # a folder is linked, except where several distributions share it
        for part in {path if owners[path.split("/")[0]] > 1 else path.split("/")[0] for path in files}:
            if not (site / part).exists():
                (site / part).parent.mkdir(parents=True, exist_ok=True)
                (site / part).symlink_to(Path(str(distribution(name).locate_file(part))).resolve())


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(built: Path, tmp_path: Path, long: bool) -> None:
    """Installed with its dependencies in an environment of its own, used from a folder that is not the checkout.

    Only with --long they are installed anew; else they are links to those of this environment.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "XDG_CACHE_HOME": str(tmp_path)
    }
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    # not compiled: what is imported is compiled then, and torch has ten thousand modules that nobody imports here
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile"]
    install += ["-c", ROOT / "constraints.txt", f"{wheel}[dashboard]"] if long else ["--no-deps", wheel]
    subprocess.run(list(map(str, install)), check=True, env=environment, capture_output=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    if not long:
        link_distributions(
            dependencies(Distribution.at(*site.glob("gpt_oss_workbench-*.dist-info")), "dashboard"), site
        )

    def run(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert done.returncode == 0, (words, done.stderr[-2000:])
        return done.stdout

    command = str(python.with_name("workbench"))
    assert "attn.hook_sink" in run(command, "info", "nano")
    undeclared = "import importlib.util; print(importlib.util.find_spec('moto'))"
    assert run(str(python), "-c", undeclared) == "None\n", "the environment has what nothing requires"
    code = """
import pathlib, torch, workbench as wb, workbench.data
model = wb.load("nano", dtype=torch.float32)
prompt = wb.harmony.render([{"role": "user", "content": "47*68"}], effort="high", tokenizer=model.tokenizer)
print(model.tokenizer.decode(model.generate([prompt], max_new_tokens=200)[0]))
print(pathlib.Path(wb.__file__).parent, pathlib.Path(next(iter(workbench.data.__path__))) / "demo.zarr")
"""
    printed = run(str(python), "-c", code)
    assert "<|channel|>final<|message|>3196" in printed
    where, demo = printed.splitlines()[-1].split()
    assert where.startswith(str(tmp_path))
    assert "nano: 4 layers of 16 experts" in run(command, "summary", demo)
    assert (Path(where) / "py.typed").is_file()  # type checkers read the annotations, which `make test` checks
    figures = subprocess.run(
        [command, "figures", demo, "--out", "f", "--format", "svg"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert figures.returncode == 2
    assert "install gpt-oss-workbench[figures]" in figures.stderr
    workers = subprocess.run(
        [command, "capture", "nano", "t.jsonl", "r.zarr", "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert workers.returncode == 2
    assert workers.stderr.count("\n") == 1
    port = free_port()
    server = subprocess.Popen(
        [command, "dashboard", demo, "--port", str(port)], stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment
    )
    try:
        wait_for(port, server)
        page = run(
            str(python),
            "-c",
            f"import httpx; print(httpx.get('http://localhost:{port}/experts', timeout=300).status_code)",
        )
        assert page == "200\n"
    finally:
        server.terminate()
        server.wait(300)
    shutil.move(site / "safetensors", tmp_path)
    missing = subprocess.run([command, "info", "nano"], capture_output=True, text=True, check=False, env=environment)
    assert missing.returncode != 0, "a negative control: a dependency that is not there is noticed"


PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Not the settings of this machine, which may name local wheels: they would hide a conflict.
REGISTRY_ONLY = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))} | {
    "MACOSX_DEPLOYMENT_TARGET": "14.0",  # torch's wheels are for macOS 14 or newer
    "UV_PYTHON_DOWNLOADS": "never",  # metadata is enough for the Pythons that are not here
}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of uv, which resolves for other platforms and Pythons from a registry's metadata alone."""
    folder = tmp_path_factory.mktemp("uv")
    version = re.search(r"^uv==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "-q", "--no-deps", "--target", str(folder), version[0]]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"no package registry answers: {done.stderr.strip().splitlines()[-1:]}")
    return [str(folder / "bin" / "uv"), "--no-config", "--color", "never"]


def resolve(
    uv: list[str], platform: str, python: str, *, extra: str = "dev", constraints: Path = ROOT / "constraints.txt"
) -> tuple[dict[str, str], str]:
    """The versions that are chosen for a platform and a Python, and the error where there is no choice."""
    command = [*uv, "pip", "compile", "-q", "--no-header", "--no-annotate"]
    command += ["--python-platform", platform, "--python-version", python, "--extra", extra]
    command += ["-c", str(constraints), str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=REGISTRY_ONLY, timeout=300)
    chosen = dict(line.split(" ")[0].split("==") for line in done.stdout.splitlines() if "==" in line)
    return chosen, "" if done.returncode == 0 else done.stderr


def test_the_constraints_resolve_from_the_registry_for_every_platform_and_python(uv: list[str], long: bool) -> None:
    pythons = PYTHONS if long else (PYTHONS[0], PYTHONS[-1])
    cases = [(PLATFORMS[0], python, "dev") for python in PYTHONS] + [(PLATFORMS[0], PYTHONS[0], "dashboard")]
    cases += itertools.product(PLATFORMS[1:], pythons, ("dev",))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: resolve(uv, *case[:2], extra=case[2]), cases))
    assert [(case, error) for case, (_, error) in zip(cases, results, strict=True) if error] == []
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for (platform, *_), (chosen, _) in zip(cases, results, strict=True):
        assert chosen["torch"] == pins["torch"]
        assert chosen.get("triton") == (pins["triton"] if "linux" in platform else None)


def test_a_triton_that_torch_does_not_require_does_not_resolve(uv: list[str], tmp_path: Path) -> None:
    """The negative control: the pin of an earlier version, which a local build of torch for CPUs had hidden."""
    text = (ROOT / "constraints.txt").read_text()
    wrong = tmp_path / "constraints.txt"
    wrong.write_text(re.sub(r"^triton==\S+;", "triton==3.9.0;", text, flags=re.MULTILINE))
    assert wrong.read_text() != text
    for extra in ("dashboard", "dev"):
        _, error = resolve(uv, PLATFORMS[0], "3.11", extra=extra, constraints=wrong)
        assert "torch==2.13.0 depends on triton" in error


def test_the_supported_pythons_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    declared = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert declared == list(PYTHONS)
    # Triton comes with torch: a second requirement could contradict torch's, and ROCm's Triton has another name.
    assert [d for d in project["dependencies"] if "triton" in d] == []


def test_the_shell_can_be_taught_the_commands() -> None:
    command = Path(sys.executable).with_name("workbench")
    asked = os.environ | {"_WORKBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "workbench cap", "COMP_CWORD": "1"}
    told = subprocess.run([command], capture_output=True, text=True, check=False, env=asked)
    assert told.stdout.split() == ["capture"]
    helped = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "--install-completion" in helped.stdout
