"""Run a recipe: generate the original answer token by token, then the edited one, then compare them.

    experiment = Experiment(model, recipe)
    for _ in experiment.steps():
        print(experiment.original.tokens)

Closing the iterator ends the work. What is generated can be read at any time, from another thread too.
"""

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from workbench.capture.generation import final_text
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import applied
from workbench.kernels.logits import logprob
from workbench.model.generation_loop import GenerationSpeed, GenerationStep
from workbench.model.prompt_cache import PromptCache
from workbench.model.transformer import GptOss
from workbench.research.recipe import Recipe
from workbench.research.steering_sources import SteeringSources

_ROWS = 64  # logits of this many tokens at a time


@dataclass
class Answer:
    """An answer that grows. rows: the new tokens of every sample; logprobs and experts are those of the first one.

    experts: of every new token the experts [layer slot] at the position that predicted it.
    """

    rows: list[list[int]]
    logprobs: list[float] = field(default_factory=list)
    experts: list[Int[np.ndarray, "layer slot"]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    speed: GenerationSpeed = field(default_factory=GenerationSpeed)
    shared_tokens: int = 0

    @property
    def tokens(self) -> list[int]:
        """Return the new tokens of the first sample."""
        return self.rows[0]

    def load(self, n_layers: int, n_experts: int) -> Float[np.ndarray, "layer expert"]:
        """Return the share of the slots of each layer that went to each expert; zero before the first token."""
        counts = np.zeros((n_layers, n_experts))
        for chosen in list(self.experts):
            np.add.at(counts, (np.arange(n_layers)[:, None], chosen), 1)
        return counts / max(counts[0].sum(), 1)


@dataclass(frozen=True)
class Comparison:
    """How the edited answer differs from the original; of samples, the first ones.

    first_difference: number of the first new token that differs, None if none does. original_change and edited_change:
    of every token of either answer, its log-probability (nats) with the interventions less that without, given the
    tokens before it. routing_change: of each layer, the share of chosen experts that the interventions exchange while
    the model reads the original answer.
    """

    first_difference: int | None
    original_change: list[float]
    edited_change: list[float]
    routing_change: list[float]


class Experiment:
    """A recipe on a model: its answers so far, the comparison at the end, and which interventions met no token.

    n_begin: how many of the prompt's last tokens are what the answer begins with. refused: the number of the
    intervention that could not be applied, and why. unmatched: numbers of those that met no token.

    Raises:
        InputError: the vocabulary cannot express the prompt, or the prompt fills the context.
    """

    def __init__(
        self,
        model: GptOss,
        recipe: Recipe,
        *,
        recorder: "RoutingRecorder | None" = None,
        prompt_cache: PromptCache | None = None,
        sources: SteeringSources | None = None,
    ) -> None:
        self.model, self.recipe, self._recorder, self._prompt_cache = model, recipe, recorder, prompt_cache
        self._sources = sources
        self.prompt, self.n_begin = recipe.prompt_ids(model), len(marked_ids(recipe.begin, model.tokenizer))
        if len(self.prompt) >= model.cfg.n_ctx:
            raise InputError(
                f"the prompt has {len(self.prompt):,} tokens, and the context of the model holds {model.cfg.n_ctx:,} "
                "with the answer: shorten the prompt"
            )
        self.original = Answer([[] for _ in range(recipe.samples)])
        self.edited: Answer | None = None
        self.comparison: Comparison | None = None
        self.refused: tuple[int, str] | None = None
        self.unmatched: list[int] = []

    def n_cut_off(self, answer: Answer) -> int:
        """Return how many samples of an answer have no token that ends them."""
        return sum(not row or row[-1] not in self.model.tokenizer.stop_ids for row in answer.rows)

    def steps(self) -> Generator[None, None, None]:
        """Run the experiment; yield after every step of generation.

        Raises:
            InputError: an intervention names what the model lacks, or the logits are not finite.
        """
        for number, one in enumerate(self.recipe.interventions):  # refused before anything is generated
            with self._naming(number):
                self.recipe.check(one, self.model, self._sources)
        with recording(self.model, self._recorder) as recorder:
            yield from self._generate(self.original, recorder, self._prompt_cache)
            if not self.recipe.interventions:
                return
            edits, numbers = self._edits()
            self.edited = Answer([[] for _ in range(self.recipe.samples)])
            with applied(self.model, *edits, need_match=False) as report:
                yield from self._generate(self.edited, recorder, None)
            without = [number for number, matched in zip(numbers, report, strict=True) if not matched.tokens]
            self.unmatched = list(dict.fromkeys(without))
            self.comparison = self._compare(edits, recorder)
            yield

    def _edits(self) -> tuple[list[Edit], list[int]]:
        """Return the edits of all interventions, and of each the number of its intervention."""
        edits: list[Edit] = []
        numbers: list[int] = []
        for number, one in enumerate(self.recipe.interventions):
            with self._naming(number):
                made = self.recipe.edits_of(one, self.model, [self._transcript()], sources=self._sources)
            edits += made
            numbers += [number] * len(made)
        return edits, numbers

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Record which intervention is refused."""
        try:
            yield
        except InputError as error:
            self.refused = number, str(error)
            raise

    def _generate(
        self, answer: Answer, recorder: "RoutingRecorder", prompt_cache: PromptCache | None
    ) -> Generator[None, None, None]:
        """Generate an answer; yield after every step."""
        answer.finished = [False] * len(answer.rows)
        recorder.begin(len(self.prompt) - 1)
        stream = self.model.generate_stream([self.prompt], prompt_cache=prompt_cache, **self.recipe.options)
        for step in stream:
            self._add(answer, step, recorder)
            yield

    def _add(self, answer: Answer, step: GenerationStep, recorder: "RoutingRecorder") -> None:
        if 0 in step.rows:
            first = step.rows.index(0)
            answer.experts.append(recorder.of_token(step.index))
            answer.logprobs.append(step.logprobs[first])
        for row, token, done in zip(step.rows, step.tokens, step.finished, strict=True):
            answer.rows[row].append(token)
            answer.finished[row] = done
        answer.speed.add(step)
        answer.shared_tokens = step.shared_tokens

    def _transcript(self) -> Transcript:
        tokens = np.array([*self.prompt, *self.original.tokens], dtype=np.int32)
        return Transcript("original", "original", self.recipe.effort, tokens, len(self.prompt))

    def _compare(self, edits: list[Edit], recorder: "RoutingRecorder") -> Comparison:
        """Return the comparison, from one more pass over each answer: the original with edits, the edited without."""
        assert self.edited is not None
        a, b = self.original.tokens, self.edited.tokens
        with applied(self.model, *edits, need_match=False):
            recorder.begin(len(self.prompt) - 1)
            original_edited = self._score(a)
        chosen = [recorder.of_token(i) for i in range(len(a))]
        edited_plain = self._score(b)
        return Comparison(
            first_difference(a, b),
            [new - old for new, old in zip(original_edited, self.original.logprobs, strict=True)],
            [new - old for new, old in zip(self.edited.logprobs, edited_plain, strict=True)],
            exchanged(self.original.experts, chosen),
        )

    @torch.no_grad()
    def _score(self, new: list[int]) -> list[float]:
        """Return the log-probability of every new token after the prompt, given those before it."""
        if not new:
            return []
        ids = torch.tensor([[*self.prompt, *new]], device=self.model.device)
        residual = self.model.residual(ids)
        columns = torch.arange(len(self.prompt) - 1, ids.shape[1] - 1)
        logprobs: list[float] = []
        for part in columns.split(_ROWS):
            logits = self.model.logits(residual, part[None])[0]
            logprobs += logprob(logits, ids[0, part + 1].to(logits.device)).tolist()
        return logprobs


class RoutingRecorder:
    """Records which experts the first sequence of a generation uses. Its hooks stay on the model until `close`.

    They stay so that a prompt cache, which is kept for the hooks that were on the model, can be used again.
    """

    def __init__(self, model: GptOss) -> None:
        self._model, self._first = model, 0
        self._experts: list[dict[int, np.ndarray]] = [{} for _ in range(model.cfg.n_layers)]
        self._points = [model.hook_dict[f"blocks.{n}.mlp.hook_expert_indices"] for n in range(model.cfg.n_layers)]
        self._handles = []
        for layer, point in enumerate(self._points):
            point.add_hook(partial(self._record, layer=layer), is_permanent=True)
            self._handles.append(point.fwd_hooks[-1])

    def begin(self, position: int) -> None:
        """Forget what was recorded, and record from this position on; it is the one that predicts new token 0."""
        self._first = position
        for layer in self._experts:
            layer.clear()

    def of_token(self, number: int) -> Int[np.ndarray, "layer slot"]:
        """Return the experts [layer slot] at the position that predicted a new token."""
        return np.stack([layer[self._first + number] for layer in self._experts])

    def close(self) -> None:
        """Remove the hooks."""
        for point, handle in zip(self._points, self._handles, strict=True):
            handle.hook.remove()
            point.fwd_hooks.remove(handle)

    def _record(self, experts: torch.Tensor, hook: Any, layer: int) -> None:
        context = self._model.context
        assert context is not None
        positions = context.positions.cpu()
        wanted = (context.sequence == 0) & (positions >= self._first)
        if wanted.any():
            chosen = experts.detach().cpu()[wanted].numpy()
            self._experts[layer].update(zip(positions[wanted].tolist(), chosen, strict=True))


@contextmanager
def recording(model: GptOss, recorder: RoutingRecorder | None) -> Iterator[RoutingRecorder]:
    """Yield the recorder, or one for the time being."""
    if recorder is not None:
        yield recorder
        return
    temporary = RoutingRecorder(model)
    try:
        yield temporary
    finally:
        temporary.close()


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Return the number of the first token in which two answers differ, None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def exchanged(before: list[np.ndarray], after: list[np.ndarray]) -> list[float]:
    """Return, of each layer, the share of chosen experts [layer slot] of all tokens that are not chosen any more."""
    if not before:
        return []
    shares = [~(a[:, :, None] == b[:, None, :]).any(-1) for a, b in zip(before, after, strict=True)]
    shares_by_layer: list[float] = np.mean(shares, axis=(0, 2)).tolist()
    return shares_by_layer


@dataclass(frozen=True)
class SampleSummary:
    """Of the samples of one side: final answers with their number, how many are complete, mean new tokens.

    correct: how many are the expected answer; None if the recipe expects none. An incomplete answer is not correct.
    """

    answers: list[tuple[str, int]]
    complete: int
    mean_tokens: float
    correct: int | None = None


def final_answer(experiment: Experiment, answer: Answer) -> str | None:
    """Return the complete final message of the first sample, None if there is none."""
    return final_text(np.array([*experiment.prompt, *answer.tokens]), experiment.model.tokenizer)


def summarize(experiment: Experiment, answer: Answer) -> SampleSummary:
    """Return the summary of the samples of one side; answers without a complete final message are not listed."""
    rows = [[*experiment.prompt, *row] for row in answer.rows]
    texts = [final_text(np.array(row), experiment.model.tokenizer) for row in rows]
    counted = Counter(text for text in texts if text is not None).most_common()
    expected = experiment.recipe.expected.strip()
    return SampleSummary(
        counted,
        sum(text is not None for text in texts),
        float(np.mean([len(row) for row in answer.rows])),
        sum(text == expected for text in texts) if expected else None,
    )


def limited(recipe: Recipe, max_new_tokens: int, max_samples: int) -> tuple[Recipe, list[str]]:
    """Return the recipe within these limits, and a sentence for each one that it exceeded."""
    notes = []
    if recipe.max_new_tokens > max_new_tokens:
        notes.append(
            f"This server generates at most {max_new_tokens:,} new tokens; {recipe.max_new_tokens:,} were asked for."
        )
    if recipe.samples > max_samples:
        notes.append(f"This server draws at most {count_of(max_samples, 'sample')}; {recipe.samples} were asked for.")
    new_tokens, samples = min(recipe.max_new_tokens, max_new_tokens), min(recipe.samples, max_samples)
    return replace(recipe, max_new_tokens=new_tokens, samples=samples), notes
