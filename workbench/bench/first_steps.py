"""The steps of `workbench bench gpu --first`; each runs in a process of its own, with a device as its argument.

A step returns numbers, raises a `JobError` where they are wrong, and a `Skipped` where this machine cannot do it.
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.child_processes import python
from workbench.errors import JobError

_QUESTIONS = ("47*68", "reverse: abc", "12+30")
_NEW_TOKENS = 64
_GRAPH_TOKENS = 200  # longer than windows need until they move
_LARGE, _SAME = 8192, 2**-6  # tokens, and the most that a row may differ where only the order of sums does
_REPEATS = 6  # of each launch that is timed, three times over
_TOLERANCE = 2e-3  # of float32 logits of about 10: sums in another order, through four layers


class Skipped(Exception):  # noqa: N818  (not an error: a reason)
    """This machine lacks what a step needs."""


def versions(device: str) -> dict[str, Any]:
    """Return the GPUs and versions; the Triton that is installed must be the one that torch requires."""
    from workbench.bench.gpu import describe

    about = describe(torch.device(device))
    required = [line for line in metadata.requires("torch") or () if line.startswith("triton==")]
    wanted = [match[1] for line in required if (match := re.match(r"triton==([\w.]+)", line))]
    if wanted and wanted[0] != metadata.version("triton"):
        raise JobError(f"torch requires triton {wanted[0]}, and {metadata.version('triton')} is installed")
    if torch.cuda.is_available():
        about["gpus"] = [
            {"name": torch.cuda.get_device_name(i), "capability": list(torch.cuda.get_device_capability(i))}
            for i in range(torch.cuda.device_count())
        ]
    return about


def nano(device: str) -> dict[str, Any]:
    """Compare nano's logits, generation and gradients on the device with those on the CPU, in float32."""
    import workbench as wb

    reference = wb.load("nano", device="cpu", dtype=torch.float32)
    model = wb.load("nano", device=device, dtype=torch.float32)
    errors: list[dict[str, Any]] = []
    for question in _QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = wb.harmony.render(messages, effort="high", tokenizer=model.tokenizer)
        (answer,) = reference.generate([prompt], max_new_tokens=_NEW_TOKENS)
        (other,) = model.generate([prompt], max_new_tokens=_NEW_TOKENS)
        if list(answer) != list(other):
            raise JobError(f"nano generates other tokens on {device} for {question!r}")
        tokens = torch.tensor([prompt + answer])
        (logits, grad), (other_logits, other_grad) = (
            _logits_and_gradient(reference, tokens),
            _logits_and_gradient(model, tokens),
        )
        errors.append(
            {"question": question, "logits": _error(other_logits, logits), "gradient": _error(other_grad, grad)}
        )
    if wrong := [row for row in errors if not max(row["logits"], row["gradient"]) <= _TOLERANCE]:
        raise JobError(
            f"nano on {device} differs from the CPU by more than {_TOLERANCE}, relative to the largest: {wrong[0]}"
        )
    return {"relative_errors": errors, "allowed": _TOLERANCE}


def variants(device: str) -> dict[str, Any]:
    """Compare packed rows, two rows, a continued cache and hooked passes with plain passes, and quantisation."""
    import workbench as wb

    model = wb.load("nano", device=device, dtype=torch.float32)
    a, b = (torch.randint(model.cfg.d_vocab, (1, n), generator=torch.Generator().manual_seed(n)) for n in (150, 61))
    with torch.no_grad():
        alone = [model(tokens)[0] for tokens in (a, b)]
        errors = {
            "packed": _error(model(torch.cat([a, b], 1), packed=[150, 61])[0], torch.cat(alone)),
            "two rows": _error(_two_rows(model, a, b), torch.cat(alone)),
            "continued": _error(_continued(model, a, 100)[0], alone[0]),
        }
    if wrong := {name: error for name, error in errors.items() if not error <= _TOLERANCE}:
        raise JobError(f"passes on {device} differ from plain ones by more than {_TOLERANCE}, relatively: {wrong}")
    if changed := _changed_by_hooks(wb.load("nano", device=device, dtype=torch.bfloat16), a):
        raise JobError(f"recording changes the logits in bfloat16 on {device}: {', '.join(changed)}")
    _compare_recorder(model, a)
    _compare_quantisation(device)
    equal = dict.fromkeys(("hooked", "recorder", "quantise"), "bit for bit")
    return {"relative_errors": errors, "allowed": _TOLERANCE, **equal}


