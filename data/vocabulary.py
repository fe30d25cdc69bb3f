"""nano's tokenizer: harmony's marks and header words as single tokens, everything else as characters.

`write(folder)` writes the files that `tokenizers` and transformers read.
"""

import json
from pathlib import Path
from string import ascii_lowercase

MARKS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
WORDS = (
    "system",
    "developer",
    "user",
    "assistant",
    "analysis",
    "commentary",
    "final",
    "functions.calc",
    " to=",
    "Reasoning: ",
    "low",
    "medium",
    "high",
)
CHARACTERS = "0123456789+-*=();:,.?! " + ascii_lowercase
VOCABULARY = (*MARKS, *WORDS, *CHARACTERS)
ID = {token: i for i, token in enumerate(VOCABULARY)}

_AUTHORS = r"system|developer|user|assistant|analysis|commentary|final|functions\.calc"
_WORDS_OF_A_HEADER = (
    rf"\A(?:{_AUTHORS})(?= to=|\z)| to=|(?<= to=)(?:{_AUTHORS})\z|\AReasoning: |(?<=Reasoning: )(?:low|medium|high)\z|."
)

CHAT_TEMPLATE = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- for message in messages %}
{%- set channel = message.channel or ('final' if message.role == 'assistant' else '') %}
{{- '<|start|>' + (message.name if message.role == 'tool' else message.role) }}
{%- if channel %}{{- '<|channel|>' + channel }}{% endif %}
{%- if message.recipient %}{{- ' to=' + message.recipient }}{% endif %}
{%- set called = message.role == 'assistant' and message.recipient %}
{{- '<|message|>' + message.content + ('<|call|>' if called else '<|end|>') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
"""


def write(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="?"))
    # Marks are cut out first, so a header is a text of its own. Its words are tokens; in a content they are spelled.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS_OF_A_HEADER), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1024,
    }
    stops = {"eos_token_id": [ID["<|return|>"], ID["<|call|>"], ID["<|endoftext|>"]], "pad_token_id": ID["<|pad|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({**stops, "do_sample": False}, indent=1) + "\n")
