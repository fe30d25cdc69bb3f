"""The shapes of rows that hold a conversation, by the fields they have, and how each is read.

SHAPES lists them in the order in which they are tried: first the shapes with the most specific fields.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.chat_messages import from_chat_messages
from workbench.harmony.completion import is_complete
from workbench.harmony.formats.conversation import Conversation
from workbench.harmony.formats.prompts import continued, given_messages
from workbench.harmony.formats.row_fields import Row, about, object_of, one_effort, with_reasoning, with_system
from workbench.harmony.grammar import parse_text
from workbench.harmony.marked_text import is_marked
from workbench.harmony.messages import shown
from workbench.harmony.reasoning import REASONING_FIELDS
from workbench.harmony.transcripts import expected_text

_API_FIELDS = ("messages", "input", "prompt", "instructions", "request", "response", "choices", "output", "message")
_REASONING_SETTINGS = {"effort", "summary", "generate_summary", "max_tokens", "enabled", "exclude"}  # of a request
_UNFINISHED = ("queued", "in_progress", "failed")  # states of a response; a row's own may be the grade of an answer
_RESPONSE_TEXT = ("answer", "response", "completion", "output", "text", "generation")


@dataclass(frozen=True)
class Shape:
    """A format of rows. matches: whether a row has its fields. read: the conversations in a row."""

    name: str
    matches: Callable[[Row], bool]
    read: Callable[[Row], Iterator[Conversation]]


def _is_list(row: Row, name: str, kind: type = Mapping) -> bool:
    values = row.get(name)
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


# ---- a request and its response ------------------------------------------------------------------------------------


def _request_messages(request: Row) -> list[Any]:
    """Return messages of a request to chat completions, Responses, completions or Ollama."""
    instructions = request.get("instructions")
    first = [{"role": "developer", "content": instructions}] if isinstance(instructions, str) and instructions else []
    for name in ("previous_response_id", "conversation"):
        if request.get(name) not in (None, "", {}, []):
            raise InputError(
                f"the request continues {shown(request[name])} ({name}), whose messages it does not hold: give all "
                "messages as its input"
            )
    for name in ("messages", "input", "prompt"):
        if request.get(name) not in (None, []):
            return with_system(request, [*first, *given_messages(request[name])])
    raise InputError("the request has no messages, input or prompt")


def responses_of(response: Row) -> list[tuple[list[Any], bool | None, tuple[list[int], list[int]] | None]]:
    """Return the messages of each answer of any API, whether it is complete, and the ids of prompt and answer.

    Raises:
        InputError: the response has no choices, output, message or content.
    """
    if _is_list(response, "choices"):
        return [_choice(choice, response) for choice in response["choices"]]
    if isinstance(response.get("output"), list):
        if not response["output"]:
            raise InputError(f"the response has no output; its status is {shown(response.get('status'))}")
        items = with_preambles(response["output"])
        return [(items, False if response.get("status") in _UNFINISHED else is_complete(response), None)]
    if isinstance(response.get("message"), Mapping):
        return [([response["message"]], is_complete(response), None)]
    if isinstance(response.get("response"), str):  # Ollama's generate
        message = {"role": "assistant", "content": response["response"], "thinking": response.get("thinking")}
        return [([message], is_complete(response), None)]
    if isinstance(response.get("content"), str):  # a message with what is known of the response
        message = {name: response[name] for name in ("content", "tool_calls", *REASONING_FIELDS) if name in response}
        return [([{"role": "assistant", **message}], is_complete(response), None)]
    raise InputError("the response has no choices, output, message or content")


def _choice(choice: Row, response: Row) -> tuple[list[Any], bool | None, tuple[list[int], list[int]] | None]:
    message = choice.get("message")
    if not isinstance(message, Mapping):
        if isinstance(choice.get("delta"), Mapping):
            raise InputError("it is a piece of a streamed response: store the complete response")
        message = {"role": "assistant", "content": choice.get("text")}
    prompt_ids = response.get("prompt_token_ids", choice.get("prompt_token_ids"))
    ids = choice.get("token_ids")
    exact = (prompt_ids, ids) if isinstance(prompt_ids, list) and isinstance(ids, list) and prompt_ids and ids else None
    beside = {name: choice[name] for name in REASONING_FIELDS if choice.get(name) and not message.get(name)}
    return [{"role": "assistant", **message, **beside}], is_complete(choice), exact


def with_preambles(items: Sequence[Any]) -> list[Any]:
    """Return items of Responses; a message that a call or more reasoning follows is a preamble."""
    with_channels = []
    for item, following in zip(items, [*items[1:], *[None][: len(items)]], strict=True):
        kind = object_of(following).get("type")
        before_more = kind in ("function_call", "reasoning", "custom_tool_call")
        preamble = before_more and object_of(item).get("type") == "message"
        with_channels.append({**item, "channel": "commentary"} if preamble else item)
    return with_channels


def paired(request: Row, response: Row, beside: Row) -> Iterator[Conversation]:
    """Yield conversations of a request and its response. beside: further fields of the row, such as an id."""
    body = object_of(response.get("body")) or response
    own = {**request, **{k: v for k, v in beside.items() if v is not None}}
    answers = responses_of(body)
    for written, complete, exact in answers:
        tokens = ([*exact[0], *exact[1]], len(exact[0])) if exact else None
        asked = [] if tokens else _request_messages(request)
        # of several answers, nothing shows which one the row's reasoning belongs to
        alone = not tokens and len(answers) == 1
        messages, read = with_reasoning(_reasoning_of(own), written) if alone else (written, [])
        fields = about(own, *_API_FIELDS, *read) | {"effort": one_effort(own, body)}
        yield Conversation([*asked, *messages], **{**fields, "complete": complete}, tokens=tokens)


def _reasoning_of(row: Row) -> Row:
    """Return the reasoning that a row keeps beside its request, without a request's settings of reasoning."""
    values = {name: row[name] for name in REASONING_FIELDS if row.get(name)}
    return {n: v for n, v in values.items() if not isinstance(v, Mapping) or not {*v} <= _REASONING_SETTINGS}


