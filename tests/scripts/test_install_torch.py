"""The choice of PyTorch's build, for machines that are described by files and fake commands."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "install_torch.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "install_torch", module)
    spec.loader.exec_module(module)
    return module


def amd_node(root: Path, name: str, simd_count: int) -> None:
    folder = root / "sys/class/kfd/kfd/topology/nodes" / name
    folder.mkdir(parents=True)
    (folder / "properties").write_text(f"cpu_cores_count 16\nsimd_count {simd_count}\n")


def test_a_gpu_is_found_from_its_driver(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda command: None)
    assert script.detect(tmp_path, "linux") == script.Machine("linux")
    amd_node(tmp_path, "0", simd_count=0)  # the driver is there, and lists only the CPU
    assert script.detect(tmp_path, "linux") == script.Machine("linux")
    amd_node(tmp_path, "1", simd_count=304)
    assert script.detect(tmp_path, "linux") == script.Machine("linux", "AMD")
    (tmp_path / "proc/driver/nvidia/gpus/0000:1a:00.0").mkdir(parents=True)
    assert script.detect(tmp_path, "linux") == script.Machine("linux", "NVIDIA")
    assert script.detect(tmp_path, "darwin") == script.Machine("darwin")


def test_nvidia_smi_counts_only_where_it_sees_a_gpu(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    command.chmod(0o755)
    assert script.detect(tmp_path, "linux") == script.Machine("linux", "NVIDIA", 570)
    command.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver'\nexit 9\n"
    )
    assert script.detect(tmp_path, "linux") == script.Machine("linux")


@pytest.mark.parametrize(
    ("asked", "machine", "kind", "folders"),
    [
        ("auto", ("linux",), "cpu", ("cpu",)),
        ("auto", ("linux", "NVIDIA", 580), "cuda", ()),
        ("auto", ("linux", "NVIDIA"), "cuda", ()),
        ("auto", ("linux", "NVIDIA", 550), "cuda", ("cu128", "cu126")),
        ("auto", ("linux", "AMD"), "rocm", ("rocm7.2", "rocm7.1", "rocm7.0", "rocm6.4")),
        ("auto", ("darwin",), "cpu", ()),
        ("auto", ("win32",), "cpu", ()),
        ("auto", ("win32", "NVIDIA", 581), "cuda", ("cu130", "cu128", "cu126")),
        ("cpu", ("linux", "NVIDIA", 580), "cpu", ("cpu",)),
        ("cuda", ("linux",), "cuda", ()),
        ("cu126", ("linux",), "cuda", ("cu126",)),
        ("rocm7.1", ("linux",), "rocm", ("rocm7.1",)),
    ],
)
def test_the_build_follows_the_machine_unless_it_is_asked_for(
    script: ModuleType, asked: str, machine: tuple[str, ...], kind: str, folders: tuple[str, ...]
) -> None:
    build = script.choose(asked, script.Machine(*machine))
    assert (build.kind, build.folders) == (kind, folders)


def test_a_build_that_does_not_exist_is_refused(script: ModuleType) -> None:
    for asked, system in (("gpu", "linux"), ("../cpu", "linux"), ("cuda", "darwin")):
        with pytest.raises(ValueError, match=f"TORCH='{asked}'"):
            script.choose(asked, script.Machine(system))


def test_the_first_folder_that_has_the_version_is_taken_and_otherwise_pip_decides(script: ModuleType) -> None:
    amd = script.choose("auto", script.Machine("linux", "AMD"))
    folder, line = script.plan(amd, "2.13.0", lambda folder, version: folder in ("rocm7.1", "rocm6.4"))
    assert folder == "rocm7.1"
    assert "an AMD GPU was found" in line
    folder, line = script.plan(amd, "2.13.0", lambda folder, version: False)
    assert folder == ""
    assert "did not answer" in line
    assert "an AMD GPU was found" in line
    nvidia = script.choose("auto", script.Machine("linux", "NVIDIA", 580))
    folder, line = script.plan(nvidia, "2.13.0", lambda folder, version: pytest.fail("nothing is asked"))
    assert (folder, line) == ("", "torch 2.13.0: the ordinary wheel (cuda), as an NVIDIA GPU was found")


def test_torch_of_an_index_comes_with_the_triton_it_requires(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "filelock\ntriton-rocm==3.7.1; platform_system == 'Linux'\n", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    script.install("rocm7.1", "2.13.0", ROOT / "constraints.txt")
    torch, _, triton = calls
    index = ["--index-url", "https://download.pytorch.org/whl/rocm7.1", "--no-deps"]
    assert torch[1:] == ["-P", "-m", "pip", "install", "-q", *index, "torch==2.13.0"]
    assert triton[1:] == ["-P", "-m", "pip", "install", "-q", *index, "triton-rocm==3.7.1; platform_system == 'Linux'"]
    calls.clear()
    script.install("", "2.13.0", ROOT / "constraints.txt")
    assert [c[1:] for c in calls] == [
        ["-P", "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), "torch==2.13.0"]
    ]


def test_the_command_prints_one_line() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        )

    done = run("cuda", "--constraints", "constraints.txt", "--dry-run")
    assert done.returncode == 0
    if sys.platform == "linux":
        assert done.stdout == "torch 2.13.0: the ordinary wheel (cuda), as TORCH=cuda\n"
    refused = run("gpu")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
