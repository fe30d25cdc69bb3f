"""The command line. Every command imports what it needs when it runs, so that `--help` is quick.

Exit codes: 0 done, 1 the job failed, 2 wrong usage or refused input.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from workbench.bench.command import app as bench
from workbench.cli_studies import StudyCommand
from workbench.errors import InputError, JobError

app = typer.Typer(
    help="Look inside gpt-oss: generate, capture, study, see.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="A checkpoint folder, 'nano', or a hub id such as openai/gpt-oss-20b.")]
RunPath = Annotated[str, typer.Argument(help="A run written by `workbench capture`: a folder, or a URL as s3://….")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, cuda:0, or several as in cuda:0,cuda:1.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, or float32 for all arithmetic in float32.")]


Record = Annotated[
    list[str] | None,
    typer.Option(
        help="routing, router_logits, sinks, sink_sums, logprobs, or a hook point, as in resid_post:3,7; see `workbench capture`. "
        "[default: routing, sinks, logprobs]"
    ),
]
UnitTokens = Annotated[int, typer.Option(help="Tokens of one unit of work and commit.")]


def _dtype(name: str) -> Any:
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in dtypes:
        raise InputError(f"--dtype {name!r}: choose one of {', '.join(dtypes)}")
    return dtypes[name]


def _load(model: str, device: str, dtype: str) -> Any:
    from workbench.model import load

    return load(model, device=device, dtype=_dtype(dtype))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="As everywhere; or 20b, 120b: the published shapes without weights.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a forward pass, and of a row. [default: 4096, or the context]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows generated together.")] = 1,
    memory: Annotated[str, typer.Option(help="Of one GPU, as in 80GB or 24GiB.")] = "80GB",
    record: Record = None,
    unit_tokens: UnitTokens = 16_384,
    dtype: Dtype = "bfloat16",
) -> None:
    """Sizes, a plan of the memory and what fits, and the hook points of a model, without loading it."""
    from workbench.capture import recording
    from workbench.capture.compute import FORWARD_TOKENS, LOGIT_ROWS
    from workbench.model.info import Plan, describe, subject
    from workbench.model.memory import parse

    about = subject(model)
    spec = recording.parse(record or recording.DEFAULT, about.cfg)
    plan = Plan(
        tokens=tokens or min(FORWARD_TOKENS, about.cfg.n_ctx), batch=batch, room=parse(memory), recorded=recording.wanted(spec, about.cfg),
        predictions=LOGIT_ROWS if spec.logprobs else 0, unit_tokens=unit_tokens, dtype=_dtype(dtype),
    )  # fmt: skip
    describe(about, plan)


@app.command()
def random(
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write.")],
    size: Annotated[str, typer.Option(help="Whose shape: 20b or 120b.")] = "20b",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer or more layers. [default: as published]")] = None,
    vocab: Annotated[int | None, typer.Option(min=72, help="A smaller vocabulary. [default: as published]")] = None,
    seed: int = 0,
) -> None:
    """Write a checkpoint of random weights in a published shape, for tests and timings."""
    from dataclasses import replace

    from workbench.model.config import PUBLISHED
    from workbench.model.export import save_random

    if size not in PUBLISHED:
        raise InputError(f"--size {size!r}: choose one of {', '.join(PUBLISHED)}")
    cfg = PUBLISHED[size]
    n_layers = layers or cfg.n_layers
    windows = tuple(cfg.windows[layer % 2] for layer in range(n_layers))
    save_random(out, replace(cfg, n_layers=n_layers, windows=windows, d_vocab=vocab or cfg.d_vocab), seed=seed)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="JSONL: id, messages, answer?, meta?")],
    out: Annotated[Path, typer.Argument(help="JSONL of transcripts to write.")],
    effort: Annotated[
        list[str] | None, typer.Option(help="low, medium, high; repeat for several. [default: all three]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Transcripts a prompt and effort.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Answer prompts at one or several reasoning efforts."""
    from workbench.capture.generation import generate_transcripts

    loaded = _load(model, device, dtype)
    generate_transcripts(
        loaded, prompts, out, efforts=effort or ["low", "medium", "high"], samples=samples, temperature=temperature,
        seed=seed, max_new_tokens=max_new_tokens, batch=batch, overwrite=overwrite,
    )  # fmt: skip


