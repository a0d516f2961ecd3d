"""Caption scores against the published evaluator: figures recorded from it, and the package where it is installed."""

from __future__ import annotations

import random
import time

import pytest

from blipfast import caption_metrics as ours
from blipfast.caption_metrics import bleu, caption_metrics, cider_d, rouge_l
from blipfast.ptb import tokenize

# Cases with what makes scores differ: contractions, punctuation, repeats, a caption shorter or longer than all
# references, one that is a reference, one that shares nothing, numbers of references from 1 to 5.
REFERENCES = {
    42: ["A man riding a wave on top of a surfboard.", "A surfer in a black wetsuit rides a big wave.",
         "The man's surfboard is white; he isn't falling.", "a person surfing", "Someone surfs a wave in the ocean."],
    73: ["Two dogs play with a red-and-white frisbee (in the park).", "Dogs running after a frisbee!",
         'A sign says "No dogs" but there are 2 dogs.'],
    74: ["A plate of food with broccoli, rice, and meat."],
    133: ["A bedroom with a bed, a desk and a lamp...", "An old bedroom", "A bed sits in a room with a desk."],
    136: ["A giraffe standing next to a tree in a field.", "The giraffe's neck is very long."],
    139: ["A woman stands in the dining area at 5:30 p.m. near Main St.", "It's a kitchen.", "a woman in a kitchen"],
}  # fmt: skip
CAPTIONS = {
    42: "a man riding a wave on a surfboard in the ocean",
    73: "two dogs playing with a red-and-white frisbee in the park",
    74: "a plate of food with broccoli, rice, and meat.",
    133: "a bed a bed a bed in a bedroom with a bed and a desk and a lamp and a chair and a window",
    136: "an airplane",
    139: "it's a woman standing in a kitchen",
}
PUBLISHED = {  # pycocoevalcap 1.2 with its own tokenizer, Java 17
    "Bleu_1": 0.7343749999885254,
    "Bleu_2": 0.6844564291705343,
    "Bleu_3": 0.6002053158129244,
    "Bleu_4": 0.5037701406968047,
    "ROUGE_L": 0.6685895866442184,
    "CIDEr": 2.662721363034144,
}
METEOR = 0.4266739795227765

WORDS = {  # a caption -> its words, as Stanford's tokenizer 3.4.1 and pycocoevalcap's list of marks leave them
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "Two people don't know it's raining; they're happy, I'm not.":
        "two people do n't know it 's raining they 're happy i 'm not",
    "The woman's dog, dogs' owner, 'quoted words' and \"double quoted\".":
        "the woman 's dog dogs owner quoted words and double quoted",
    "A red-and-white train at the station - going fast -- very fast":
        "a red-and-white train at the station going fast very fast",
    "black/white photo and/or 1/2 price": "black/white photo and/or 1/2 price",
    "A man (with hat) [in] {brackets}.": "a man -lrb- with hat -rrb- -lsb- in -rsb- -lcb- brackets -rcb-",
    "I CANNOT go, she's gonna stay; they'd've left": "i can not go she 's gon na stay they 'd 've left",
    "$5 5% #1 @home R&B rock&roll &amp;": "$ 5 5 % # 1 @home r&b rock & roll &",
    "3,000 at 12:30 or 5:30pm in the 1990's, a 2.5-inch 10-year-old": "3,000 at 12:30 or 5:30 pm in the 1990 's "
        "a 2.5-inch 10-year-old",
    "Mr. Smith on Main St. near the U.S. embassy, no. 5, at 6 p.m. in.": "mr. smith on main st. near the u.s. embassy "
        "no. 5 at 6 p.m. in",
    "a café with “curly quotes”, it’s — well… fine": "a café with curly quotes it 's well fine",
    "wait... what?! no!! yes! why?": "wait what ?! no !! yes why",
    "O'Neill's rock'n'roll at four o'clock, ma'am, y'all": "o'neill 's rock 'n' roll at four o'clock ma'am y' all",
    "man w/ dog , cat .No space,here": "man w / dog cat no space here",
    "5'4\" tall 20\" tv -5 degrees \U0001f389 £5": "5 4 tall 20 tv -5 degrees # 5",
    "": "",
    " . ,! ": "",
}  # fmt: skip


@pytest.mark.parametrize("caption", WORDS)
def test_captions_are_cut_into_the_words_that_the_published_tokenizer_gives(caption):
    assert tokenize(caption) == WORDS[caption].split()


