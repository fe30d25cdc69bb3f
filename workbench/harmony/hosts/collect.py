"""Send prompts to an OpenAI-compatible API and append each response to a file of transcripts as it arrives.

Rerunning the call requests only the responses that are missing.
"""

import queue as queues
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.counting import count_of
from workbench.errors import InputError, JobError
from workbench.harmony.flags import counted, flags_of_row, sequence_flags
from workbench.harmony.hosts import answers, routing
from workbench.harmony.hosts.asker import Asker
from workbench.harmony.hosts.client import Host, HostError
from workbench.harmony.hosts.settings import COMMAND, Job, Settings, request_digest, request_fields
from workbench.harmony.labels import label
from workbench.harmony.messages import shown
from workbench.harmony.transcripts import read_prompts
from workbench.harmony.vocabulary import tokenizer
from workbench.progress import progress
from workbench.row_output import KEY, RowOutput, is_stamped
from workbench.signals import StopSignal

__all__ = ["Settings", "collect"]

_POLL_S = 0.25  # how often a waiting job looks for a signal


def collect(url: str, prompts: str | Path, out: str | Path, settings: Settings, *, overwrite: bool = False) -> None:
    """Send every prompt at every effort to the host at `url` and append a transcript row to `out` for each response.

    Raises:
        InputError: a setting or a prompt is invalid, or `out` is another job's or another command's.
        JobError: some responses are missing, or SIGINT or SIGTERM stopped the job; the rows written are kept.
    """
    settings.check()
    asked = read_prompts(prompts)
    jobs = [Job(p, e, s) for p in asked for e in settings.efforts for s in range(settings.samples)]
    host = Host(
        url,
        key_env=settings.key_env,
        timeout=settings.timeout,
        retries=settings.retries,
        per_minute=settings.per_minute,
        threads=settings.concurrency,
    )
    try:
        with (
            RowOutput(out, command=COMMAND, inputs=[prompts], overwrite=overwrite, is_own=_is_own) as rows,
            StopSignal(str(out)) as interrupt,
        ):
            _refuse_other_requests(out, rows.known, jobs, settings)
            left = [job for job in jobs if job.id not in rows.known]
            _collect(host, left, rows, settings, interrupt)
            rows.finish(job.id for job in jobs)
    finally:
        host.close()


def _is_own(row: Mapping[str, Any]) -> bool:
    """Return whether this command wrote a row; before 0.8 rows were not stamped."""
    meta = row.get("meta")
    return is_stamped(row, COMMAND) or (isinstance(meta, dict) and {"host", "request"} <= meta.keys())


def _refuse_other_requests(
    out: str | Path, known: Mapping[str, Mapping[str, Any]], jobs: Sequence[Job], settings: Settings
) -> None:
    """Check that every row that is there answers a request of this job.

    Raises:
        InputError: one does not; the message names what differs.
    """
    by_id = {job.id: job for job in jobs}
    for id, row in known.items():
        meta = row["meta"]
        if id not in by_id:
            raise InputError(
                f"{out} holds {id!r}, which does not belong to this job: choose another file, or --overwrite"
            )
        if meta.get("request") == request_digest(by_id[id], settings):
            continue
        begun = meta.get(KEY) or {"model": meta.get("model")}
        now = request_fields(by_id[id], settings)
        names = {*begun, *now} & ({*now, "tokenizer"} if KEY in meta else {*begun} & {*now})
        other = [
            f"{name} {shown(begun.get(name))}, now {shown(now.get(name))}"
            for name in sorted(names)
            if begun.get(name) != now.get(name)
        ]
        raise InputError(
            f"{out} holds {id!r} of another request ({'; '.join(other) or 'its prompt or settings differ'}): "
            "choose another file, or --overwrite"
        )


def _collect(host: Host, left: list[Job], rows: RowOutput, settings: Settings, interrupt: StopSignal) -> None:
    failed: list[tuple[Job, str]] = []
    reasoning: dict[str, int] = {}
    flags: list[tuple[str, ...]] = []
    with progress("transcripts", len(left), "answers") as advance:
        for job, result in _asked(host, left, settings, interrupt):
            if isinstance(result, dict):
                experts = result.pop("routed_experts", None)
                if experts is not None:
                    routing.write_experts(rows.path, result["id"], experts)
                rows.write(result)
                flags.append(_flags(result, settings.vocabulary))
                kind = result["meta"]["reasoning"]
                reasoning[kind] = reasoning.get(kind, 0) + 1
            else:
                failed.append((job, str(result)))
            advance(1)
    for job, why in failed[:20]:
        print(f"{job.id}: {why}", file=sys.stderr)
    if missing := reasoning.get("absent", 0) + reasoning.get("summary", 0):
        print(
            f"{missing} of {count_of(sum(reasoning.values()), 'answer')} came without the model's own reasoning (their "
            "meta states absent or summary): analysis cannot be studied in them",
            file=sys.stderr,
        )
    if summary := counted(flags):
        print(f"{rows.path}: {count_of(len(flags), 'answer')}, {summary}", file=sys.stderr)
    interrupt.check()
    if failed:
        raise JobError(
            f"{len(failed)} of {len(left)} were not answered; the answers are in {rows.path}: rerun the command to "
            "request the rest"
        )


_Result = dict[str, Any] | Exception


def _asked(host: Host, left: list[Job], settings: Settings, interrupt: StopSignal) -> Iterator[tuple[Job, _Result]]:
    """Yield rows or reasons as they come; at most `concurrency` requests at a time.

    Whatever is wrong with one answer is the reason of one row. After a signal no further request is sent, and running
    requests are waited for.
    """
    ask = Asker(host, settings)
    queue = iter(left)
    results: queues.SimpleQueue[tuple[Job, _Result]] = queues.SimpleQueue()
    running = 0

    def work(job: Job) -> None:
        try:
            results.put((job, ask(job)))
        except Exception as error:
            results.put((job, error))

    try:
        while True:
            room = settings.concurrency if ask.api != "auto" else 1  # the first determines the API
            while running < room and not interrupt.asked and (job := next(queue, None)) is not None:
                # daemons, so that a second Ctrl-C need not wait for the host
                threading.Thread(target=work, args=(job,), daemon=True).start()
                running += 1
            if interrupt.asked:
                host.stop_retrying()
            if not running:
                return
            try:
                job, result = results.get(timeout=_POLL_S)
            except queues.Empty:
                continue
            running -= 1
            if isinstance(result, InputError):
                raise result
            if isinstance(result, Exception) and not isinstance(result, HostError | answers.NoAnswerError):
                result = answers.NoAnswerError(f"the reply cannot be read ({type(result).__name__}: {result})")
            yield job, result
    finally:
        host.stop.set()


def _flags(row: Mapping[str, Any], vocabulary: str | None) -> tuple[str, ...]:
    if "messages" in row:
        return flags_of_row(dict(row))
    encoding = tokenizer(vocabulary)
    labels = label(row["tokens"], tokenizer=encoding, n_prompt=row["n_prompt"])
    return sequence_flags(labels, row["n_prompt"], complete=row.get("complete"))
