"""Commands from prompts to runs: generate and collect conversations, capture, verify and export."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.control_characters import visible
from workbench.cli.damage import names_damage
from workbench.cli.options import (
    Adapter,
    Device,
    Dtype,
    Efforts,
    Exclude,
    IgnoreField,
    Model,
    Overwrite,
    Prompts,
    Record,
    RunPath,
    Samples,
    Seed,
    TokensPerSecond,
    UnitTokens,
    load_model,
    torch_dtype,
)
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.memory import MODEL_BYTES, refuse_small_limit

app = typer.Typer()


@app.command()
def generate(
    model: Model,
    prompts: Prompts,
    out: Annotated[Path, typer.Argument(help="JSON Lines file of transcripts to write or to resume.")],
    effort: Efforts = None,
    samples: Samples = 1,
    temperature: Annotated[float, typer.Option(min=0, max=1e6, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among this many most probable tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample among the most probable tokens that together have this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Sample among tokens of at least this probability, relative to the most probable."
        ),
    ] = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Generate at most this many tokens.")] = 512,
    batch: Annotated[int, typer.Option(min=1, max=10**6, help="Prompts generated together.")] = 64,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
    overwrite: Overwrite = False,
) -> None:
    """Generate answers to prompts at one or several reasoning efforts. Rerun the command to resume."""
    refuse_small_limit(MODEL_BYTES)
    from workbench.capture.generation import generate_transcripts

    loaded = load_model(model, device, dtype, ignore_field, adapter)
    generate_transcripts(
        loaded,
        prompts,
        out,
        efforts=effort or ["low", "medium", "high"],
        samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch=batch,
        overwrite=overwrite,
    )


@app.command()
def transcripts(
    url: Annotated[str, typer.Argument(help="Base URL of the API, such as http://localhost:8000/v1")],
    prompts: Prompts,
    out: Annotated[Path, typer.Argument(help="JSON Lines file of transcripts to write or to resume.")],
    model: Annotated[str, typer.Option(help="Name of the model at the API.")],
    effort: Efforts = None,
    samples: Samples = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Sampling temperature. (default: the API's)")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Limit of the tokens of a response. (default: the API's)")
    ] = None,
    api: Annotated[str, typer.Option(help="auto, chat, responses, completions, or vLLM's generate.")] = "auto",
    routing: Annotated[
        bool, typer.Option("--routing", help="Request the routed experts and store them next to OUT.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Concurrent requests.")] = 8,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.01, max=1e9, help="Rate limit. (default: none)")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, max=1e6, help="Timeout of a request in seconds.")] = 600,
    retries: Annotated[int, typer.Option(min=0, max=1000, help="Retries of a failed request.")] = 6,
    key_env: Annotated[str, typer.Option(help="Environment variable with the key; it is stored nowhere.")] = (
        "OPENAI_API_KEY"
    ),
    body: Annotated[
        str, typer.Option(help="JSON object of further request fields; {effort} is replaced by the effort.")
    ] = "{}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Checkpoint folder whose vocabulary completions use. (default: o200k_harmony)")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Collect model responses from an OpenAI-compatible API. Rerun the command to resume."""
    from workbench.bounded_json import parse_json
    from workbench.harmony.hosts.collect import Settings, collect

    try:
        more = parse_json(body)
    except InputError as error:
        raise InputError(f"--body: {error}") from error
    if not isinstance(more, dict):
        raise InputError("--body: expected a JSON object")
    settings = Settings(
        model,
        tuple(dict.fromkeys(effort or ("low", "medium", "high"))),
        samples,
        temperature,
        max_tokens,
        api,
        concurrency,
        requests_per_minute,
        timeout,
        retries,
        key_env,
        more,
        tokenizer,
        routing,
    )
    collect(url, prompts, out, settings, overwrite=overwrite)


