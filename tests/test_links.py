"""A checkout without symbolic links states it in one line when it is imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workbench._links import LINKS, require_links

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("broken", LINKS)
def test_a_checkout_whose_link_is_a_text_file_is_refused(broken: str, tmp_path: Path) -> None:
    package = tmp_path / "workbench"
    package.mkdir()
    for path in (ROOT / "workbench").glob("_*.py"):
        shutil.copy(path, package)
    for name in LINKS:
        (tmp_path / name).mkdir()
        (package / name).symlink_to(f"../{name}")
    require_links(package)  # as it should be
    (package / broken).unlink()
    (package / broken).write_text(f"../{broken}")  # what git writes where it cannot make links
    done = subprocess.run(
        [sys.executable, "-c", "import workbench"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: 'workbench/{broken}' is a text file")


def test_the_links_are_the_ones_of_the_package() -> None:
    assert sorted(path.name for path in (ROOT / "workbench").iterdir() if path.is_symlink()) == sorted(LINKS)
