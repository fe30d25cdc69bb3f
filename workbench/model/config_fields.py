"""The fields of a checkpoint's config, each read once with its type; a field that is not read is refused."""

import math
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any

from workbench.errors import InputError

# Fields that change no logit: names, training settings, and the settings of generation that transformers' releases
# before 5 write into every config.
_INERT = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_dir",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}
# Fields that change nothing at these values and could at others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
}
_NEUTRAL_ROPE: dict[str, tuple[Any, ...]] = {
    "apply_yarn_scaling": (True,),
    "attn_factor": (1.0,),
    "extrapolation_factor": (1.0,),
    "mscale": (1.0,),
    "mscale_all_dim": (0.0,),
    "partial_rotary_factor": (1.0,),
}


class ConfigFields:
    """The fields of a config, each read once. Fields that were not read are unknown.

    Null is the same as absent, but for `default_if_absent`.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], where: str = "") -> None:
        self.path, self.where = path, where
        self.values = {name: value for name, value in values.items() if value is not None}
        self.nulls = {name for name, value in values.items() if value is None}
        self.nested: list[ConfigFields] = []  # objects whose unknown fields `finish` reports too

    def default_if_absent(self, name: str, default: Any) -> Any:
        """Return the default that a field has when it is absent; a field that is null has none and is required."""
        return ... if name in self.nulls else default

    def take(self, *names: str, default: Any = ...) -> Any:
        """Return the value of the first field among `names` that is present; several of them must agree.

        Raises:
            InputError: none is present and there is no default, or their values differ.
        """
        given = {name: self.values.pop(name) for name in names if name in self.values}
        if not given and default is ...:
            raise InputError(
                f"{self.path}: field {self.where}{names[0]!r} is missing; the model cannot be built without it"
            )
        if any(value != first for first, value in pairwise(given.values())):
            description = " and ".join(f"{self.where}{name} {short(value)}" for name, value in given.items())
            raise InputError(f"{self.path}: {description} contradict each other; correct one of them")
        return next(iter(given.values()), default)

    def integer(self, *names: str, most: int = 1_000_000_000, default: Any = ...) -> int:
        value = self.take(*names, default=default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.refusal(names[0], value, f"a whole number from 1 to {most:,}")
        return value

    def number(self, *names: str, default: Any = ...) -> float:
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refusal(names[0], value, "a number above 0")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.take(name, default=default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def fields(self, *names: str, where: str) -> "ConfigFields":
        """Return the fields of a nested object."""
        value = self.take(*names)
        if not isinstance(value, dict):
            raise self.refusal(names[0], value, "an object of fields")
        return ConfigFields(self.path, value, where)

    def finish(self, ignore: Collection[str]) -> None:
        """Refuse the fields that were not read, all of them in one message.

        Raises:
            InputError: a field is neither known to be harmless nor in `ignore`.
        """
        unknown = [
            (part.where, name, value)
            for part in (self, *self.nested)
            for name, value in part.values.items()
            if not part._is_harmless(name, value, ignore)
        ]
        if unknown:
            listed = ", ".join(f"{where}{name!r} = {short(value)}" for where, name, value in unknown)
            subject = f"fields {listed} are" if len(unknown) > 1 else f"field {listed} is"
            options = " ".join(f"--ignore-field {name}" for _, name, _ in unknown)
            raise InputError(
                f"{self.path}: {subject} unknown and could change the results; "
                f"if it does not, load with ignore_fields={[name for _, name, _ in unknown]} or {options}"
            )

    def _is_harmless(self, name: str, value: Any, ignore: Collection[str]) -> bool:
        if name in ignore or name.startswith("_"):
            return True
        neutral = _NEUTRAL_ROPE if self.where else _NEUTRAL
        return value in neutral[name] if name in neutral else not self.where and name in _INERT

    def refusal(self, name: str, value: object, wanted: str) -> InputError:
        """Return the error for a field whose value is not what is wanted."""
        return InputError(f"{self.path}: {self.where}{name} is {short(value)}, expected {wanted}")
