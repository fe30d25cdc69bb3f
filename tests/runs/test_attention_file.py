"""Files of attention patterns that are not what they should be are refused, and nothing in them is executed."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.runs import attention_file


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import workbench; workbench.evil = True",)


def arrays(n: int = 4) -> dict[str, np.ndarray]:
    attributes = b'{"layers": [0], "start": 0}'
    small = np.zeros((1, 2, n), dtype=np.float16)
    return {
        "attributes": np.frombuffer(attributes, dtype=np.uint8),
        "pattern": np.zeros((1, 2, n, n), dtype=np.float16),
        "sink": small,
        "earlier": small,
    }


def test_a_file_of_the_right_form_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **arrays())
    assert attention_file.read(tmp_path / "a.npz").sizes == {"layer": 1, "head": 2, "query": 4, "key": 4}


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    broken = [b"", b"text", pickle.dumps(Evil())]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as attention patterns"):
            attention_file.read(path)
    for name in arrays():
        np.savez_compressed(path, **{k: v for k, v in arrays().items() if k != name})
        with pytest.raises(InputError, match="cannot be read"):
            attention_file.read(path)
    for name, wrong in (("sink", np.zeros((1, 2, 9))), ("pattern", np.zeros(3)), ("attributes", np.zeros(2, np.uint8))):
        np.savez_compressed(path, **(arrays() | {name: wrong}))
        with pytest.raises(InputError, match="cannot be read"):
            attention_file.read(path)
    np.savez(path, **(arrays() | {"pattern": np.array([Evil()], dtype=object)}))
    with pytest.raises(InputError, match="cannot be read"):
        attention_file.read(path)
    monkeypatch.setattr(attention_file, "MAX_VALUES", 1)
    np.savez_compressed(path, **arrays())
    with pytest.raises(InputError, match="would take"):
        attention_file.read(path)
