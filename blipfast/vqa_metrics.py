"""VQA accuracy as the official VQA evaluator computes it, answer clean-up included.

An answer's accuracy is min(1, matches / 3), averaged over the ten ways of leaving one annotator out. Predictions are
cleaned in full (punctuation, number words, articles, contractions), references of punctuation only, and not even that
where all annotators wrote the same: VQA's released answers are clean already.
Source: the evaluator of visualqa.org (GT-Vision-Lab/VQA), whose quirks are kept and named here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the evaluator passes re.UNICODE, which is 32, where re.sub takes a count
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}

# Each of these is also recognised with any one of its apostrophes left out: couldnt've, couldn'tve -> couldn't've.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that goes the other way


def strip_punctuation(text: str) -> str:
    """Punctuation to spaces, or to nothing where it touches a space; periods go unless a digit follows.

    Quirk kept: one number such as 1,000 anywhere in the text makes all punctuation vanish without a space.
    """
    thousands = _THOUSANDS.search(text)
    stripped = text
    for mark in _PUNCTUATION:
        beside_a_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_a_space or thousands else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def normalize_answer(text: str) -> str:
    """A predicted answer in the form that is compared: `The two dogs, isnt it?` -> `2 dogs isn't it`."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in strip_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of one prediction against its annotators' answers (VQA has ten a question).

    Leaving one out of fewer than four answers can never give 1, so there the prediction counts in full if it equals
    any of them, both sides cleaned. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("A question without answers cannot be scored.")
    prediction = normalize_answer(prediction)
    if len(answers) < 4:
        return float(prediction in map(normalize_answer, answers))
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    matches = [answer == prediction for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def vqa_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], types: Sequence[str] | None = None
) -> dict[str, float]:
    """Per cent: "accuracy" over all questions and, given each question's answer type, "accuracy_<type>".

    VQA's types are yes/no, number and other. Raises ValueError if there is no question or the lengths differ.
    """
    if not predictions:
        raise ValueError("There are no questions to score.")
    scores = [vqa_accuracy(*pair) for pair in zip(predictions, answers, strict=True)]
    metrics = {"accuracy": 100 * sum(scores) / len(scores)}
    by_type: dict[str, list[float]] = {}
    for score, type in zip(scores, types or (), strict=bool(types)):
        by_type.setdefault(type, []).append(score)
    for type, own in sorted(by_type.items()):
        metrics[f"accuracy_{type}"] = 100 * sum(own) / len(own)
    return metrics
