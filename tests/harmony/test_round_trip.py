"""Random conversations: equal to the official template and library where these agree, and the same after a round."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harmony.official import DATE, official
from workbench import harmony
from workbench.harmony.rendering import render_transcript
from workbench.harmony.vocabulary import harmony_encoding

Messages = list[dict[str, Any]]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    [
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "# Tools",
        "to=user",
        "144",
        "analysis of it",
        "final 1",
    ]
)
WORDS = TEXT.filter(str.strip)
NAMES = st.sampled_from(("calc", "get_weather", "lookup"))
SPECS = st.sampled_from(
    (
        {"type": "string"},
        {"type": "integer", "description": "How many."},
        {"type": "boolean", "default": True},
        {"type": "string", "enum": ["a", "b"], "default": "a"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "string", "default": "x", "description": "A word."},
    )
)
LIMITS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def tool(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.sampled_from("abcde"), SPECS, max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    parameters = (
        {"parameters": {"type": "object", "properties": properties, "required": required}} if properties else {}
    )
    return {"type": "function", "function": {"name": draw(NAMES), "description": "Does it."} | parameters}


@st.composite
def chat(draw: st.DrawFn) -> Messages:
    """Turns of user and assistant in the form of the official template."""
    messages: Messages = [{"role": "developer", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        answer = {"role": "assistant", "content": draw(TEXT)}
        # Thinking beside an empty answer is read as a generation that was cut off, which the template cannot say.
        thinks = bool(answer["content"]) and draw(st.booleans())
        messages.append(answer | ({"thinking": draw(WORDS)} if thinks else {}))
    return messages


@LIMITS
@given(
    chat(),
    st.lists(tool(), max_size=2, unique_by=lambda t: t["function"]["name"]),
    st.sampled_from(harmony.EFFORTS),
    st.sampled_from((None, "You are Ada.")),
    st.booleans(),
)
def test_ids_are_the_official_templates(
    messages: Messages, tools: list[dict[str, Any]], effort: str, identity: str | None, generate: bool
) -> None:
    if generate:
        messages = messages[:-1]
    words = harmony.tokenizer()
    ids = harmony.render(
        messages,
        effort=effort,
        tools=tools,
        model_identity=identity,
        date=DATE,
        tokenizer=words,
        generation_prompt=generate,
    )
    assert words.decode(ids) == official(messages, effort=effort, tools=tools, identity=identity, generate=generate)


@st.composite
def conversation(draw: st.DrawFn) -> Messages:
    """Harmony's own messages: recipients on every channel, calls and results, preambles, types."""
    messages: Messages = [{"role": "developer", "content": draw(WORDS)}] if draw(st.booleans()) else []
    messages.append({"role": "user", "content": draw(TEXT)})
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(("analysis", "preamble", "call", "builtin", "addressed")))
        if kind in ("analysis", "preamble"):
            channel = "analysis" if kind == "analysis" else "commentary"
            messages.append({"role": "assistant", "channel": channel, "content": draw(TEXT)})
        elif kind == "addressed":
            channel = draw(st.sampled_from(("analysis", "commentary", "final")))
            messages.append({"role": "assistant", "channel": channel, "recipient": "user", "content": draw(TEXT)})
        else:
            name = "python" if kind == "builtin" else f"functions.{draw(NAMES)}"
            channel = "analysis" if kind == "builtin" else "commentary"
            called = {"role": "assistant", "channel": channel, "recipient": name, "content": draw(TEXT)}
            result = {"role": "tool", "name": name, "recipient": "assistant", "channel": channel, "content": draw(TEXT)}
            messages += [called | ({"content_type": "json"} if draw(st.booleans()) else {}), result]
    if draw(st.booleans()):
        messages.append({"role": "assistant", "channel": "final", "content": draw(TEXT)})
    return messages


def library_ids(messages: Messages) -> list[int]:
    from openai_harmony import Author, Conversation, DeveloperContent, Message, RenderConversationConfig, Role

    built = []
    for message in messages:
        content: Any = message["content"]
        if message["role"] == "developer":
            content = DeveloperContent.new().with_instructions(content)
        made = Message.from_author_and_content(Author(role=Role(message["role"]), name=message.get("name")), content)
        made.channel, made.recipient = message.get("channel"), message.get("recipient")
        made.content_type = message.get("content_type")
        built.append(made)
    config = RenderConversationConfig(auto_drop_analysis=False)
    return harmony_encoding().render_conversation(Conversation.from_messages(built), config)


@LIMITS
@given(conversation())
def test_ids_are_the_librarys_but_for_the_recipient_of_results(messages: Messages) -> None:
    words = harmony.tokenizer()
    ids = harmony.render(messages, tokenizer=words, generation_prompt=False)
    system = harmony.render([{"role": "user", "content": ""}], tokenizer=words, generation_prompt=False)
    n_system = len(system) - 4  # <|start|>user<|message|><|end|>
    ours, theirs = words.decode(ids[n_system:]), words.decode(library_ids(messages))
    for message in messages:
        if message["role"] == "tool" and message["channel"] == "commentary":  # the format's place is before the channel
            name = message["name"]
            theirs = theirs.replace(
                f"<|start|>{name}<|channel|>commentary to=assistant<|message|>",
                f"<|start|>{name} to=assistant<|channel|>commentary<|message|>",
            )
    assert ours == theirs


@LIMITS
@given(conversation(), st.booleans())
def test_a_round_changes_nothing(messages: Messages, complete: bool) -> None:
    words = harmony.tokenizer()
    ids, n_prompt = render_transcript(messages, effort="low", tokenizer=words, complete=complete)
    labels = harmony.label(ids, tokenizer=words, n_prompt=n_prompt)
    assert not any(m.flags for m in labels.messages)
    assert harmony.parse(ids, tokenizer=words, n_prompt=n_prompt)[1:] == json.loads(json.dumps(messages))
    again, _ = render_transcript(harmony.parse(ids, tokenizer=words), effort="low", tokenizer=words, complete=complete)
    assert again == ids


@LIMITS
@given(conversation())
def test_a_lost_recipient_would_be_seen(messages: Messages) -> None:
    """Negative control: a renderer that drops recipients fails the round."""
    words = harmony.tokenizer()
    broken = [{k: v for k, v in m.items() if k != "recipient" or m["role"] == "tool"} for m in messages]
    ids, _ = render_transcript(broken, effort="low", tokenizer=words)
    assert (harmony.parse(ids, tokenizer=words)[1:] == messages) == (broken == messages)
