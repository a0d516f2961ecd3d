"""Captions, modified: words dropped, neighbours swapped, and whatever the user's own function does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from random import Random

from blipfast.config import DataConfig
from blipfast.text import with_prompt

Hook = Callable[[str, Random], str]


def text_augment(data: DataConfig) -> TextAugment | None:
    """The augmentation a config asks for; None if it asks for none. Raises ValueError as `TextAugment` does."""
    if not (data.word_dropout or data.word_swap or data.text_hook):
        return None
    return TextAugment(data.word_dropout, data.word_swap, data.text_hook, data.prompt)


class TextAugment:
    """Callable (caption, rng) -> caption: the user's hook first, then word swaps, then word dropout.

    hook: "package.module:function", called as function(caption, rng) with a random.Random. prompt: a beginning that
    every caption has and that is left alone. Words are what spaces separate, so text without spaces is one word.
    Raises ValueError for a probability out of range or a hook that cannot be found.
    """

    def __init__(self, word_dropout: float = 0.0, word_swap: float = 0.0, hook: str = "", prompt: str = ""):
        for name, value in (("word_dropout", word_dropout), ("word_swap", word_swap)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"data.{name} is a probability, in [0, 1]; got {value}.")
        self.word_dropout, self.word_swap, self.prompt = word_dropout, word_swap, prompt
        self.hook = load_hook(hook) if hook else None

    def __call__(self, caption: str, rng: Random) -> str:
        prompt = self.prompt if caption.startswith(self.prompt) else ""
        caption = caption[len(prompt) :].lstrip() if prompt else caption
        if self.hook:
            caption = self.hook(caption, rng)
        if self.word_swap:
            caption = swap_words(caption, self.word_swap, rng)
        if self.word_dropout:
            caption = drop_words(caption, self.word_dropout, rng)
        return with_prompt(prompt, caption)


def drop_words(caption: str, probability: float, rng: Random) -> str:
    """Leave out each word with the given probability, but never all of them."""
    words = caption.split()
    kept = [word for word in words if rng.random() >= probability]
    return " ".join(kept or [rng.choice(words)]) if words else caption


def swap_words(caption: str, probability: float, rng: Random) -> str:
    """Go through the words and swap each with its right neighbour with the given probability, no word twice."""
    words = caption.split()
    i = 0
    while i < len(words) - 1:
        if rng.random() < probability:
            words[i], words[i + 1] = words[i + 1], words[i]
            i += 1
        i += 1
    return " ".join(words)


def load_hook(name: str) -> Hook:
    """Import "package.module:function". Raises ValueError saying which part is missing."""
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f'data.text_hook: {name!r} should look like "package.module:function".')
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(
            f"data.text_hook: {module_name} cannot be imported ({error}); is its folder on PYTHONPATH?"
        ) from error
    except AttributeError:
        raise ValueError(f"data.text_hook: {module_name} has no function {function_name}.") from None
    if not callable(function):
        raise ValueError(f"data.text_hook: {name} is not a function.")
    return function
