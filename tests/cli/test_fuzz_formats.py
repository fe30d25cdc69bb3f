"""GGUF files, MLX folders, adapters and dictionaries with random damage are read or refused in one line.

Each is damaged in its bytes, most of them in the header, in its JSON, and by pipes, devices and absurd sizes in the
place of its files. `--long` runs thirty times as many cases.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.fuzzing import SPECIAL, Checked, cases, changes, limits, replaced, without_long_work
from tests.cli.running import run_command
from tests.cli.test_fuzz_checkpoints import damaged_bytes, with_header, written
from tests.model.formats import gguf_files
from tests.model.formats.test_mlx import mlx_folder
from workbench.errors import InputError
from workbench.hooks.sae import load_sae
from workbench.model.formats.gguf_file import GgufFile

QUICK = 12  # cases of each format
GENERATE = "prompts.jsonl out.jsonl --max-new-tokens 1 --effort low"
TARGETS = {
    "gguf": ["info weights.gguf", "info weights.gguf", f"generate weights.gguf {GENERATE}"],
    "mlx": ["info mlx", "info mlx", f"generate mlx {GENERATE}"],
    "adapter": [f"generate nano {GENERATE} --adapter adapter"],
}
ROOTS = {"gguf": "weights.gguf"}
HOOKS = Path(__file__).parents[1] / "hooks"
DICTIONARIES = sorted(path for kind in ("saes", "dictionaries") for path in (HOOKS / kind).iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """A model as GGUF, one as MLX stores it, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    assert run_command("convert-weights", "nano", str(folder / "weights.gguf")).code == 0
    mlx_folder(folder / "mlx")
    data = str(inputs / "transcripts.jsonl")
    options = ["--steps", "1", "--batch", "1", "--rank", "1", "--part", "attention", "--part", "router"]
    assert run_command("finetune", "nano", data, "--out", str(folder / "adapter"), *options).code == 0
    return folder


@pytest.fixture
def folder(workplace: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_long_work(monkeypatch)
    shutil.copytree(models, workplace, dirs_exist_ok=True)
    return workplace


def with_metadata(content: Path, change: Callable[[Any], Any], copy: Path) -> bytes:
    """A GGUF file with one value changed; as it was where GGUF cannot hold the new one."""
    file = GgufFile.open(content)
    tensors = {name: (t.kind, t.shape, file.bytes_of(name).tobytes()) for name, t in file.tensors.items()}
    try:
        gguf_files.write(copy, change(file.metadata), tensors)  # type: ignore[arg-type]
        return copy.read_bytes()
    except Exception:
        return content.read_bytes()
    finally:
        copy.unlink(missing_ok=True)


@st.composite
def damages(draw: st.DrawFn, root: Path) -> tuple[Path, Callable[[bytes], bytes] | str]:
    """Return a file, and how its content is changed or what is put in its place."""
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    files = [path for path in files if path.name != "outputs.safetensors"]  # of the tests of dictionaries
    path = draw(st.sampled_from(files))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "bytes", "bytes", "special"]))
    if kind == "special":
        return path, draw(st.sampled_from(list(SPECIAL)))
    if kind == "bytes" or path.suffix not in (".json", ".safetensors", ".gguf"):
        return path, draw(damaged_bytes())
    change = draw(changes())
    if path.suffix == ".json":
        return path, lambda content: json.dumps(change(json.loads(content))).encode()
    if path.suffix == ".safetensors":
        return path, lambda content: with_header(content, change)
    return path, lambda content: with_metadata(path, change, path.with_suffix(".copy"))


def damaged(damage: tuple[Path, Callable[[bytes], bytes] | str]) -> contextlib.AbstractContextManager[None]:
    """The file with its damage, for as long as the block lasts."""
    path, change = damage
    return replaced(path, change) if isinstance(change, str) else written(path, change(path.read_bytes()))


@pytest.mark.parametrize("kind", TARGETS)
def test_random_damage(folder: Path, kind: str, long: bool) -> None:
    root = folder / ROOTS.get(kind, kind)

    @cases(QUICK, long=long)
    @given(damages(root), st.sampled_from(TARGETS[kind]))
    def check(damage: tuple[Path, Any], command: str) -> None:
        with damaged(damage):
            Checked(folder).run(*command.split())

    check()


def read_dictionary(folder: Path) -> None:
    """Read and use a dictionary; refused, it is an `InputError`."""
    with contextlib.suppress(InputError), torch.no_grad():
        sae = load_sae(folder)
        x = torch.zeros(2, sae.cfg.d_in, dtype=sae.cfg.dtype)
        sae.decode(sae.encode(x), like=x)


def test_random_dictionaries(tmp_path: Path, long: bool) -> None:
    for source in DICTIONARIES:
        shutil.copytree(source, tmp_path / source.parent.name / source.name)
    copies = [tmp_path / source.parent.name / source.name for source in DICTIONARIES]

    @cases(2 * QUICK, long=long)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        root = data.draw(st.sampled_from(copies), "dictionary")
        with limits(), damaged(data.draw(damages(root), "damage")):
            read_dictionary(root)

    check()


def test_a_reader_that_believes_the_header_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a file without its last byte, and a reader that does not compare sizes."""
    path = folder / "weights.gguf"
    cut = path.read_bytes()[:-1]
    with written(path, cut):
        assert Checked(folder).run("info", "weights.gguf").code == 2
    monkeypatch.setattr("workbench.model.formats.gguf_file.InputError", IndexError)
    with written(path, cut), pytest.raises(IndexError):
        Checked(folder).run("info", "weights.gguf")
