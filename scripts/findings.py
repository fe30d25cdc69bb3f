"""Make data/findings.md: all studies of the bundled run, and experiments with nano on a stated number of its sequences.

    python scripts/findings.py                     # all that is missing, then the report: an hour on two cores
    python scripts/findings.py --only steering     # one experiment, without the report
    python scripts/findings.py --report            # the report of the results that are there
    python scripts/findings.py --pictures          # the figures of docs/gallery.md from the same results

Results are kept in runs/findings, and a result that is there is not made again: remove the folder to start anew.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import workbench as wb
from workbench import registry
from workbench.experiments.from_run import transcripts
from workbench.experiments.registry import run_experiment
from workbench.figures.export import write_gallery
from workbench.figures.report import write_report
from workbench.harmony.transcripts import write_transcripts
from workbench.studies import run_study, save
from workbench.studies.result import load

ROOT = Path(__file__).parents[1]
RUN, FINDINGS = Path("data/demo.zarr"), Path("data/findings.md")  # from ROOT: results name them
RECORD = ("routing", "neurons", "hook_resid_post")  # of the second run, from which activation studies are made


@dataclass(frozen=True)
class Section:
    """What is computed: on about this many sequences, spread over tasks and efforts, with these options."""

    sequences: int
    options: Mapping[str, Any] = field(default_factory=dict)
    study: str = ""  # where the section has another name, so that one study has two


# Experiments, and studies that need recorded activations (without sequences: all)
SECTIONS = {
    "chain-of-thought": Section(300),
    "attention-knockout": Section(200),
    "sink-ablation": Section(200),
    "patching": Section(200),
    "logit-attribution": Section(200),
    "expert-logits": Section(100),
    "steering": Section(120),
    "steering-by-role": Section(60, {"a": "role=system", "b": "role=user", "at": "role=user"}, study="steering"),
    "receiver-heads": Section(90, {"apart": 2}),
    "expert-ablation": Section(180, {"controls": 20}),
    "expert-forcing": Section(180, {"controls": 20}),
    "expert-reweighting": Section(180, {"controls": 20}),
    "super-experts": Section(60),
    "counterfactual-routing": Section(60, {"routes": 4}),
    "expert-tracing": Section(60),
    "generated-answers": Section(60, {"group": "strings", "doses": "0", "max_new_tokens": 96}),
    "instruction-hierarchy": Section(15, {"words": "b,d,f,h,k,m,p,t,v,x", "max_new_tokens": 12}),
    "sentence-importance": Section(60, {"conversations": 3, "samples": 20, "max_new_tokens": 100}),
    "circuits": Section(240, {"max_nodes": 100}),  # so that a task has several prompts
    "jacobian-lens": Section(60, {"by": "channel", "batch": 128, "skip_first": 8, "tuned_steps": 50}),
    "label-probes": Section(0, {"label": "task", "where": "channel=final"}),
    "probe-trajectory": Section(0, {"label": "domain"}),
    "neuron-examples": Section(0),
}
# Figures of docs/gallery.md: docs/pictures/gallery-STUDY.svg shows this figure of the study's results.
PICTURES = {
    "counterfactual-routing": "routes",
    "expert-tracing": "experts",
    "generated-answers": "answers_correct",
    "instruction-hierarchy": "conflicts",
    "jacobian-lens": "lenses_analysis",
    "label-probes": "probes_auc",
    "probe-trajectory": "trajectory",
    "receiver-heads": "heads",
    "risk-difference": "experts_prompt_and_token",
    "router-prediction": "recall_recall",
    "sentence-importance": "conversation_2",
    "sink-difference": "heads_prompt_and_token",
    "super-experts": "experts_output",
}
# Those of studies that need no model are made for the picture: of the run, or (True) of the run with activations.
STUDIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "label-probes": (True, {"label": "effort", "where": "channel=final"}),
    "risk-difference": (False, {"a": "channel=final", "b": "channel=analysis"}),
    "router-prediction": (True, {"hook": "hook_resid_post"}),
    "sink-difference": (False, {"a": "role=developer", "b": "role=user"}),
}


def main() -> None:
    """Make the missing results, and the report of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/findings"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="make these, and no report")
    parser.add_argument("--report", action="store_true", help="make no result, only the report")
    parser.add_argument("--pictures", nargs="*", choices=list(PICTURES), help="draw these figures (default: all)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.pictures is not None:
        pictures(arguments.out, arguments.pictures or list(PICTURES))
        return
    if not arguments.report:
        make(arguments.out, arguments.only or list(SECTIONS))
    if not arguments.only:
        report(arguments.out)


def make(out: Path, names: list[str]) -> None:
    """Make the results of these names that are not there with the same options."""
    run, model = wb.open_run(RUN), wb.load("nano", dtype=torch.float32)
    for name in names:
        section, options = SECTIONS[name], dict(SECTIONS[name].options)
        done = out / f"{name}.done.json"
        stated = json.dumps({"sequences": section.sequences, **options, "run": run.digest})
        if done.is_file() and done.read_text() == stated:
            continue
        begun, study = time.monotonic(), section.study or name
        if section.sequences:
            if name == "sentence-importance":
                options["store"] = str(out / "branches.jsonl")
            results = run_experiment(study, model, run, sequences=section.sequences, **options)
        else:
            results = run_study(study, with_activations(out, model, run), **options)
        suffix = name.removeprefix(study).replace("-", "_")
        save({f"{key}{suffix}": result for key, result in results.items()}, out, overwrite=True)
        done.write_text(stated)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def with_activations(out: Path, model: Any, run: Any) -> Any:
    """Return a run of the same transcripts that also recorded activations, captured if it is not there."""
    path, rows = out / "activations.zarr", out / "transcripts.jsonl"
    if not rows.is_file():
        write_transcripts(rows, transcripts(run))
    return wb.capture(model, rows, path, record=RECORD)


def report(out: Path) -> None:
    """Write the report of the run with all results, and copy its Markdown to data/findings.md."""
    results = load(out)
    if missing := [name for name in SECTIONS if not (out / f"{name}.done.json").is_file()]:
        print(f"without {', '.join(missing)}: they have no results in {out}", file=sys.stderr)
    studies = dict.fromkeys(section.study or name for name, section in SECTIONS.items())
    ordered = {study: results[study] for study in studies if study in results}
    target = out / "findings.html"
    write_report(wb.open_run(RUN), target, results=ordered, overwrite=True)
    shutil.copyfile(target.with_suffix(".md"), FINDINGS)
    print(FINDINGS)


def pictures(out: Path, names: list[str]) -> None:
    """Write docs/pictures/gallery-STUDY.svg from the results, of studies without a model from new ones."""
    run, results, items = wb.open_run(RUN), load(out), {}
    for name in names:
        if name in STUDIES:
            recorded, options = STUDIES[name]
            chosen = with_activations(out, wb.load("nano", dtype=torch.float32), run) if recorded else run
            results[name] = run_study(name, chosen, **options)
        print(next(iter(results[name].values())).attrs["summary"], flush=True)
        items[f"gallery-{name}"] = registry.find(name).load_figures().gallery(results[name])[PICTURES[name]]
    with tempfile.TemporaryDirectory() as folder:
        written = write_gallery(items, folder, ["svg"], overwrite=True)
        for path in (path for path in written if path.suffix == ".svg"):
            print(shutil.copyfile(path, ROOT / "docs" / "pictures" / path.name).relative_to(ROOT))


if __name__ == "__main__":
    main()