def _pair(row: Row) -> Iterator[Conversation]:
    request = object_of(row["request"])
    body = object_of(request.get("body")) or request
    yield from paired(
        body, object_of(row["response"]), {k: v for k, v in row.items() if k not in ("request", "response")}
    )


def _with_request(row: Row) -> Iterator[Conversation]:
    """Yield a response with its request, in the same object or around it."""
    response = row if not isinstance(row.get("response"), Mapping) else row["response"]
    request = {k: v for k, v in row.items() if k not in ("response", "choices", "output", "message")}
    if not any(request.get(name) for name in ("messages", "input", "prompt")) and not _has_prompt_ids(row):
        raise InputError("a response without its request: add the request's messages, or give --requests")
    yield from paired(request, response, {})


def _has_prompt_ids(row: Row) -> bool:
    return isinstance(row.get("prompt_token_ids"), list) or any(
        isinstance(object_of(choice).get("prompt_token_ids"), list) for choice in row.get("choices") or []
    )


def _batch(row: Row) -> Iterator[Conversation]:
    raise InputError(f"a batch's response to {shown(row['custom_id'])}: give the file of its requests with --requests")
    yield


# ---- rows with ids -------------------------------------------------------------------------------------------------


def _vllm(row: Row) -> Iterator[Conversation]:
    prompt = row["prompt_token_ids"]
    outputs = row["outputs"] if _is_list(row, "outputs") else [row]
    for output in outputs:
        ids = list(output.get("token_ids") or [])
        complete = is_complete(output)
        yield Conversation(
            **{**about(row, "prompt_token_ids", "token_ids", "outputs"), "complete": complete},
            tokens=([*prompt, *ids], len(prompt)),
        )


def _transcript(row: Row) -> Iterator[Conversation]:
    fields = about(row, "tokens", "n_prompt", "expected", "answer")
    if row.get("messages") is not None:
        raise InputError("it has both tokens and messages: keep one of them")
    yield Conversation(**_with_expected(row, fields), tokens=(list(row["tokens"]), row["n_prompt"]))


