"""What MED is built from and what it returns: `BertConfig` and `Output`."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

OTHERS = {  # real settings of BERT's, whose names are near to ours
    "hidden_act",
    "type_vocab_size",
    "num_labels",
    "classifier_dropout",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "position_embedding_type",
}
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass
class BertConfig:
    """The settings of MED; read from official JSON files (unknown keys there are ignored)."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    encoder_width: int = 768
    add_cross_attention: bool = True
    label_smoothing: float = 0.1
    gradient_checkpointing: bool = False

    @classmethod
    def from_dict(cls, settings: dict) -> BertConfig:
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in settings.items() if key in known})

    @classmethod
    def from_json_file(cls, path: str | Path) -> BertConfig:
        """Read `path`; the official names configs/{med,bert}_config.json fall back to the copies shipped here."""
        shipped = Path(__file__).parent / Path(path).name
        source = Path(path) if Path(path).exists() else shipped
        if not source.exists():
            raise FileNotFoundError(
                f"{path}: no such BERT config. Give a JSON file or a mapping of its keys."
            )
        return cls.from_dict(json.loads(source.read_text()))

    @classmethod
    def load(cls, source: BertConfig | dict | str | Path) -> BertConfig:
        """From another, a mapping or a JSON file.

        Settings of BERT that mean nothing here are ignored, as in official BLIP. ValueError for misspelt ones in a
        mapping, and for values of another type.
        """
        if isinstance(source, BertConfig):
            return cls.from_dict(vars(source))
        if not isinstance(source, dict):
            return cls.from_json_file(source)
        known = [field.name for field in fields(cls)]
        for name in source.keys() - OTHERS:
            if name not in known:
                if close := difflib.get_close_matches(name, known, 1, 0.8):
                    raise ValueError(f"med_config: {name} is no setting of BERT; did you mean {close[0]}?")
                continue
            wanted, value = type(getattr(cls, name)), source[name]
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                raise ValueError(f"med_config: {name} is {value!r}; expected {KINDS[wanted]}.")
        return cls.from_dict(source)


@dataclass
class Output:
    """What a model returns: fields by name, or those that are set by position (as a transformers output)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: list[tuple[Tensor, Tensor]] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple:
        return tuple(value for value in vars(self).values() if value is not None)

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]
