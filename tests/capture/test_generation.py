"""Prompts become transcripts: at every effort, marked, seeded, in whole files."""

import json
import re
from pathlib import Path

import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.capture.generation import final_text, generate_transcripts
from workbench.errors import InputError
from workbench.harmony.transcripts import read_transcripts
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [line for line in (DATA / "prompts.jsonl").read_text().splitlines() if '"conflict' in line][:4]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "p.jsonl"


def test_every_prompt_is_answered_at_every_effort_and_marked(nano: GptOss, prompts: Path, tmp_path: Path) -> None:
    made = generate_transcripts(nano, prompts, tmp_path / "t.jsonl", efforts=["low", "high"])
    read, rejects = read_transcripts(tmp_path / "t.jsonl", tokenizer=nano.tokenizer)
    assert not rejects
    assert [(t.id, t.effort, t.n_prompt, t.correct) for t in read] == [
        (t.id, t.effort, t.n_prompt, t.correct) for t in made
    ]
    assert len(read) == 8
    for transcript in read:
        answer = final_text(transcript.tokens, nano.tokenizer)
        assert transcript.correct == (answer == transcript.answer)
        assert transcript.meta["task"] == "conflict"
        thought = "analysis" in nano.tokenizer.decode(transcript.tokens.tolist())
        assert thought == (transcript.effort == "high")
    assert sum(bool(t.correct) for t in read) >= 6, "nano obeys"


def test_samples_differ_and_a_seed_repeats_them(nano: GptOss, prompts: Path, tmp_path: Path) -> None:
    options = {"efforts": ["high"], "samples": 3, "temperature": 8.0, "batch": 5}
    a, b, c = (
        generate_transcripts(nano, prompts, tmp_path / f"{i}.jsonl", seed=seed, max_new_tokens=12, **options)  # type: ignore[arg-type]
        for i, seed in enumerate((0, 0, 1))
    )
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert [t.tokens.tolist() for t in a] == [t.tokens.tolist() for t in b]
    assert [t.tokens.tolist() for t in a] != [t.tokens.tolist() for t in c]
    assert len({t.id for t in a}) == len(a) == 12
    assert len({tuple(t.tokens) for t in a if t.prompt_id == a[0].prompt_id}) > 1


def test_a_greedy_transcript_does_not_depend_on_its_batch(nano: GptOss, prompts: Path, tmp_path: Path) -> None:
    for batch in (1, 64):
        generate_transcripts(nano, prompts, tmp_path / f"{batch}.jsonl", batch=batch)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "64.jsonl").read_bytes()


def test_refusals_write_nothing(nano: GptOss, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="'extreme'"):
        generate_transcripts(nano, prompts, out, efforts=["extreme"])
    with pytest.raises(InputError, match="set --temperature"):
        generate_transcripts(nano, prompts, out, samples=2)
    long = {"id": "long", "messages": [{"role": "user", "content": "1" * 1100}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(InputError, match="'long' fills the context of 1024"):
        generate_transcripts(nano, tmp_path / "long.jsonl", out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        generate_transcripts(nano, prompts, out)
    assert out.read_text() == "mine"


def test_another_template_or_other_prompts_do_not_resume_a_file(
    nano: GptOss, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out.jsonl", {"efforts": ["low"], "max_new_tokens": 2}
    generate_transcripts(nano, prompts, out, **options)
    begun = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(nano.tokenizer, "chat_template", f"{nano.tokenizer.chat_template}{{# another #}}")
        with pytest.raises(InputError, match="was started with chat_template"):
            generate_transcripts(nano, prompts, out, **options)
    prompts.write_text("".join(prompts.read_text().splitlines(True)[:-1]))
    with pytest.raises(InputError, match="was started with prompts"):
        generate_transcripts(nano, prompts, out, **options)
    assert out.read_bytes() == begun


def test_an_unfinished_answer_is_wrong_not_an_error(nano: GptOss) -> None:
    assert final_text(nano.tokenizer.encode("12"), nano.tokenizer) is None
    prompt = wb.harmony.render([{"role": "user", "content": "say a"}], effort="low", tokenizer=nano.tokenizer)
    assert final_text(prompt, nano.tokenizer) is None


def test_sampling_is_restricted_and_the_speed_is_printed(
    nano: GptOss, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(**options: float) -> list[list[int]]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        made = generate_transcripts(nano, prompts, out, efforts=["low"], max_new_tokens=6, **options)  # type: ignore[arg-type]
        return [t.tokens.tolist() for t in made]

    greedy, hot = texts(), texts(temperature=8.0)
    assert "new tokens" in (err := capsys.readouterr().err)
    assert re.search(r"[\d.]+ tokens/s, first token after [\d.]+ s, then [\d,.]+ tokens/s", err)
    assert texts(temperature=8.0, top_k=1) == greedy
    assert texts(temperature=8.0, top_p=1e-9) == greedy
    assert texts(temperature=8.0, min_p=1.0) == greedy
    assert hot != greedy, "a negative control: without a restriction the answers differ"
    with pytest.raises(InputError, match="--top-k restricts sampling"):
        texts(top_k=3)
    texts(temperature=1.0, top_k=2)
    begun = max(tmp_path.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    with pytest.raises(InputError, match="started with top_k 2"):
        generate_transcripts(nano, prompts, begun, efforts=["low"], max_new_tokens=6, temperature=1.0, top_k=3)
