"""The model that all viewers share: its queue, its limits, and the recorder of routing."""

from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from workbench.errors import InputError
from workbench.live.experiment import Experiment, RoutingRecorder, limited
from workbench.live.job_queue import Job, JobQueue
from workbench.live.recipe_folder import RecipeFolder
from workbench.model.prompt_cache import PromptCache
from workbench.model.transformer import GptOss
from workbench.research.recipe import Recipe
from workbench.research.steering_sources import SteeringSources


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: new tokens of an answer, samples, seconds."""

    max_new_tokens: int = 2048
    max_samples: int = 16
    max_seconds: float = 120.0


class ModelServer:
    """A model with a queue. name: how `wb.load` finds the model; recipes made here name it.

    sources: the vectors and autoencoders that recipes may steer along. recipes: a folder of saved recipes.
    """

    def __init__(
        self,
        model: GptOss,
        name: str,
        limits: Limits | None = None,
        sources: SteeringSources | None = None,
        recipes: RecipeFolder | None = None,
    ) -> None:
        self.model, self.name, self.limits = model, name, limits or Limits()
        self.sources, self.recipes = sources or SteeringSources(), recipes
        self.queue = JobQueue(self.limits.max_seconds)
        self._recorder = RoutingRecorder(model)

    @property
    def title(self) -> str:
        """Return the name of the model without the folders of a path."""
        return Path(self.name).name or self.name

    def warm_up(self) -> None:
        """Put a request of two tokens into the queue, so that the first viewer does not wait for kernels to load."""
        recipe = Recipe(user="1", model=self.name, max_new_tokens=2)
        try:
            body = Experiment(self.model, recipe, recorder=self._recorder).steps()
        except InputError:  # a vocabulary without the digit
            return
        self.queue.submit("warm-up", body)

    def close(self) -> None:
        """Cancel all requests and take the hooks off the model."""
        self.queue.close()
        self._recorder.close()


class Viewer:
    """One browser session: at most one request at a time, and a prompt cache of its own."""

    def __init__(self, server: ModelServer) -> None:
        self.server, self.id = server, uuid4().hex
        self._prompt_cache = PromptCache()

    def run(self, recipe: Recipe) -> tuple[Job, Experiment, list[str]]:
        """Put a recipe into the queue; return its job, the experiment, and sentences about limits.

        Raises:
            InputError: the recipe cannot be run, or the queue is full.
        """
        allowed, notes = limited(recipe, self.server.limits.max_new_tokens, self.server.limits.max_samples)
        experiment = Experiment(
            self.server.model,
            allowed,
            recorder=self.server._recorder,
            prompt_cache=self._prompt_cache,
            sources=self.server.sources,
        )
        return self.server.queue.submit(self.id, experiment.steps()), experiment, notes

    def leave(self) -> None:
        """Cancel what the viewer has in the queue."""
        self.server.queue.leave(self.id)
