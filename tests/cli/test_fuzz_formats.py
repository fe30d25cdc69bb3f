"""Models, adapters, dictionaries and files of conversations with random damage are read or refused in one line.

Models are GGUF files and MLX folders. Each is damaged in its bytes, most of them in the header, in its JSON, and by
pipes, devices and absurd sizes instead of its files. `--long` runs thirty times as many cases.
"""

import contextlib
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.checks import Checked, limits
from tests.cli.damaged_files import SPECIAL, damaged_bytes, replaced, with_header, written
from tests.cli.fuzzing import cases
from tests.cli.hostile_values import changes
from tests.cli.random_commands import without_long_work
from tests.cli.running import run_command
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


@pytest.fixture
def conversations(workplace: Path) -> list[Path]:
    """Conversations in every container that `convert` reads."""
    rows = [json.loads(line) for line in (workplace / "transcripts.jsonl").read_text().splitlines()]
    table = pa.table({name: [json.dumps(row[name]) for row in rows] for name in ("id", "messages")})
    nested = pa.Table.from_pylist([{"id": row["id"], "effort": "low", "messages": row["messages"]} for row in rows])
    pq.write_table(nested, workplace / "rows.parquet", compression="zstd")
    pq.write_table(table, workplace / "texts.parquet")
    with pa.OSFile(str(workplace / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, nested.schema) as writer:
        writer.write_table(nested)
    content = (workplace / "transcripts.jsonl").read_bytes()
    (workplace / "rows.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (workplace / "rows.json").write_text(json.dumps(rows))
    log = {"version": 2, "eval": {"task": "t"}, "plan": {"config": {"reasoning_effort": "low"}}}
    samples = [{"id": row["id"], "epoch": 1, "messages": row["messages"], "attachments": {}} for row in rows]
    (workplace / "log.json").write_text(json.dumps({**log, "samples": samples}))
    with zipfile.ZipFile(workplace / "log.eval", "w", zipfile.ZIP_DEFLATED) as made:
        for name, value in {"header": log, "samples/0": samples[0], "samples/1": samples[1]}.items():
            made.writestr(zipfile.ZipInfo(f"{name}.json"), json.dumps(value), zipfile.ZIP_DEFLATED)
    names = ["rows.parquet", "texts.parquet", "rows.arrow", "rows.jsonl.gz", "rows.json", "log.json", "log.eval"]
    return [workplace / name for name in names]


@st.composite
def damaged_log(draw: st.DrawFn, path: Path) -> bytes:
    """An Inspect log of which one member has another JSON value."""
    chosen, change = draw(st.integers(0, 2)), draw(changes())
    content = io.BytesIO()
    with zipfile.ZipFile(path) as log, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as made:
        for number, name in enumerate(log.namelist()):
            value = json.loads(log.read(name))
            made.writestr(name, json.dumps(change(value) if number == chosen else value))
    return content.getvalue()


def test_random_files_of_conversations(workplace: Path, conversations: list[Path], long: bool) -> None:
    """Bytes of tables, archives and packed files, and JSON instead of rows and samples."""

    @cases(3 * QUICK, long=long)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(conversations), "file")
        inside = path.suffix == ".eval" and data.draw(st.booleans(), "inside")
        content = data.draw(damaged_log(path), "log") if inside else b""
        with written(path, content) if inside else damaged(data.draw(damages(path), "damage")):
            Checked(workplace).run("convert", path.name, "out.jsonl")

    check()


def test_a_reader_of_conversations_that_fails_is_noticed(
    workplace: Path, conversations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a reader that takes a sample for what it should be."""
    path = conversations[-1]
    with zipfile.ZipFile(path, "a") as log:
        log.writestr("samples/2.json", "[]")
    assert Checked(workplace).run("convert", path.name, "out.jsonl").code == 0
    monkeypatch.setattr("workbench.harmony.formats.inspect_logs._MALFORMED", ZeroDivisionError)
    monkeypatch.setattr("workbench.harmony.formats.inspect_logs._DAMAGE", ZeroDivisionError)
    with pytest.raises(AttributeError):
        Checked(workplace).run("convert", path.name, "out.jsonl")


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
