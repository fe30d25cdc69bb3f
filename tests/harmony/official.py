"""What the official chat template of gpt-oss writes, for the conversations that it can express.

Written from the format's description and the behaviour of openai/gpt-oss-20b's chat_template.jinja: an oracle that
shares no code with the renderer.
"""

import json
from typing import Any

DATE = "2025-06-28"


def schema(spec: dict[str, Any]) -> str:
    """A flat JSON schema in the syntax of TypeScript."""
    if spec.get("enum"):
        return " | ".join(f'"{value}"' for value in spec["enum"])
    if spec["type"] == "array":
        return {"string": "string[]", "integer": "number[]", "boolean": "boolean[]"}[spec["items"]["type"]]
    return {"string": "string", "integer": "number", "number": "number", "boolean": "boolean"}[spec["type"]]


def namespace(tools: list[dict[str, Any]]) -> str:
    text = "## functions\n\nnamespace functions {\n\n"
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters", {}).get("properties", {})
        text += f"// {function['description']}\ntype {function['name']} = "
        if not parameters:
            text += "() => any;\n\n"
            continue
        text += "(_: {\n"
        for name, spec in parameters.items():
            text += f"// {spec['description']}\n" if "description" in spec else ""
            optional = "" if name in function["parameters"].get("required", []) else "?"
            text += f"{name}{optional}: {schema(spec)},"
            if "default" in spec:
                value = spec["default"]
                text += f" // default: {value if spec.get('enum') else json.dumps(value)}"
            text += "\n"
        text += "}) => any;\n\n"
    return text + "} // namespace functions"


def official(
    messages: list[dict[str, Any]], *, effort: str, tools: list[dict[str, Any]], identity: str | None, generate: bool
) -> str:
    """The template's text with the developer message's trailing blank lines left out where no tools follow."""
    text = "<|start|>system<|message|>" + (identity or "You are ChatGPT, a large language model trained by OpenAI.")
    text += f"\nKnowledge cutoff: 2024-06\nCurrent date: {DATE}\n\nReasoning: {effort}\n\n"
    text += "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    text += "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else ""
    text += "<|end|>"
    leading = messages[0]["role"] in ("system", "developer")
    if leading or tools:
        sections = [f"# Instructions\n\n{messages[0]['content']}"] if leading else []
        sections += [f"# Tools\n\n{namespace(tools)}"] if tools else []
        text += "<|start|>developer<|message|>" + "\n\n".join(sections) + "<|end|>"
    turns = messages[leading:]
    for i, message in enumerate(turns):
        role, last = message["role"], i == len(turns) - 1
        if role == "user":
            text += f"<|start|>user<|message|>{message['content']}<|end|>"
        elif role == "assistant" and last and not generate:
            text += (
                f"<|start|>assistant<|channel|>analysis<|message|>{message['thinking']}<|end|>"
                if "thinking" in message
                else ""
            )
            text += f"<|start|>assistant<|channel|>final<|message|>{message['content']}<|end|>"
        elif role == "assistant":
            text += f"<|start|>assistant<|channel|>final<|message|>{message['content']}<|end|>"
    return text + ("<|start|>assistant" if generate else "")