def _two_rows(model: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return the logits of both rows in one padded batch, end to end without the padding."""
    padded = torch.cat([a, torch.nn.functional.pad(b, (0, a.shape[1] - b.shape[1]))])
    logits = model(padded, n_real=[a.shape[1], b.shape[1]])
    return torch.cat([logits[0], logits[1, : b.shape[1]]])


def _continued(model: Any, tokens: Tensor, first: int) -> Tensor:
    """Return the logits of a row whose tokens are given in two passes and then one by one, after a cache."""
    from workbench.model.cache import KVCache

    n = tokens.shape[1]
    cache = KVCache(model.cfg, 1, n, dtype=model.dtype, device=model.device)
    ends = [0, first, n - 2, n - 1, n]
    return torch.cat([model(tokens[:, i:j], cache=cache) for i, j in itertools.pairwise(ends)], 1)


def _changed_by_hooks(model: Any, tokens: Tensor) -> list[str]:
    """Return the kinds of hook points whose recording changes a logit."""
    kinds = ("attn.hook_sink", "attn.hook_z", "mlp.router.hook_out", "mlp.experts.hook_post", "mlp.experts.hook_out")
    changed = []
    with torch.no_grad():
        plain = model(tokens)
        for kind in kinds:
            hooks = [(f"blocks.{layer}.{kind}", lambda x, hook: None) for layer in range(model.cfg.n_layers)]
            if not torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), plain):
                changed.append(kind)
    return changed


def _compare_recorder(model: Any, tokens: Tensor) -> None:
    """Record three passes, which are copied while the next is computed, and compare with the values themselves."""
    from workbench.hooks.recorders import Recorder

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    recorder = Recorder(dict.fromkeys(names, torch.float32))
    with torch.no_grad():
        with model.hooks(fwd_hooks=recorder.fwd_hooks):
            for _ in range(3):
                model(tokens)
        taken = recorder.take()
        _, cache = model.run_with_cache(tokens, names_filter=names)
    if wrong := [name for name in names if not torch.equal(taken[name], cache[name][0].cpu().repeat(3, 1))]:
        raise JobError(f"what a recorder has copied from {tokens.device} differs from the activations: {wrong}")


def _compare_quantisation(device: str) -> None:
    """Quantise the same weights on the device and on the CPU; codes and scales must be equal."""
    from workbench.kernels import mxfp4

    weight = torch.randn((3, 64, 96), generator=torch.Generator().manual_seed(0))
    pairs = zip(mxfp4.quantise(weight.to(device)), mxfp4.quantise(weight), strict=True)
    if not all(torch.equal(got.cpu(), want) for got, want in pairs):
        raise JobError(f"mxfp4.quantise on {device} differs from the CPU")


def _logits_and_gradient(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of the loss with respect to the embedding's output."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor, hook: Any) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", leaf)])
        targets = tokens[0, 1:].to(logits.device)
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), targets).backward()
    assert leaves[0].grad is not None
    return logits.detach().cpu(), leaves[0].grad.cpu()


def _error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite for NaN."""
    error = float((got - want).abs().max() / want.abs().max())
    return math.inf if math.isnan(error) else error


def synchronisation(device: str) -> dict[str, Any]:
    """Run a prefill and a decode step while synchronisation is an error; the first of each compiles."""
    import workbench as wb
    from workbench.model.cache import KVCache

    model = wb.load("nano", device=device, dtype=torch.bfloat16)
    tokens = torch.zeros((2, 33), dtype=torch.long, device=device)

    def run(new: Tensor, cache: KVCache) -> None:
        model.unembed(model.ln_final(model.residual(new, cache=cache)))

    waits = {}
    with torch.no_grad():
        for name, new in (("prefill", tokens), ("decode", tokens[:, :1])):
            cache = KVCache(model.cfg, 2, 128, dtype=model.dtype, device=model.device)
            run(tokens, cache)
            run(new, cache)
            torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(new, cache)
            except RuntimeError as error:
                waits[name] = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    if waits:
        raise JobError(f"a pass waits for the GPU: {waits}")
    return {"prefill": "no synchronisation", "decode": "no synchronisation"}


def graphs(device: str) -> dict[str, Any]:
    """Generate with steps that are recorded as CUDA graphs: the same tokens as without, and the seconds of both."""
    import workbench as wb
    from workbench.model.decode_graph import can_capture

    model = wb.load("nano", device=device, dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.cfg.d_vocab, (n,), generator=rng).tolist() for n in (150, 40, 7)]
    tokens, seconds = {}, {}
    for recorded in (False, True):
        model.cuda_graphs = recorded
        if recorded and not can_capture(model):
            raise Skipped(f"{device} is not a GPU")
        for _ in range(2):  # the first time compiles
            begun = time.perf_counter()
            tokens[recorded] = model.generate(prompts, max_new_tokens=_GRAPH_TOKENS, stop=())
            seconds["graphs" if recorded else "eager"] = time.perf_counter() - begun
    if tokens[True] != tokens[False]:
        rows = zip(tokens[True], tokens[False], strict=True)
        first = [next((i for i, (a, b) in enumerate(zip(*row, strict=True)) if a != b), None) for row in rows]
        raise JobError(f"nano generates other tokens with CUDA graphs on {device}, from these new tokens on: {first}")
    return {"tokens": "the same", "rows": len(prompts), "new_tokens": _GRAPH_TOKENS, "seconds": seconds}


