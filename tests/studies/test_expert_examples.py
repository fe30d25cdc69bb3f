"""Examples are tokens of the run in their context; what was planted is found, and chance is not.

Also tests `workbench.figures.expert_examples`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import workbench as wb
from tests.runs.conftest import MODEL, SPEC, job, tables, unit_data
from workbench import harmony
from workbench.capture.plan import plan_units
from workbench.errors import InputError
from workbench.runs import examples
from workbench.runs.reader import Run
from workbench.runs.summaries import summarise
from workbench.runs.writer import open_writer
from workbench.studies import expert_examples
from workbench.studies.synthetic import planted_run, planted_tokens

LENGTHS = tuple(60 for _ in range(80))
ANALYSIS, FRAME = harmony.CHANNELS.index("analysis"), harmony.CHANNELS.index("frame")


def written(path: Path, plant: Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]) -> Run:
    """A run of random routing, with what `plant` changes in the tokens and records of its units."""
    layout = plan_units(LENGTHS, 1024)
    flags = ["truncated" if i % 2 == 0 else "" for i in range(len(LENGTHS))]
    sequences = tables(LENGTHS)["sequences"].assign(flags=flags)
    with open_writer(path, **job(layout, SPEC, sequences=sequences)) as writer:
        for unit in layout.units:
            tokens, records = unit_data(layout, unit)
            tokens["id"] = tokens["id"] % 40  # of nano's vocabulary
            tokens["channel"] = np.where(tokens["channel"] == FRAME, ANALYSIS, tokens["channel"])
            plant(tokens, records)
            sums = summarise(records, tokens["sequence"], tokens["channel"], num_experts=MODEL["num_experts"])
            writer.write_unit(unit.index, tokens, records, sums)
        writer.finish()
    return wb.open_run(path)


def load(run: Run) -> Any:
    return expert_examples.load(run, tokenizer=harmony.tokenizer(Path(wb.__file__).parent / "data" / "nano"))


def test_a_planted_token_is_found_with_its_expert(tmp_path: Path) -> None:
    def plant(tokens: dict[str, np.ndarray], records: dict[str, np.ndarray]) -> None:
        seven = np.flatnonzero((tokens["id"] == 7) & (tokens["position"] % 4 > 0))  # three of four go to expert 3
        free = seven[(records["experts"][1, seven] != 3).all(-1)]
        records["experts"][1, free, 1] = 3

    ds = load(written(tmp_path / "r", plant))
    assert int(ds["token_id"][1, 3, 0]) == 7
    assert float(ds["token_log_odds_low"][1, 3, 0]) > 1
    others = ds["token_id"].values == 7
    others[1, 3] = False
    assert not (others & (ds["token_log_odds_low"].values > 0)).any()
    assert repr(str(ds["token_text"].values[1, 3, 0])) in str(ds["label"].values[1, 3])


def test_random_routing_has_few_intervals_above_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written(tmp_path / "r", lambda tokens, records: None)

    def above() -> float:
        low = load(run)["token_log_odds_low"].values
        return float((low[np.isfinite(low)] > 0).mean())

    assert above() < 0.12
    interval = expert_examples._log_odds_interval
    monkeypatch.setattr(expert_examples, "_log_odds_interval", lambda counts, rest: interval(counts, ~rest))
    assert above() > 0.4, "measured where the tokens were chosen, most seem real"


def test_the_interval_of_the_log_odds_is_as_wide_as_prompts_differ(tmp_path: Path) -> None:
    """Half of the prompts send a token to an expert: the interval is wider than that of independent tokens."""

    def plant(tokens: dict[str, np.ndarray], records: dict[str, np.ndarray]) -> None:
        some = np.flatnonzero((tokens["id"] == 7) & (tokens["sequence"] // 2 % 2 == 0))
        free = some[(records["experts"][1, some] != 3).all(-1)]
        records["experts"][1, free, 1] = 3

    ds = load(written(tmp_path / "r", plant)).isel(layer=1, expert=3, token_rank=0)
    assert int(ds["token_id"]) == 7
    width = float(ds["token_log_odds_high"] - ds["token_log_odds_low"])
    n = int(ds["token_count"])
    independent = 2 * 1.96 * np.sqrt(1 / (n * 0.6) + 1 / (n * 0.4))
    assert width > 1.3 * independent


def test_examples_of_the_demo_are_its_tokens_in_context(demo_run: Path) -> None:
    run = wb.open_run(demo_run)
    ds = wb.studies.expert_examples.load(run)
    cell = ds.sel(channel="analysis", layer=2, expert=5)
    for kind in ("top", "random"):
        for i in range(0, 16, 5):
            one = {name: cell[f"{kind}_{name}"].values[i] for name in ("gate", "sequence", "position", "before")}
            tokens = run.sequence(int(one["sequence"])).compute()
            at = int(one["position"])
            assert tokens["channel_name"].values[at] == "analysis"
            slot = tokens["experts"].values[2, at].tolist().index(5)
            assert tokens["gates"].values[2, at, slot] == one["gate"]
            assert run.text(int(one["sequence"])).count(str(one["before"]) + str(cell[f"{kind}_token"].values[i]))
    data = run.dataset
    own = (data["experts"].values[2] == 5) & (data["channel_name"].values == "analysis")[:, None]
    assert cell["top_gate"].values.tolist() == sorted(data["gates"].values[2][own].tolist(), reverse=True)[:16]
    assert int(cell["tokens"]) == own.sum()


def test_excluded_sequences_have_no_examples(tmp_path: Path) -> None:
    run = written(tmp_path / "r", lambda tokens, records: None)
    rest = run.excluding("truncated")
    assert rest.sequences.index.tolist() == list(range(1, len(LENGTHS), 2))
    assert (examples.of_run(run)["random_sequence"] % 2 == 0).any()
    result = examples.of_run(rest)["random_sequence"]
    assert not (result[result >= 0] % 2 == 0).any()
    assert (load(rest)["random_sequence"] >= 0).any()


def test_a_run_without_routing_is_refused() -> None:
    with pytest.raises(InputError, match="capture with --record routing"):
        expert_examples.load(planted_tokens(n_prompts=6))


def test_a_run_of_sums_alone_is_refused() -> None:
    with pytest.raises(InputError, match="a stored run with its routing"):
        expert_examples.load(planted_run(n_prompts=4))
