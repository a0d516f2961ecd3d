"""What a hyperparameter search may set: a YAML file of settings, each with a range or a list of choices.

train.lr: {low: 1e-5, high: 1e-3, log: true}     # log: uniform in the logarithm
loss.alpha: {low: 0, high: 0.6, step: 0.2}       # 0, 0.2, 0.4, 0.6
train.epochs: {low: 2, high: 8}                  # a whole number, because the setting is one
data.randaugment: [official, strong, none]
model.momentum: [0.9, 0.99, 0.995]
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfast.config import ConfigError, load_config, read_yaml, to_dict

_KEYS = {"low", "high", "log", "step"}


@dataclass
class Setting:
    """A setting of the config and what a search may make of it: `choices`, or numbers from `low` to `high`."""

    name: str
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: list[Any] = field(default_factory=list)
    whole: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """For comparing two searches."""
        return {"name": self.name, "choices": self.choices} if self.choices else vars(self)

    @property
    def edges(self) -> list[Any]:
        """Values that must be possible if all are."""
        return self.choices or [self.low, self.high]

    def suggest(self, trial: Any) -> Any:
        """What an Optuna trial tries; also kept, as YAML, in its user attribute "settings"."""
        if self.choices:  # Optuna takes no lists and mappings: it chooses among their texts
            value = json.loads(trial.suggest_categorical(self.name, [json.dumps(c) for c in self.choices]))
        elif self.whole:
            value = trial.suggest_int(self.name, self.low, self.high, step=self.step or 1, log=self.log)
        else:
            value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        settings = trial.user_attrs.get("settings", {})
        trial.set_user_attr("settings", settings | {self.name: json.dumps(value)})
        return value


def read_space(path: str | Path, config: str | Path, overrides: list[str] = []) -> list[Setting]:
    """The settings of a space file, tried out on the config they are meant for.

    Raises ConfigError naming file and line: unknown settings, ranges that are none, values the setting cannot have.
    """
    values, origins = read_yaml(Path(path))
    base = to_dict(load_config(config, overrides))
    space = []
    for name, given in values.items():
        where = f"{origins[name]}: {name}"
        setting = _setting(str(name), given, where, _value(base, str(name)))
        for value in setting.edges:
            try:
                load_config(config, [*overrides, f"{name}={json.dumps(value)}"])
            except ConfigError as error:
                raise ConfigError(f"{origins[name]}: {str(error).removeprefix('--set: ')}") from None
        space.append(setting)
    return space


def _setting(name: str, given: Any, where: str, now: Any) -> Setting:
    expected = "expected a list of choices or {low: a, high: b, log: true} ({..., step: c})"
    if isinstance(given, list):
        if len(given) < 2:
            raise ConfigError(f"{where}: a choice of {len(given)}; {expected}.")
        return Setting(name, choices=given)
    if not isinstance(given, dict) or not {"low", "high"} <= set(given) <= _KEYS:
        raise ConfigError(f"{where} is {given!r}; {expected}.")
    low, high, step, log = given["low"], given["high"], given.get("step"), given.get("log", False)
    if not all(_is_number(value) for value in (low, high, 1 if step is None else step)):
        raise ConfigError(f"{where}: low, high and step are numbers; found {given!r}.")
    if not low < high or (log and low <= 0):
        raise ConfigError(
            f"{where}: low must be below high{', and above 0 if log' if log else ''}; found {given!r}."
        )
    if log and step is not None:
        raise ConfigError(f"{where}: log and step exclude each other.")
    whole = not isinstance(now, float) and all(isinstance(value, int) for value in (low, high, step or 1))
    return Setting(name, low, high, bool(log), step, whole=whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(config: dict[str, Any], name: str) -> Any:
    """What the config says now; None if it says nothing."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