@app.command()
def transcripts(
    url: Annotated[str, typer.Argument(help="The host's address, as in http://localhost:8000/v1")],
    prompts: Annotated[Path, typer.Argument(help="JSONL: id, messages, answer?, meta?")],
    out: Annotated[Path, typer.Argument(help="JSONL of transcripts to write, or to go on with.")],
    model: Annotated[str, typer.Option(help="The model's name at the host.")],
    effort: Annotated[
        list[str] | None, typer.Option(help="low, medium, high; repeat for several. [default: all three]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Transcripts a prompt and effort.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="[default: the host's]")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer. [default: the host's]")] = None,
    api: Annotated[str, typer.Option(help="auto, chat, responses, completions, or vLLM's generate.")] = "auto",
    routing: Annotated[
        bool, typer.Option("--routing", help="Ask for routed experts and store them beside OUT.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(min=0.01, help="At most. [default: no limit]")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 600,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that fails.")] = 6,
    key_env: Annotated[str, typer.Option(help="Environment variable with the key; it is stored nowhere.")] = (
        "OPENAI_API_KEY"
    ),
    body: Annotated[
        str, typer.Option(help="JSON of more fields for each request; {effort} becomes the effort.")
    ] = "{}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Checkpoint folder whose vocabulary completions use. [default: o200k_harmony]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin OUT anew.")] = False,
) -> None:
    """Answers of a model at any OpenAI-compatible host, as transcripts. The same command again asks what is missing."""
    import json

    from workbench.harmony.hosts.collect import Settings, collect

    try:
        more = json.loads(body)
    except ValueError as error:
        raise InputError(f"--body is not JSON: {error}") from error
    if not isinstance(more, dict):
        raise InputError("--body: wanted a JSON object")
    settings = Settings(
        model, tuple(dict.fromkeys(effort or ("low", "medium", "high"))), samples, temperature, max_tokens, api, concurrency,
        requests_per_minute, timeout, retries, key_env, more, tokenizer, routing,
    )  # fmt: skip
    collect(url, prompts, out, settings, overwrite=overwrite)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A file or folder of conversations; its shape is recognized.")],
    out: Annotated[Path, typer.Argument(help="JSONL of transcripts to write.")],
    effort: Annotated[str | None, typer.Option(help="Of conversations that name none.")] = None,
    requests: Annotated[Path | None, typer.Option(help="Request file of an OpenAI batch, for its responses.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Convert conversations that other programs stored to transcripts.

    Readable are OpenAI chat and Responses logs and batches, vLLM outputs, Inspect logs, Ollama, ShareGPT, TRL,
    simple-evals, lm-eval and openai_harmony files; as JSON, JSON Lines, Parquet or a saved dataset, packed or not.
    """
    from workbench.harmony.hosts.files import convert as read
    from workbench.harmony.hosts.files import counts
    from workbench.harmony.transcripts import write_rows

    kind, rows, left_out = read(file, effort=effort, requests=requests)
    for why in left_out[:20]:
        print(f"left out, {why}", file=sys.stderr)
    if not rows:
        raise InputError(f"{file}: {kind} without a conversation that can be used")
    write_rows(out, rows, overwrite=overwrite)
    parts = [f"{len(rows):,} conversations", counts(rows), f"{len(left_out):,} left out" if left_out else ""]
    print(f"{file}: {kind}, " + ", ".join(filter(None, parts)))


@app.command()
def capture(
    model: Model,
    transcripts: Annotated[Path, typer.Argument(help="JSONL of transcripts.")],
    run: Annotated[str, typer.Argument(help="The run to write, or to go on with: a folder, or a URL as s3://….")],
    record: Record = None,
    unit_tokens: UnitTokens = 16_384,
    strict: Annotated[bool, typer.Option(help="Refuse the file if any row is unusable.")] = False,
    exclude: Annotated[
        str | None, typer.Option(help="Leave sequences with these flags out, as in irregular,truncated.")
    ] = None,
    routing: Annotated[
        str, typer.Option(help="own, or host: force the experts that the host chose (`transcripts --routing`).")
    ] = "own",
    workers: Annotated[int, typer.Option(help="Processes of this machine that share the units.")] = 1,
    dask: Annotated[str | None, typer.Option(help="Address of a Dask scheduler whose workers share them.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")] = False,
    log: Annotated[Path | None, typer.Option(help="Log file. [default: RUN.log]")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT folder with a LoRA for the model.")] = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Record a model over transcripts into a run. The same command again goes on where it stopped.

    --record takes routing, router_logits, sinks (sink_sums: only their sums), logprobs, or a hook point: "resid_post:3,7", with which heads
    ("attn.z:5 index=0,12"), which tokens ("resid_post channel=analysis every=4"; role, channel, part, message,
    position, every, last) and reduced how ("resid_post reduce=message", "mlp_out reduce=moments sketch=64").
    """
    from workbench.capture import cluster, estimate, job, recording
    from workbench.model import load

    if workers < 1:
        raise InputError(f"--workers {workers}: at least one has to work")
    # Workers load the model themselves: a copy in this process would take the memory that the first of them needs.
    shared = (workers > 1 or dask is not None) and not dry_run
    worker_device = cluster.worker_device(device) if shared else None
    loaded = load(model, device="meta" if shared else device, dtype=_dtype(dtype), adapter=adapter)
    records = record or list(recording.DEFAULT)
    if dry_run:
        plan = job.dry_run(
            loaded,
            transcripts,
            run,
            record=records,
            unit_tokens=unit_tokens,
            strict=strict,
            exclude=exclude,
            routing=routing,
        )
        estimate.show(plan, run)
        estimate.refuse_what_cannot_fit(plan, run)
        return
    written = job.capture(
        loaded, transcripts, run, record=records, unit_tokens=unit_tokens, strict=strict, exclude=exclude, routing=routing,
        workers=workers, dask=dask, log_file=log, worker_device=worker_device,
    )  # fmt: skip
    rejects = written.provenance["rejects"]
    print(f"{run}: {len(written.sequences):,} sequences" + (f", {len(rejects)} rows skipped" if rejects else ""))


@app.command()
def verify(
    run: RunPath,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Units checked side by side. [default: the cores, at most 8]")
    ] = None,
) -> None:
    """Check every promise of a run; says what is damaged and exits with 1 if anything is."""
    from workbench.runs.verify import verify as check

    problems = check(run, workers=workers)
    for problem in problems:
        print(f"{problem.where}: {problem.what}")
    print(f"{run}: {len(problems)} problems" if problems else f"{run}: whole")
    raise typer.Exit(1 if problems else 0)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="File (parquet) or folder to write.")],
    format: Annotated[str, typer.Option(help="parquet, safetensors, or datasets (Hugging Face, as SAELens reads).")],
    what: Annotated[str, typer.Option(help="tokens, or an activation as activations/resid_post.")] = "tokens",
    layers: Annotated[list[int] | None, typer.Option(help="Of an activation; repeat. [default: all recorded]")] = None,
    channel: Annotated[list[str] | None, typer.Option(help="Only these tokens; repeat.")] = None,
    role: Annotated[list[str] | None, typer.Option(help="Only these tokens; repeat.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only these tokens, such as content; repeat.")] = None,
    effort: Annotated[list[str] | None, typer.Option(help="Only these sequences; repeat.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only these sequences; repeat.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a row of activations in a dataset.")] = 128,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """A selection of a run for other programs."""
    from workbench.runs import open_run
    from workbench.runs.export import Selection
    from workbench.runs.export import export as write

    chosen = [tuple(names or ()) for names in (channel, role, part, effort, task)]
    n = write(
        open_run(run), out, format=format, what=what, layers=layers or (), context=context,
        selection=Selection(*chosen), overwrite=overwrite,
    )  # fmt: skip
    print(f"{out}: {n:,} tokens")


