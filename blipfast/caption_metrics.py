"""Scores of captions against several true ones: BLEU, ROUGE-L, CIDEr-D in plain Python, METEOR and SPICE through Java.

The figures are those of `pycocoevalcap`, which the field reports, to rounding: same formulas, same constants, same
words (`ptb.tokenize`). Captions and references are lists of words; candidates[i] is scored against references[i].
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from blipfast.ptb import tokenize
from blipfast.text import as_list

Words = Sequence[str]
NGRAMS = 4
INSTALL = "pip install 'blipfast[metrics]'"


def caption_metrics(
    captions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]], scorer: str = "blipfast"
) -> dict[str, float]:
    """Bleu_1 ... Bleu_4, ROUGE_L and CIDEr of {picture: caption} against {picture: true captions}, word for word.

    scorer: "blipfast", or "pycocoevalcap" for the published pipeline, which adds METEOR and SPICE and needs Java. SPICE
    is left out, with a note, where the models of Stanford CoreNLP are neither installed nor to be fetched. CIDEr is out
    of 10, the others out of 1. Raises ValueError if there is no caption or a picture has no true one, ImportError if
    the extra or Java is missing.
    """
    if not captions:
        raise ValueError("there are no captions to score.")
    if bare := [picture for picture in captions if not references.get(picture)]:
        raise ValueError(
            f"picture {bare[0]!r} has no true caption to score against ({len(bare)} such pictures)."
        )
    references = {picture: as_list(references[picture]) for picture in captions}
    if scorer == "pycocoevalcap":
        return _published(captions, references)
    candidates = [tokenize(caption) for caption in captions.values()]
    truths = [[tokenize(text) for text in references[picture]] for picture in captions]
    metrics = {f"Bleu_{n}": score for n, score in enumerate(bleu(candidates, truths), 1)}
    metrics["ROUGE_L"] = math.fsum(rouge_l(candidates, truths)) / len(candidates)
    metrics["CIDEr"] = math.fsum(cider_d(candidates, truths)) / len(candidates)
    return metrics


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus, each against the closest reference length (the shorter of two as close)."""
    matched, written, length, wanted = [0] * NGRAMS, [0] * NGRAMS, 0, 0
    for candidate, truths in zip(candidates, references, strict=True):
        length += len(candidate)
        wanted += min((abs(len(truth) - len(candidate)), len(truth)) for truth in truths)[1]
        most: Counter[tuple[str, ...]] = Counter()
        for truth in truths:
            most |= _ngrams(truth)
        for ngram, count in _ngrams(candidate).items():
            written[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, most[ngram])
    ratio = (length + 1e-15) / (
        wanted + 1e-9
    )  # the published constants keep empty corpora from dividing by zero
    brevity = math.exp(min(0.0, 1.0 - 1.0 / ratio))
    scores, product = [], 1.0
    for n in range(NGRAMS):
        product *= (matched[n] + 1e-15) / (written[n] + 1e-9)
        scores.append(brevity * product ** (1.0 / (n + 1)))
    return scores


def rouge_l(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2
) -> list[float]:
    """ROUGE-L of each candidate: best precision and best recall over its references, recall weighing `beta`."""
    scores = []
    for candidate, truths in zip(candidates, references, strict=True):
        common = [_longest_common(candidate, truth) for truth in truths]
        precision = max(common) / max(1, len(candidate))
        recall = max(shared / max(1, len(truth)) for shared, truth in zip(common, truths))
        total = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / total if total else 0.0)
    return scores


def cider_d(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0
) -> list[float]:
    """CIDEr-D of each candidate, out of 10; rarity is counted over the pictures' references (one picture scores 0)."""
    counts = [[_ngrams(truth) for truth in truths] for truths in references]
    pictures_with = Counter(ngram for truths in counts for ngram in set().union(*truths))
    log_pictures = math.log(len(references)) if references else 0.0

    def vector(ngrams: Counter) -> tuple[dict[tuple[str, ...], float], list[float]]:
        """Weights of the n-grams, and the norm of the weights for each n."""
        weights = {g: c * (log_pictures - math.log(max(1, pictures_with[g]))) for g, c in ngrams.items()}
        squares = [0.0] * NGRAMS
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares]

    scores = []
    for candidate, truths in zip(candidates, counts, strict=True):
        own = _ngrams(candidate)
        weights, norms = vector(own)
        total = 0.0
        for truth in truths:
            true_weights, true_norms = vector(truth)
            products = [0.0] * NGRAMS
            for ngram in weights.keys() & true_weights.keys():
                products[len(ngram) - 1] += min(weights[ngram], true_weights[ngram]) * true_weights[ngram]
            difference = _bigrams(own) - _bigrams(truth)
            likeness = sum(p / (a * b) if a and b else p for p, a, b in zip(products, norms, true_norms))
            total += likeness * math.exp(-(difference**2) / (2 * sigma**2))
        scores.append(10.0 * total / NGRAMS / len(truths))
    return scores


def _ngrams(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, NGRAMS + 1) for i in range(len(words) - n + 1))


def _bigrams(ngrams: Counter) -> int:
    """The published code measures length in bigrams."""
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


def _longest_common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def check_scorer(scorer: str) -> None:
    """Raises ImportError, with what to do, if what the scorer needs is not installed."""
    if scorer != "pycocoevalcap":
        return
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError(
            f"evaluate.scorer pycocoevalcap needs that package: {INSTALL}, or set it to blipfast."
        )
    if shutil.which("java") is None:
        raise ImportError(
            "evaluate.scorer pycocoevalcap runs Java, which is not on the path: install a Java runtime, or set it "
            "to blipfast."
        )


def _published(
    captions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
) -> dict[str, float]:
    """pycocoevalcap's own pipeline, tokenizer included."""
    check_scorer("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice.spice import Spice
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    written = tokenizer.tokenize({picture: [{"caption": text}] for picture, text in captions.items()})
    true = tokenizer.tokenize({p: [{"caption": text} for text in references[p]] for p in captions})
    scores, _ = Bleu(NGRAMS).compute_score(true, written, verbose=0)
    metrics = {f"Bleu_{n}": float(score) for n, score in enumerate(scores, 1)}
    for name, make in (("METEOR", Meteor), ("ROUGE_L", Rouge), ("CIDEr", Cider), ("SPICE", Spice)):
        try:
            metrics[name] = float(make().compute_score(true, written)[0])
        except OSError as error:  # SPICE fetches Stanford CoreNLP when it is first used
            if name != "SPICE":
                raise
            print(f"SPICE is left out: its Stanford CoreNLP models cannot be fetched ({error}).", flush=True)
    return metrics