def _with_expected(row: Row, fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with the expected answer as transcripts have it."""
    expected = expected_text(row)
    return fields if expected is None else fields | {"answer": expected}


# ---- rows with messages --------------------------------------------------------------------------------------------


def _messages(row: Row) -> Iterator[Conversation]:
    texts = {name: row.get(name) for name in ("expected", "answer") if isinstance(row.get(name), str)}
    messages, reasoning = with_reasoning(row, with_system(row, row["messages"]))
    yield Conversation(messages, **_with_expected(texts, about(row, "messages", *texts, *reasoning)))


def _harmony(row: Row) -> Iterator[Conversation]:
    """Yield a `Conversation` of openai_harmony: settings are contents of the system and developer messages."""
    fields = about(row, "messages")
    messages: list[Any] = []
    for message in row["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        texts = []
        for part in parts:
            kind = object_of(part).get("type")
            if kind == "system_content":
                fields["effort"] = fields["effort"] or part.get("reasoning_effort")
                fields["options"] |= _system_options(part)
            elif kind == "developer_content":
                fields["options"] |= {"tools": _namespaced(part.get("tools"))} if part.get("tools") else {}
                texts += [part["instructions"]] if part.get("instructions") else []
            else:
                texts.append(object_of(part).get("text", part))
        if texts:
            messages.append({**message, "content": "".join(map(str, texts))})
    yield Conversation(messages, **fields)


def _system_options(content: Row) -> dict[str, Any]:
    options = {
        "model_identity": content.get("model_identity"),
        "knowledge_cutoff": content.get("knowledge_cutoff"),
        "date": content.get("conversation_start_date"),
        "builtin_tools": list(object_of(content.get("tools"))) or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _namespaced(tools: Any) -> list[Any]:
    return [tool for namespace in object_of(tools).values() for tool in object_of(namespace).get("tools", [])]


def _is_harmony(row: Row) -> bool:
    kinds = ("system_content", "developer_content")
    return _is_list(row, "messages") and any(
        object_of(part).get("type") in kinds
        for message in row["messages"]
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _sharegpt(row: Row) -> Iterator[Conversation]:
    messages, reasoning = with_reasoning(row, with_system(row, row["conversations"]))
    yield Conversation(messages, **about(row, "conversations", *reasoning))


def _results(row: Row) -> Iterator[Conversation]:
    """Yield results of simple-evals or gpt-oss's own evaluations: conversations, and what is known of each."""
    examples = object_of(row.get("metadata")).get("example_level_metadata")
    examples = examples if isinstance(examples, list) and examples else [{}] * len(row["convos"])
    if len(examples) != len(row["convos"]):
        raise InputError(f"it has {len(row['convos'])} convos, and example_level_metadata of {len(examples)} examples")
    for number, messages in enumerate(row["convos"], 1):
        example = object_of(examples[number - 1])
        score = example.get("score")
        answer = example.get("correct_answer")
        yield Conversation(
            list(messages),
            id=str(number),
            prompt_id=str(number),
            meta=dict(example),
            correct=bool(score) if score in (0, 1) else None,
            answer=answer if isinstance(answer, str) else None,
        )


def _prompt_completion(row: Row) -> Iterator[Conversation]:
    fields = about(row, "prompt", "completion", "chosen", "rejected")
    answers = [name for name in ("completion", "chosen", "rejected") if row.get(name)]
    for name in answers:
        answer = row[name]
        written = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
        asked = given_messages(row["prompt"])
        written = written[len(asked) :] if len(written) > len(asked) and written[: len(asked)] == asked else written
        id = fields["id"] if name == "completion" else f"{fields['id']}/{name}".strip("/")
        both = with_system(row, [*asked, *written])
        yield Conversation(both, **{**fields, "id": id, "prompt_id": fields["prompt_id"] or fields["id"]})


def _lm_eval(row: Row) -> Iterator[Conversation]:
    """Yield a sample of lm-evaluation-harness: the first argument of each request is the prompt."""
    arguments: Any = row.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = [list(object_of(entry).values()) for entry in arguments.values()]
    prompt, *others = arguments[0]
    if others and isinstance(others[0], str):
        raise InputError("it scores the log-likelihood of given answers: the model wrote no text")
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        prompt = parse_json(prompt)
    fields = about(row, "doc_id", "arguments", "resps")
    texts = [text for responses in row["resps"] for text in (responses if isinstance(responses, list) else [responses])]
    scores = {bool(row[name]) for name in ("exact_match", "acc") if row.get(name) in (0, 1)}
    # the score is that of the answer; of several, or of two scores that differ, nothing shows which one it belongs to
    correct = scores.pop() if len(scores) == 1 and len(texts) == 1 else None
    for number, text in enumerate(texts):
        id = f"{row['doc_id']}/{number}" if len(texts) > 1 else str(row["doc_id"])
        yield Conversation(
            [*given_messages(prompt), {"role": "assistant", "content": text}],
            **{**fields, "id": id, "prompt_id": str(row["doc_id"]), "correct": correct},
        )


def _prompt_answer(row: Row) -> Iterator[Conversation]:
    fields = about(row, "prompt", "input", "context", *_RESPONSE_TEXT, *REASONING_FIELDS)
    answers = {name: row[name] for name in _RESPONSE_TEXT if isinstance(row.get(name), str)}
    if len(set(answers.values())) > 1:
        raise InputError(
            f"it has {' and '.join(answers)}, and nothing shows which one the model wrote: keep one of them, and call "
            "the right answer target"
        )
    if more := [
        name for name in ("input", "context") if row.get(name) not in (None, "", []) and not _is_ids(row, name)
    ]:
        raise InputError(f"it has a prompt and {more[0]}: join them in the prompt as the model saw them")
    prompt, answer = continued(row["prompt"], next(iter(answers.values())))
    message = {"role": "assistant", "content": answer}
    message |= {name: row[name] for name in REASONING_FIELDS if row.get(name) is not None}
    yield Conversation(with_system(row, [*given_messages(prompt), message]), **fields)


def _text(row: Row) -> Iterator[Conversation]:
    """Yield a conversation as one text with marks, as chat templates render it."""
    # a text that ends where the next answer begins holds the one before it in full
    text = row["text"].rstrip().removesuffix("<|start|>assistant")
    complete = True if text.endswith(("<|return|>", "<|call|>")) else None if text.endswith("<|end|>") else False
    fields = about(row, "text")
    yield Conversation(
        parse_text(text), **{**fields, "complete": complete if fields["complete"] is None else fields["complete"]}
    )


def _is_text(row: Row) -> bool:
    text = row.get("text")
    return not row.get("prompt") and isinstance(text, str) and text.startswith("<|start|>") and is_marked(text)


def _is_ids(row: Row, name: str) -> bool:
    """Return whether a field holds ids, as the `context` that Ollama returns with each answer."""
    return isinstance(row[name], list) and all(type(one) is int for one in row[name])


def _llama_cpp(row: Row) -> Iterator[Conversation]:
    """Yield a response of llama.cpp's `/completion` with the prompt that it repeats."""
    yield from _prompt_answer({**{k: v for k, v in row.items() if k != "content"}, "response": row["content"]})


def _is_transcript(row: Row) -> bool:
    return isinstance(row.get("tokens"), list) and "n_prompt" in row


def _is_vllm(row: Row) -> bool:
    ids = _is_list(row, "prompt_token_ids", int)
    return ids and (
        isinstance(row.get("token_ids"), list) or (_is_list(row, "outputs") and "token_ids" in row["outputs"][0])
    )


def _is_response(row: Row) -> bool:
    if isinstance(row.get("response"), Mapping):
        return True
    if _is_list(row, "choices") or (isinstance(row.get("message"), Mapping) and ("done" in row or "messages" in row)):
        return True
    return _is_list(row, "output") and all("type" in item for item in row["output"])


SHAPES = (
    Shape("openai_harmony conversations", _is_harmony, _harmony),
    Shape("workbench transcripts", _is_transcript, _transcript),
    Shape("vLLM outputs with token ids", _is_vllm, _vllm),
    Shape("simple-evals results", lambda row: _is_list(row, "convos", list), _results),
    Shape(
        "responses of an OpenAI batch",
        lambda row: "custom_id" in row and "response" in row and "request" not in row,
        _batch,
    ),
    Shape(
        "requests with responses",
        lambda row: isinstance(row.get("request"), Mapping) and isinstance(row.get("response"), Mapping),
        _pair,
    ),
    Shape("responses of a chat API", _is_response, _with_request),
    Shape("ShareGPT conversations", lambda row: _is_list(row, "conversations"), _sharegpt),
    Shape(
        "TRL prompts with completions",
        lambda row: (
            "prompt" in row
            and (
                isinstance(row.get("completion"), list)
                or ("chosen" in row and "rejected" in row)
                or (isinstance(row["prompt"], list) and "completion" in row)
            )
        ),
        _prompt_completion,
    ),
    Shape(
        "lm-eval samples",
        lambda row: "doc_id" in row and _is_list(row, "resps", list) and bool(row.get("arguments")),
        _lm_eval,
    ),
    Shape("chat messages", lambda row: _is_list(row, "messages"), _messages),
    Shape("texts with harmony's marks", _is_text, _text),
    Shape(
        "llama.cpp completions",
        lambda row: (
            all(isinstance(row.get(n), str) for n in ("prompt", "content")) and bool({"stop_type", "stop"} & {*row})
        ),
        _llama_cpp,
    ),
    Shape(
        "prompts with answers",
        lambda row: (
            isinstance(row.get("prompt"), str | list) and any(isinstance(row.get(n), str) for n in _RESPONSE_TEXT)
        ),
        _prompt_answer,
    ),
)


def shape_of(row: Any) -> Shape | None:
    """Return the shape of a row, None if it has none that is known. A list of messages is a conversation."""
    if not isinstance(row, Mapping):
        return None
    return next((shape for shape in SHAPES if shape.matches(row)), None)


def has_messages(row: Any) -> bool:
    """Return whether a bare list is one conversation."""
    if (
        not isinstance(row, list)
        or not row
        or not all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in row)
    ):
        return False
    try:
        from_chat_messages(row)
    except InputError:
        return False
    return True
