"""A git-lfs pointer is named as one, and what only resembles one is not."""

from pathlib import Path

import pytest

from workbench.errors import InputError, JobError, refuse_lfs_pointer


def test_a_pointer_is_refused_by_the_name_of_the_file() -> None:
    with pytest.raises(
        InputError, match=r"model\.safetensors is a pointer of git-lfs instead of the file: run `git lfs pull`"
    ):
        refuse_lfs_pointer(Path("model.safetensors"), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse_lfs_pointer(Path("readme.md"), b"see https://git-lfs.github.com/spec/v1")  # negative control


def test_refused_input_is_a_value_error_and_a_failed_job_is_not() -> None:
    assert issubclass(InputError, ValueError)
    assert not issubclass(JobError, ValueError)
