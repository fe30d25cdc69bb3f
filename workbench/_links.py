"""Refuse a checkout whose symbolic links are text files, as git makes them on Windows without symlink support."""

from pathlib import Path

LINKS = ("dashboards", "data", "hooks", "kernels")


def require_links(package: Path) -> None:
    """Check that the package's links to the top-level folders are links; a wheel has folders in their place.

    Raises:
        ImportError: one of them is a text file that holds the link's target.
    """
    for name in LINKS:
        if (package / name).is_file():
            raise ImportError(
                f"'workbench/{name}' is a text file and should be a symbolic link: enable symbolic links (on Windows: "
                "Developer Mode, then `git config core.symlinks true` and `git checkout -- workbench`), or install a "
                "wheel"
            )
