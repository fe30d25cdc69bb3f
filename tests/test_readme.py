"""What the README shows works as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.running import run_command
from tests.conftest import DATA
from tests.model.fake_gpus import run_on_gpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "<|channel|>final<|message|>" in done.stdout
    assert "torch.Size([1, " in done.stdout


def test_the_python_example_runs_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a simulated GPU, where `device="auto"` puts the model and the example's tokens are on the CPU."""
    monkeypatch.chdir(tmp_path)
    machine = run_on_gpus(blocks("python"), monkeypatch)
    assert machine.devices == {torch.device("cuda", 0)}
    assert "torch.Size([1, " in capsys.readouterr().out


def test_tokens_that_are_not_moved_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without the model's own move, the example's tokens meet weights of another device."""
    code = "import torch, workbench as wb; model = wb.load('nano'); model.embed(torch.tensor([[1]]))"
    with pytest.raises(RuntimeError, match="'cpu', 'cuda:0'"):
        run_on_gpus([code], monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as for a reader; few prompts
def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the dashboard and the live page, which do not end; a sixteenth of the prompts, as time is short.

    The first is a program of its own; the others run in this process, which has imported torch already.
    """
    lines = [line.split("#")[0].strip() for line in blocks("sh")[1].splitlines()]
    commands = [line.split() for line in lines if line and line.split()[1] not in ("dashboard", "live")]
    assert [c[1] for c in commands] == [
        "info",
        "generate",
        "capture",
        "verify",
        "study",
        "study",
        "summary",
        "report",
        "figures",
    ]
    (tmp_path / "data").mkdir()
    prompts = (DATA / "prompts.jsonl").read_text().splitlines()[::16]
    (tmp_path / "data" / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    monkeypatch.chdir(tmp_path)
    info = [str(Path(sys.executable).with_name("workbench")), *commands[0][1:]]
    done = subprocess.run(info, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in commands[1:]:
        result = run_command(*command[1:], *(["--format", "html"] if command[1] == "figures" else []))
        assert result.code == 0, (command, result.err)


def test_the_speeds_are_those_that_the_benchmark_wrote() -> None:
    result = json.loads((ROOT / "docs" / "bench_cpu.json").read_text())
    loads = result["load_s"]
    assert f"{result['threads']} threads on {result['processor']}" in README
    assert f"loads in {loads['workbench']:.1f} s, transformers in {loads['transformers']:.0f} s" in README
    for row in result["lengths"]:
        cells = [
            f"{row['tokens']:,}",
            f"{row['workbench_s']:.2f} s",
            f"{row['transformers_s']:.2f} s",
            f"{row['speed_beside_transformers']:.2f} ×",
            f"{row['workbench_bytes'] / 1e9:.1f} and {row['transformers_bytes'] / 1e9:.1f} GB",
            f"{row['recording']:+.1%}",
        ]
        assert "| " + " | ".join(cells) + " |" in README
    long = result["long"]
    assert (
        f"{long['tokens']:,} tokens through both layers, recorded, "
        f"in {long['seconds']:.0f} s and at most {long['peak_bytes'] / 1e9:.1f} GB" in README
    )


def test_the_two_set_up_commands_are_targets_of_the_makefile() -> None:
    wanted = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert wanted == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in wanted)


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", DATA / "nano" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
