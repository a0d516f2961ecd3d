"""Captions as augmentation changes them."""

from collections import Counter
from random import Random

import pytest

from blipfast.config import DataConfig
from blipfast.data.text_augment import TextAugment, drop_words, swap_words, text_augment

CAPTION = "a small brown dog runs over the green grass"


def shout(caption, rng):
    return f"{caption} {'!' * rng.randint(1, 3)}"


def test_words_are_dropped_at_the_given_rate_and_never_all():
    rng = Random(0)
    kept = [drop_words(CAPTION, 0.3, rng).split() for _ in range(500)]
    assert 0.67 < sum(map(len, kept)) / (500 * 9) < 0.73
    assert all(drop_words("one two", 1.0, rng) in ("one", "two") for _ in range(20))
    order = CAPTION.split()
    assert all(words == [w for w in order if w in words] for words in kept)


def test_swaps_keep_the_words_and_move_each_by_one_at_most():
    rng = Random(0)
    words = CAPTION.split()
    for _ in range(100):
        swapped = swap_words(CAPTION, 0.5, rng).split()
        assert Counter(swapped) == Counter(words)
        assert all(abs(swapped.index(word) - i) <= 1 for i, word in enumerate(words))
    assert swap_words("a b c d", 1.0, rng) == "b a d c"


def test_the_same_generator_gives_the_same_caption():
    augment = TextAugment(0.3, 0.3, f"{__name__}:shout")
    assert augment(CAPTION, Random(5)) == augment(CAPTION, Random(5))
    assert len({augment(CAPTION, Random(s)) for s in range(20)}) > 10


def test_the_prompt_is_left_alone():
    augment = TextAugment(word_dropout=0.9, prompt="a picture of ")
    assert all(augment(f"a picture of {CAPTION}", Random(s)).startswith("a picture of ") for s in range(20))


@pytest.mark.parametrize("caption", ["", "猫坐在窗台上", "word"])
def test_captions_without_spaces_come_through(caption):
    assert TextAugment(0.5, 0.5)(caption, Random(0)) == caption


def test_config_chooses_the_augmentation_and_bad_hooks_are_named():
    assert text_augment(DataConfig()) is None
    assert text_augment(DataConfig(text_hook=f"{__name__}:shout"))("dog", Random(0)).startswith("dog !")
    for hook, message in (
        ("nothing", "package.module:function"),
        ("no_such_module_here:f", "cannot be imported"),
        (f"{__name__}:whisper", "has no function whisper"),
        (f"{__name__}:CAPTION", "is not a function"),
    ):
        with pytest.raises(ValueError, match=f"data.text_hook: .*{message}"):
            TextAugment(hook=hook)
    with pytest.raises(ValueError, match="data.word_dropout"):
        TextAugment(word_dropout=1.2)


def test_a_prompt_stays_apart_from_words_that_change():
    for prompt in ("a picture of", "a picture of "):
        augment = TextAugment(word_dropout=0.5, prompt=prompt)
        assert all(
            augment(f"a picture of {CAPTION}", Random(i)).startswith("a picture of ") for i in range(20)
        )