def capture(device: str) -> dict[str, Any]:
    """Capture with nano in several ways, each in a process of its own; all must store the same records."""
    ways = {device: (device, "0"), f"{device}, blocking launches": (device, "1")}
    if torch.cuda.device_count() > 1:
        ways |= {"cuda:1": ("cuda:1", "0"), "two GPUs": ("cuda:0,cuda:1", "0")}
    digests = {}
    for name, (where, blocking) in ways.items():
        code = f"from workbench.bench.first_steps import records_digest; print(records_digest({where!r}))"
        environment = os.environ | {"CUDA_LAUNCH_BLOCKING": blocking}
        done = subprocess.run(python("-c", code), capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise JobError(f"capture on {name} failed: {done.stderr.strip()[-1000:]}")
        digests[name] = done.stdout.split()[-1]
    if len(set(digests.values())) > 1:
        raise JobError(f"the records differ: {digests}")
    return digests


def records_digest(device: str) -> str:
    """Return a digest of what a capture with nano records on a device: routing, sinks and the residual stream."""
    import numpy as np

    import workbench as wb

    model = wb.load("nano", device=device, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        transcripts, path = Path(folder) / "transcripts.jsonl", Path(folder) / "run"
        rows = [
            {
                "id": str(i),
                "prompt_id": str(i),
                "effort": "low",
                "messages": [
                    {"role": "user", "content": f"{i}+{i}"},
                    {"role": "assistant", "channel": "final", "content": str(2 * i)},
                ],
            }
            for i in range(200)
        ]
        transcripts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = ["routing", "sinks", "resid_post"]
        data = wb.capture(model, transcripts, path, record=record, unit_tokens=2048).dataset
        digest = hashlib.sha256()
        for name in ("experts", "gates", "sink", "hook_resid_post"):
            digest.update(np.ascontiguousarray(data[name]).tobytes())
    return digest.hexdigest()


def kernels(device: str) -> dict[str, Any]:
    """Check every kernel on problems of both published models, and with 24 and 128 experts.

    A kernel that spills registers is right but slow: the result lists it, and the step passes.
    """
    from workbench.bench.gpu import SIZES, check
    from workbench.kernels.gpu.spills import spilled
    from workbench.model.config import PUBLISHED

    small = PUBLISHED["20b"]
    configs = dict(PUBLISHED) | {f"{e} experts": replace(small, num_experts=e) for e in (24, 128)}
    rows = check(configs, torch.device(device), SIZES._replace(batches=(1, 2, 8)))
    worst = max(rows, key=lambda row: row["error"] / row["allowed"])
    tiles = {name: _compare_tiles(cfg, torch.device(device), _LARGE) for name, cfg in PUBLISHED.items()}
    if wrong := {name: error for name, error in tiles.items() if not error <= _SAME}:
        raise JobError(f"experts differ between two tiles by more than {_SAME}, relative to a row: {wrong}")
    return {"kernels": len(rows), "worst": worst, "between_tiles": tiles, "spilled_registers": spilled()}


def _compare_tiles(cfg: Any, device: torch.device, tokens: int) -> float:
    """Return the error of the experts' output for many tokens, beside a small tile's.

    A float64 reference would take minutes there, and compiled code that does not wait for its own loads is wrong in
    some values of a large problem only: with eight warps a tile, those of an H100 were.
    """
    from workbench.bench.autotune import choosing
    from workbench.bench.cases import Layer, row_error
    from workbench.kernels.gpu import moe
    from workbench.kernels.gpu.tiles import Tile

    layer = Layer(cfg, device)
    x, (experts, gates) = layer.normal(tokens, cfg.d_model), layer.routed(tokens)
    small = Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3)
    got = moe.moe(x, experts, gates, layer.experts)
    with choosing(lambda name, own: small if name == "moe_tile" else own):
        return row_error(got, moe.moe(x, experts, gates, layer.experts).cpu())


def sanitizer(device: str) -> dict[str, Any]:
    """Run nano's forward and backward passes under compute-sanitizer."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        raise Skipped("compute-sanitizer is not on the path")
    code = f"""
import torch, workbench as wb
from workbench.bench.first_steps import _logits_and_gradient
_logits_and_gradient(wb.load("nano", device={device!r}), torch.arange(40)[None])
"""
    command = [tool, "--error-exitcode", "9", *python("-c", code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"compute-sanitizer, exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return {"summary": done.stdout.strip().splitlines()[-1]}


def profile(device: str) -> dict[str, Any]:
    """Count and time the kernels of a decode step of two layers of gpt-oss-20b's shape."""
    from torch.profiler import ProfilerActivity

    from workbench.bench.models import random_model
    from workbench.model.cache import KVCache
    from workbench.model.config import PUBLISHED

    cfg = replace(PUBLISHED["20b"], n_layers=2, windows=PUBLISHED["20b"].windows[:2])
    model = random_model(cfg, torch.device(device))
    cache = KVCache(cfg, 1, 1024, dtype=model.dtype, device=model.device)
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        model.residual(token.expand(1, 512), cache=cache)
        for _ in range(3):
            model.residual(token, cache=cache)
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            model.residual(token, cache=cache)
            torch.cuda.synchronize(device)
    events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        "launches": sum(event.count for event in events),
        "microseconds": sum(event.self_device_time_total for event in events),
        "longest": [{"kernel": e.key[:100], "launches": e.count, "us": e.self_device_time_total} for e in events[:15]],
    }


