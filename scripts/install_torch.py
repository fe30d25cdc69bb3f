"""Install the PyTorch build that fits this machine, and print in one line which build and why.

`make demo` runs this before it installs the rest:

    python scripts/install_torch.py [auto|cpu|cuda|rocm|LABEL] [--constraints constraints.txt] [--dry-run]

`auto` takes the CUDA build where an NVIDIA GPU is found, the ROCm build where an AMD GPU is found, and otherwise the
build for CPUs, which is a tenth of the size. The ordinary wheel is CUDA on Linux, CPU on Windows, and CPU with Metal
on macOS; the others come from PyTorch's own package index. Where that index cannot be reached, the torch that pip
finds is installed instead, and the line reports it. Only the standard library is needed: this runs before anything is
installed. A LABEL is a folder of PyTorch's index, such as cu126 or rocm7.1.
"""

import argparse
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

INDEX = "https://download.pytorch.org/whl"
# Folders of the index, the preferred one first. The ordinary CUDA wheel needs a driver of CUDA 13.
FOLDERS = {"cpu": ("cpu",), "cuda": ("cu130", "cu128", "cu126"), "rocm": ("rocm7.2", "rocm7.1", "rocm7.0", "rocm6.4")}
CUDA_13_DRIVER = 580
TIMEOUT_S = 5


@dataclass(frozen=True)
class Machine:
    """What decides the build: the operating system, and the GPU with its driver's major version."""

    system: str  # sys.platform: "linux", "darwin" or "win32"
    gpu: str = ""  # "NVIDIA", "AMD" or "" for none
    driver: int = 0  # major version of the NVIDIA driver; 0 where it is not known


@dataclass(frozen=True)
class Build:
    """A build of torch: its kind, the folders of PyTorch's index that hold it, and the reason it was chosen.

    Without folders it is the ordinary wheel, from the registry that pip uses.
    """

    kind: str  # "cpu", "cuda" or "rocm"
    folders: tuple[str, ...]
    reason: str


def detect(root: Path = Path("/"), system: str = sys.platform) -> Machine:
    """Return the operating system and the GPU, read from the drivers' own files and from `nvidia-smi`."""
    if system == "darwin":
        return Machine(system)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            answer = None
        if answer and answer.returncode == 0 and (version := re.match(r"\d+", answer.stdout)):
            return Machine(system, "NVIDIA", int(version[0]))
    if any((root / "proc/driver/nvidia/gpus").glob("*")):
        return Machine(system, "NVIDIA")
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")  # the CPU is a node without SIMD units
    if any(re.search(r"^simd_count [1-9]", node.read_text(), re.MULTILINE) for node in nodes):
        return Machine(system, "AMD")
    return Machine(system)


def choose(asked: str, machine: Machine) -> Build:
    """Return the build for this machine, or the one that was asked for.

    Raises:
        ValueError: asked is neither auto, cpu, cuda, rocm nor a folder of PyTorch's index.
    """
    if asked == "auto":
        kind = {"NVIDIA": "cuda", "AMD": "rocm"}.get(machine.gpu, "cpu")
        reason = f"an {machine.gpu} GPU was found" if machine.gpu else "no NVIDIA or AMD GPU was found"
    elif asked in FOLDERS:
        kind, reason = asked, f"TORCH={asked}"
    elif re.fullmatch(r"cu\d{3}|rocm\d+(\.\d+)*", asked):
        return Build("rocm" if asked.startswith("rocm") else "cuda", (asked,), f"TORCH={asked}")
    else:
        raise ValueError(
            f"TORCH={asked!r} is unknown: choose auto, cpu, cuda, rocm, or a folder of {INDEX} as in cu126"
        )
    if machine.system == "darwin":
        if kind != "cpu":
            raise ValueError(f"TORCH={asked!r}: PyTorch has no {kind} build for macOS; choose TORCH=cpu")
        return Build("cpu", (), "macOS has one build, for CPU and Metal")
    if kind == "cuda" and 0 < machine.driver < CUDA_13_DRIVER:
        reason += f", whose driver {machine.driver} is older than CUDA 13 needs ({CUDA_13_DRIVER})"
        return Build(kind, FOLDERS["cuda"][1:], reason)
    ordinary = {"linux": "cuda", "win32": "cpu"}.get(machine.system)
    return Build(kind, () if kind == ordinary else FOLDERS[kind], reason)