def test_all_figures_are_those_of_the_published_evaluator():
    assert caption_metrics(CAPTIONS, REFERENCES) == pytest.approx(PUBLISHED, abs=1e-6)


def test_the_order_of_pictures_and_other_references_do_not_matter():
    backwards = dict(reversed(CAPTIONS.items()))
    more = {**REFERENCES, 999: ["of a picture that was not captioned"]}
    assert caption_metrics(backwards, more) == pytest.approx(PUBLISHED, abs=1e-6)


def test_scores_of_single_captions_follow_the_definitions():
    truth = [["a", "b", "c", "d", "e"]]
    assert bleu([["a", "b", "c", "d", "e"]], [truth]) == pytest.approx([1.0] * 4)
    assert bleu([["a", "b", "x", "d"]], [truth])[0] == pytest.approx(0.75 * 2.718281828 ** (1 - 5 / 4))
    precision, recall = 3 / 4, 3 / 5  # a b d
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l([["a", "b", "x", "d"]], [truth]) == pytest.approx([expected])
    assert rouge_l([[]], [truth]) == [0.0]
    same = [["a", "dog", "runs", "fast"], ["the", "cat", "sleeps", "here"]]
    assert cider_d(same, [[words] for words in same]) == pytest.approx([10.0, 10.0])
    assert cider_d(same, [[words] for words in reversed(same)]) == [0.0, 0.0]
    assert cider_d(same[:1], [same[:1]]) == [0.0], "with one picture no word is rarer than another"


def random_cases(pictures: int, seed: int = 0):
    """Captions over a small vocabulary, so that n-grams meet."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(40)]

    def sentence(shortest: int) -> str:
        return " ".join(rng.choices(words, range(40, 0, -1), k=rng.randint(shortest, 14)))

    captions = {i: sentence(0) for i in range(pictures)}
    return captions, {i: [sentence(1) for _ in range(rng.randint(1, 5))] for i in range(pictures)}


@pytest.mark.parametrize("pictures", [1, 2, 57])
def test_scores_equal_those_of_pycocoevalcap(pictures):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = random_cases(pictures)
    written = {i: [caption] for i, caption in captions.items()}
    candidates = [caption.split() for caption in captions.values()]
    truths = [[text.split() for text in texts] for texts in references.values()]
    assert bleu(candidates, truths) == pytest.approx(
        Bleu(4).compute_score(references, written, verbose=0)[0], abs=1e-9
    )
    assert rouge_l(candidates, truths) == pytest.approx(
        Rouge().compute_score(references, written)[1], abs=1e-9
    )
    assert cider_d(candidates, truths) == pytest.approx(
        Cider().compute_score(references, written)[1], abs=1e-9
    )


def test_a_set_of_the_size_of_coco_is_scored_in_seconds():
    captions, references = random_cases(500)
    start = time.process_time()
    caption_metrics(captions, references)
    assert time.process_time() - start < 5, "COCO's 5,000 pictures: ten times as long"


@pytest.mark.parametrize(
    "captions, references, message",
    [
        ({}, {}, "no captions"),
        ({1: "a"}, {1: []}, "picture 1 has no true caption"),
        ({1: "a"}, {}, "picture 1"),
    ],
)
def test_what_cannot_be_scored_is_named(captions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics(captions, references)


def test_the_published_pipeline_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'blipfast\[metrics\]'"):
        caption_metrics(CAPTIONS, REFERENCES, "pycocoevalcap")
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ours.shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match="runs Java"):
        caption_metrics(CAPTIONS, REFERENCES, "pycocoevalcap")


def test_the_published_pipeline_gives_our_figures_and_meteor(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    if ours.shutil.which("java") is None:
        pytest.skip("needs Java")

    def offline():
        raise OSError("no network")

    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice.__init__", lambda self: offline())
    published = caption_metrics(CAPTIONS, REFERENCES, "pycocoevalcap")
    assert published.pop("METEOR") == pytest.approx(METEOR, abs=1e-6)
    assert published == pytest.approx(PUBLISHED, abs=1e-6)


def test_a_single_true_caption_may_stand_alone():
    assert caption_metrics({1: "a dog"}, {1: "a dog"}) == caption_metrics({1: "a dog"}, {1: ["a dog"]})
