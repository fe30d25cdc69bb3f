"""Add manifests to a run of schema 1 or 2, which was written before runs had them; no value changes."""

from pathlib import Path

from workbench.errors import InputError
from workbench.runs import manifest
from workbench.runs.group import open_group
from workbench.runs.lock import Lock
from workbench.runs.reader import Run
from workbench.runs.schema import arrays
from workbench.runs.storage import ROOT, Storage, storage_at
from workbench.runs.verify import files_of_unit, other_content, verify


def add_checksums(path: str | Path | Storage) -> int:
    """Write the manifests of a finished run that has none, after its values are checked; return the files listed.

    The manifest of the totals and the attribute that names the manifests are written last: until then the run is read
    as one without manifests.

    Raises:
        InputError: the run has checksums, is not finished or is damaged (`DamageError`); nothing was written.
    """
    storage = storage_at(path)
    with Lock(storage):
        run = Run(storage, open_group(storage))
        if run.manifest is not None:
            raise InputError(f"{storage} has checksums: verify it without --add-checksums")
        done, total = run.progress
        if run.status != "complete":
            raise InputError(
                f"{storage} is not finished ({done} of {total} units): rerun its capture first, then add checksums"
            )
        if problems := verify(storage):
            raise manifest.DamageError(storage, f"{problems[0].where}: {problems[0].what}")
        return _write(run)


def _write(run: Run) -> int:
    """Write the manifests of a complete run, which is locked, and return the number of files that they list."""
    storage, there, group = run.storage, run.storage.files(), open_group(run.storage, "r+")
    specs = arrays(run.model, run.spec, run.layout)
    grains = {name: run.group[name].shards or run.group[name].chunks for name in specs}
    files = {  # with the flags, which are compressed in schema 1
        unit.index: [*files_of_unit(specs, grains, unit), f"units/committed/c/{unit.index}"]
        for unit in run.layout.units
    }
    totals = [key for key in there if key.startswith("totals/")]
    left_out = {ROOT, *totals, *(key for keys in files.values() for key in keys)}
    others = tuple(f"{name}/" for name in other_content(run))
    own = [key for key in there - left_out if not key.startswith(("manifest/", *others))]
    for index, keys in files.items():
        manifest.write(storage, manifest.unit_key(index), {key: manifest.entry([storage.read(key)]) for key in keys})
    manifest.write(storage, manifest.CREATED, {key: manifest.entry([storage.read(key)]) for key in own})
    group.attrs["status"] = run.status  # zarr writes the root as it will be with one more attribute
    digest = manifest.attributes_digest(storage.read(ROOT))
    manifest.write_complete(storage, totals, len(files))
    group.attrs["digest"] = digest
    return len(own) + len(totals) + sum(map(len, files.values()))