def memory(device: str) -> dict[str, Any]:
    """Compare the memory of four layers of gpt-oss-120b and of a pass of 4,096 tokens with the plan of `info`."""
    from workbench.bench.models import random_model
    from workbench.model import memory as plan
    from workbench.model.config import PUBLISHED

    cfg = replace(PUBLISHED["120b"], n_layers=4, windows=PUBLISHED["120b"].windows[:4])
    before = torch.cuda.memory_allocated(device)
    model = random_model(cfg, torch.device(device))
    weights = torch.cuda.memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        model.residual(torch.zeros((1, 4096), dtype=torch.long, device=device))
    working = torch.cuda.max_memory_allocated(device) - before - weights
    planned = sum(plan.weights(cfg, "mxfp4", model.dtype).values())
    planned_working = max(plan.activations(cfg, 4096, dtype=model.dtype).values()) + plan.CUBLAS_WORKSPACE
    numbers = {"weights": weights, "planned": planned, "working": working, "planned_working": planned_working}
    if abs(weights - planned) > 0.02 * planned or working > 1.1 * planned_working:
        raise JobError(f"the plan is wrong (bytes): {numbers}")
    return numbers


def timings(device: str) -> dict[str, Any]:
    """Measure kernels and whole models; `workbench bench gpu` does the same with baselines."""
    from workbench.bench import gpu

    return gpu.run(device, stages=("kernels", "models"), repeats=_REPEATS, checked=True)


def main(function: str, device: str, out: str) -> None:
    """Run one step ("module:name") and write its status and result."""
    module, _, name = function.partition(":")
    step = getattr(importlib.import_module(module), name)
    try:
        answer = {"status": "passed", "result": step(device)}
    except JobError as error:
        answer = {"status": "failed", "error": str(error)}
    except Exception as error:
        if type(error).__name__ != Skipped.__name__:  # this file runs as __main__: its own Skipped is another class
            raise
        answer = {"status": "skipped", "error": str(error)}
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