def pinned(constraints: Path | None) -> str:
    """Return the version of torch in a constraints file, or "" where none is pinned."""
    match = re.search(r"^torch==([\w.]+)", constraints.read_text() if constraints else "", re.MULTILINE)
    return match[1] if match else ""


def lists_version(folder: str, version: str) -> bool:
    """Return whether a folder of PyTorch's index answers, and lists this version of torch."""
    try:
        with urllib.request.urlopen(f"{INDEX}/{folder}/torch/", timeout=TIMEOUT_S) as page:
            return f"torch-{version}" in page.read().decode(errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return False


def installed_kind() -> str:
    """Return the kind of torch that is installed here ("cpu", "cuda" or "rocm"), or "" where none is."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
    label = version.partition("+")[2]
    if "rocm" in label:
        return "rocm"
    requires_cuda = any(line.startswith(("nvidia-", "cuda-")) for line in metadata.requires("torch") or ())
    return "cuda" if label.startswith("cu") or requires_cuda else "cpu"


def plan(build: Build, version: str, listed: Callable[[str, str], bool] = lists_version) -> tuple[str, str]:
    """Return the folder of PyTorch's index to install from ("" for the ordinary wheel), and the line that states
    why.
    """
    if not build.folders:
        return "", f"torch {version}: the ordinary wheel ({build.kind}), as {build.reason}"
    for folder in build.folders:
        if listed(folder, version):
            return folder, f"torch {version}: the {build.kind} build from {INDEX}/{folder}, as {build.reason}"
    where = " or ".join(f"{INDEX}/{folder}" for folder in build.folders)
    return "", (
        f"torch {version}: the {build.kind} build was wanted, as {build.reason}, but {where} did not answer or does "
        "not "
        "hold this version: taking the torch that pip finds, which for Linux is usually the CUDA build (3 GB)"
    )


def install(folder: str, version: str, constraints: Path | None) -> None:
    """Install torch, and from PyTorch's index its Triton too; its other requirements come with the workbench."""
    pip = [sys.executable, "-P", "-m", "pip", "install", "-q"]
    torch = f"torch=={version}" if version else "torch"
    if not folder:
        limits = ["-c", str(constraints)] if constraints else []
        subprocess.run([*pip, *limits, torch], check=True)
        return
    index = ["--index-url", f"{INDEX}/{folder}", "--no-deps"]
    subprocess.run([*pip, *index, torch], check=True)
    code = "from importlib import metadata; print(*metadata.requires('torch') or (), sep='\\n')"
    listing = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    if triton := [line for line in listing.splitlines() if "triton" in line]:  # ROCm's is on PyTorch's index only
        subprocess.run([*pip, *index, *triton], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose, print the line, and install; exit code 2 for an unknown choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="?", default="auto", help="auto, cpu, cuda, rocm, or a folder such as cu126")
    parser.add_argument("--constraints", type=Path, help="the file that pins torch's version")
    parser.add_argument("--dry-run", action="store_true", help="print the choice and install nothing")
    options = parser.parse_args(arguments)
    try:
        build = choose(options.torch, detect())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    version = pinned(options.constraints)
    folder, line = plan(build, version)
    print(line, flush=True)
    if options.dry_run:
        return 0
    if (folder or not build.folders) and installed_kind() not in ("", build.kind):  # would satisfy pip
        subprocess.run([sys.executable, "-P", "-m", "pip", "uninstall", "-q", "-y", "torch"], check=True)
    try:
        install(folder, version, options.constraints)
    except subprocess.CalledProcessError as error:
        print(f"pip could not install torch (exit code {error.returncode}); its message is above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