@app.command()
def convert(
    file: Annotated[
        Path, typer.Argument(help="A file or folder of conversations; its format is recognized by its content.")
    ],
    out: Annotated[Path, typer.Argument(help="JSONL of transcripts to write.")],
    effort: Annotated[str | None, typer.Option(help="Reasoning effort of conversations that name none.")] = None,
    requests: Annotated[Path | None, typer.Option(help="Request file of an OpenAI batch, for its responses.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of a field of rows that are not recognized, such as response=result.text; repeat for "
            "several. Names: messages, or prompt and response, or text; and reasoning, system, id, prompt_id, effort, "
            "expected, correct, finish_reason."
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="Path of the list in each object whose entries are the rows.")] = "",
    role: Annotated[
        list[str] | None,
        typer.Option(help="A role in the rows and harmony's role for it, such as bot=assistant; repeat for several."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert conversations that other programs stored to transcripts.

    It reads OpenAI chat and Responses logs and batches, vLLM outputs, Inspect logs, and files of Ollama, ShareGPT, TRL,
    simple-evals, lm-eval and openai_harmony, as JSON, JSON Lines, Parquet or a saved dataset, compressed or not. Of any
    other file, name the fields with --field.
    """
    from workbench.harmony.formats.field_mapping import FieldMapping, parse_pairs
    from workbench.harmony.hosts.files import convert as read
    from workbench.harmony.hosts.files import counts
    from workbench.harmony.transcripts import write_rows
    from workbench.outputs import check_output
    from workbench.row_output import written_by

    inputs = [file, *([requests] if requests is not None else [])]
    check_output(out, command="convert", inputs=inputs, overwrite=overwrite, owned=written_by("convert"))
    mapping = FieldMapping(parse_pairs("--field", field or []), rows, parse_pairs("--role", role or []))
    kind, conversations, left_out = read(file, effort=effort, requests=requests, mapping=mapping)
    for why in left_out[:20]:
        print(f"left out, {visible(why)}", file=sys.stderr)
    if not conversations:
        raise InputError(f"{file}: {kind} without a conversation that can be used")
    write_rows(out, conversations, overwrite=overwrite, command="convert", inputs=inputs)
    parts = [
        f"{count_of(len(conversations), 'conversation')}",
        counts(conversations),
        f"{len(left_out):,} left out" if left_out else "",
    ]
    print(f"{file}: {kind}, " + ", ".join(filter(None, parts)))


@app.command()
@names_damage
def capture(
    model: Model,
    transcripts: Annotated[Path, typer.Argument(help="JSONL of transcripts.")],
    run: Annotated[str, typer.Argument(help="Run to write or to resume: a folder, or a URL such as s3://….")],
    record: Record = None,
    unit_tokens: UnitTokens = 16_384,
    strict: Annotated[bool, typer.Option(help="Refuse the file if any row is invalid.")] = False,
    exclude: Exclude = None,
    routing: Annotated[
        str, typer.Option(help="own, or host: force the experts that the host chose (`transcripts --routing`).")
    ] = "own",
    workers: Annotated[int, typer.Option(max=1024, help="Processes on this machine that compute the units.")] = 1,
    dask: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers compute the units.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Estimate memory, disk and time, and write nothing; 20b, 120b need no weights for it."
        ),
    ] = False,
    tokens_per_second: TokensPerSecond = None,
    log: Annotated[Path | None, typer.Option(help="Log file. (default: RUN.log)")] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
    overwrite: Overwrite = False,
) -> None:
    """Record activations of a model on transcripts into a run. Rerun the command to resume.

    --record takes routing, router_logits, sinks (sink_sums: only their sums), logprobs, examples (tokens of each
    expert), neurons (tokens of each neuron; "neurons:3,7" in these layers), features:FOLDER (tokens of each feature of
    the autoencoder there), a hook point such as resid_post, or FILE.py:NAME of a wb.Recorder, whose file is executed.
    Options after it select: "resid_post:0-3", "router_logits
    layers=0-3 channel=final", "sinks heads=0,12 role=assistant", "attn.z:5 heads=0 every=4" (also experts, slots,
    part, message, position, last), and reduce: "mlp_out reduce=norm" (raw, norm, mean, moments, message;
    "reduce=moments sketch=64"). See docs/howto/record.md.
    """
    refuse_small_limit(MODEL_BYTES)
    from workbench.capture import job, recording

    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    # Workers load the model themselves: a copy in this process would take the memory that the first of them needs.
    shared = (workers > 1 or dask is not None) and not dry_run
    worker_device = _worker_device(device) if shared else None
    loaded = _model_of_capture(model, "meta" if shared else device, dtype, adapter, ignore_field, dry_run=dry_run)
    options: dict[str, Any] = {
        "record": record or list(recording.DEFAULT),
        "unit_tokens": unit_tokens,
        "strict": strict,
        "exclude": exclude,
        "routing": routing,
    }
    if dry_run:
        _show_plan(loaded, transcripts, run, tokens_per_second=tokens_per_second, **options)
        return
    written = job.capture(
        loaded,
        transcripts,
        run,
        **options,
        workers=workers,
        dask=dask,
        log_file=log,
        worker_device=worker_device,
        overwrite=overwrite,
    )
    rejects = written.provenance["rejects"]
    print(
        f"{run}: {count_of(len(written.sequences), 'sequence')}"
        + (f", {count_of(len(rejects), 'row')} skipped" if rejects else "")
    )


def _worker_device(device: str) -> str:
    from workbench.capture import cluster

    return cluster.worker_device(device)


def _model_of_capture(
    model: str, device: str, dtype: str, adapter: Path | None, ignore_field: list[str] | None, *, dry_run: bool
) -> Any:
    """Return the model to capture, or for a plan of a published model its shape alone.

    Raises:
        InputError: the model is a shape without weights, and more than a plan is asked for.
    """
    from workbench.capture.shape_model import ShapeModel, published_name
    from workbench.model import load

    size = published_name(model)
    if size is not None and dry_run:
        return ShapeModel.published(size)
    if size is not None and "/" not in model:
        raise InputError(
            f"{model} is a shape without weights: add --dry-run to plan the capture, or use openai/gpt-oss-{size}"
        )
    ignored = ignore_field or ()
    return load(model, device=device, dtype=torch_dtype(dtype), adapter=adapter, ignore_fields=ignored)


def _show_plan(model: Any, transcripts: Path, run: str, **options: Any) -> None:
    """Print the plan of a capture; end with an error if the disk or the memory cannot hold it."""
    from workbench.capture import estimate, job
    from workbench.capture.shape_model import ShapeModel

    plan = job.dry_run(model, transcripts, run, **options)
    without = f", {model.checkpoint.path} without weights" if isinstance(model, ShapeModel) else ""
    estimate.show(plan, f"Capture into {run}{without}")
    estimate.refuse_what_cannot_fit(plan, run)


@app.command()
def verify(
    run: RunPath,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Units checked in parallel. (default: the cores, at most 8)")
    ] = None,
    add_checksums: Annotated[
        bool,
        typer.Option("--add-checksums", help="Add checksums to a run of schema 1 or 2 that has none, if it is valid."),
    ] = False,
) -> None:
    """Validate a run and list damaged arrays; exit with 1 if there are any."""
    from workbench.harmony.flags import counted_in
    from workbench.runs import checksums
    from workbench.runs.group import open_group
    from workbench.runs.reader import Run
    from workbench.runs.storage import storage_at
    from workbench.runs.verify import other_content
    from workbench.runs.verify import verify as check

    if not storage_at(run).exists():
        raise InputError(f"{run} does not exist: give the folder of a run")
    if add_checksums:
        print(f"{run}: checksums of {count_of(checksums.add_checksums(run), 'file')} added")
    problems = check(run, workers=workers)
    for problem in problems:
        print(f"{problem.where}: {problem.what}")
    if problems:
        print(f"{run}: {count_of(len(problems), 'problem')}")
        raise typer.Exit(1)
    opened = Run(storage_at(run), open_group(storage_at(run)))
    done, total = opened.progress
    unfinished = (
        f", but not finished: {done} of {count_of(total, 'unit')}; rerun the capture to resume" if done < total else ""
    )
    print(f"{run}: valid{unfinished}")
    if opened.manifest is None:
        print(
            f"{run}: no checksums (schema {opened.attrs['schema']}), only values that depend on each other were "
            "compared; add them with --add-checksums"
        )
    if flags := counted_in(opened.sequences):
        print(f"{run}: {flags}")
    if others := other_content(opened):
        print(f"{run}: not of this run, left alone: {', '.join(others)}")


@app.command()
@names_damage
def export(
    run: RunPath,
    target: Annotated[str, typer.Argument(help="File or folder to write; with --out, the format.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="parquet (a file), safetensors, datasets (Hugging Face, as SAELens reads), or neuronpedia (feature "
            "JSON of each expert)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File or folder to write; TARGET is then the format.")] = None,
    what: Annotated[str, typer.Option(help="tokens, or an activation as activations/resid_post.")] = "tokens",
    layers: Annotated[
        list[int] | None, typer.Option(help="Layers of an activation; repeat for several. (default: all recorded)")
    ] = None,
    channel: Annotated[list[str] | None, typer.Option(help="Export only these tokens; repeat for several.")] = None,
    role: Annotated[list[str] | None, typer.Option(help="Export only these tokens; repeat for several.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Export only these parts of messages, such as content; repeat for several.")
    ] = None,
    effort: Annotated[list[str] | None, typer.Option(help="Export only these sequences; repeat for several.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Export only these sequences; repeat for several.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in a row of a dataset of activations.")] = 128,
    model: Annotated[
        str | None, typer.Option(help="neuronpedia: the run's model, for the logits that experts raise and lower.")
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=1, help="neuronpedia: sequences over which those logits are averaged.")
    ] = 50,
    neurons: Annotated[
        list[str] | None,
        typer.Option(help="neuronpedia: also pages of the neurons of an expert, LAYER.EXPERT; repeat for several."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="neuronpedia: also pages of these features of the recorded autoencoder, as 12,77."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a selection of a run for other programs: `export RUN FORMAT --out PATH`, or `export RUN PATH --format`.

    neuronpedia writes a page for each expert with its examples, as NUMBER.json, for a graph's --features. --neurons
    adds those of single neurons, from a run that was captured with --record neurons; --features those of features of an
    autoencoder, from one that was captured with --record features:FOLDER.
    """
    from workbench.runs import open_run
    from workbench.runs.export import Selection
    from workbench.runs.export import export as write

    if (out is None) == (format is None):
        raise InputError("give a format and --out PATH, or a path and --format: see `workbench export --help`")
    format, out = (target, out) if out is not None else (str(format), Path(target))
    if format == "neuronpedia":
        refused = {"--what": what != "tokens", "--layers": layers, "--channel": channel, "--role": role}
        refused |= {"--part": part, "--effort": effort, "--task": task}
        if wrong := [name for name, given in refused.items() if given]:
            raise InputError(f"{wrong[0]} is not an option of this format: its pages describe the complete run")
        from workbench.cli import page_export

        experts = page_export.experts_of(neurons or [])
        return page_export.write(run, out, model, sequences, experts, features, overwrite)
    for name, given in {"--model": model, "--neurons": neurons, "--features": features}.items():
        if given:
            raise InputError(f"{name} is for the format neuronpedia")
    chosen = [tuple(names or ()) for names in (channel, role, part, effort, task)]
    n = write(
        open_run(run),
        out,
        format=format,
        what=what,
        layers=layers or (),
        context=context,
        selection=Selection(*chosen),
        overwrite=overwrite,
    )
    print(f"{out}: {count_of(n, 'token')}")