@app.command(cls=StudyCommand)
def study(
    name: Annotated[str, typer.Argument(help="Name of the study or experiment; see the list below.")],
    run: RunPath,
    other: Annotated[str | None, typer.Argument(help="The second run, for a study that compares two.")] = None,
    model: Annotated[str | None, typer.Option(help="The captured checkpoint, which experiments need.")] = None,
    sequences: Annotated[int, typer.Option(min=2, help="Use at most so many sequences in an experiment.")] = 200,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of an option of the study; repeat for several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of resampling and of random controls.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the tables (CSV, JSON) and the summary to this folder.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
) -> None:
    """Run a study or an experiment: print its summary and write its tables."""
    from workbench.cli_studies import parse_options
    from workbench.registry import Experiment, find
    from workbench.runs import open_run
    from workbench.studies import run_study, save
    from workbench.studies import summary as summarize

    record, options = find(name), parse_options(option or ())
    if isinstance(record, Experiment) and model is None:
        raise InputError(f"the experiment {record.name} needs the model: add --model with the captured checkpoint")
    if isinstance(record, Experiment) and other is not None:
        raise InputError(f"the experiment {record.name} takes one run, and {other!r} is a second")
    runs = [open_run(path) for path in (run, other) if path is not None]
    if model is not None and isinstance(record, Experiment):
        from workbench.experiments.registry import run_experiment

        loaded = _load(model, device, dtype)
        results = run_experiment(name, loaded, runs[0], sequences=sequences, seed=seed, **options)
    else:
        results = run_study(name, *runs, seed=seed, **options)
    if out is not None:
        save(results, out)
    print(summarize(results))


@app.command()
def summary(run: RunPath) -> None:
    """What a run is and says, as tables in the terminal."""
    from rich.console import Console

    from workbench.dashboards.terminal import summary as tables
    from workbench.runs import open_run

    Console().print(tables(open_run(run)))


@app.command()
def report(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The page to write; its Markdown comes beside it.")] = Path("report.html"),
    results: Annotated[
        Path | None, typer.Option(help="Folder of experiments' results (`workbench study … --out`) to tell of too.")
    ] = None,
    seed: int = 0,
) -> None:
    """What all studies say of a run, in one self-contained page."""
    from workbench.figures.report import write_report
    from workbench.runs import open_run
    from workbench.studies.result import load

    for path in write_report(open_run(run), out, results=None if results is None else load(results), seed=seed):
        print(path)


@app.command()
def figures(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    format: Annotated[list[str] | None, typer.Option(help="svg, pdf, png, html; repeat. [default: all]")] = None,
    column: Annotated[str, typer.Option(help="screen, single (89 mm) or double (183 mm).")] = "screen",
    which: Annotated[str, typer.Option("--set", help="all, main (for the text) or supplement.")] = "all",
) -> None:
    """Every figure of a run, each with its numbers (CSV), caption and provenance."""
    from workbench.figures.export import FORMATS, write_all
    from workbench.runs import open_run

    formats = tuple(format or FORMATS)
    for path in write_all(open_run(run), out, formats, column=cast(Any, column), which=cast(Any, which)):
        print(path)


@app.command()
def dashboard(
    runs: Annotated[list[str], typer.Argument(help="Runs to show.")],
    port: int = 5006,
    address: Annotated[
        str, typer.Option(help="Where to listen; anything but localhost is open to others.")
    ] = "localhost",
    show: Annotated[bool, typer.Option(help="Open a browser.")] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT whose pages may connect too, as of a proxy; repeat.")
    ] = None,
    basic_auth: Annotated[Path | None, typer.Option(help="JSON file of names and passwords that may enter.")] = None,
) -> None:
    """Serve the dashboard of one or several runs."""
    from workbench.dashboards.app import serve

    serve(runs, port=port, address=address, show=show, allow_origin=allow_origin or (), basic_auth=basic_auth)


# what an extra brings that a command cannot do without
_EXTRAS = {"panel": "dashboard", "kaleido": "figures", "distributed": "cluster", "s3fs": "s3", "playwright": "dev"}


def main() -> None:
    """Entry point: one line for what the user can mend, a traceback for what we must."""
    try:
        app()
    except InputError as error:
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        print(f"workbench: {error.name} is not installed: pip install 'gpt-oss-workbench[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except (JobError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `workbench … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("workbench: interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
