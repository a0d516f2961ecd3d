"""Ranking a list of answers to a question: the candidates as one tree, so that a shared beginning is read once.

Row 0 of a question's tree is [DEC]; every other row is a token that goes on from its parent, and sees it, the parent's
parent, and so on up to [DEC]. A row predicts the next tokens of all candidates that pass through it. An answer's last
token, [SEP], is predicted and never read. Losses are those of training each candidate alone, to rounding.

All rows of a tree meet in its attention. So that cost grows with the candidates and not with their square, a tree has
at most `CANDIDATES` of them, neighbours in alphabetical order, and a question as many trees as it takes; and so that
memory does not grow, trees go through the decoder some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .med import BertLMHeadModel
from .packed import ImageStates, Part, run
from .packing import Ragged

CANDIDATES = 256  # of a tree
ROWS = {"cpu": 4096, "cuda": 65536}  # of trees that go through the decoder together
HEAD_ROWS = 512  # rows of logits held at a time


class Tree:
    """The prefix tree of some of a question's candidate answers (token ids, [DEC] first)."""

    def __init__(self, question: int, answers: list[list[int]], chosen: list[int]):
        """chosen: which of the answers. Raises ValueError for an answer of fewer than two tokens."""
        self.question = question
        self.tokens, self.parents, self.depths = [answers[chosen[0]][0]], [-1], [0]
        self.edges: list[tuple[int, int, int]] = []  # candidate, row, the token that the row must predict
        children: dict[tuple[int, int], int] = {}
        for candidate in chosen:
            answer = answers[candidate]
            if len(answer) < 2:
                raise ValueError(f"Answer {candidate} has no token after [DEC]: {answer}.")
            row = 0
            for place, token in enumerate(answer[1:], 1):
                self.edges.append((candidate, row, token))
                if place == len(answer) - 1:
                    break
                if (row, token) not in children:
                    children[row, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(row)
                    self.depths.append(place)
                row = children[row, token]

    def sees(self, width: int) -> np.ndarray:
        """Whether a row sees another, bool [width, width]; rows beyond the tree see [DEC]."""
        table = np.zeros((width, width), bool)
        table[:, 0] = True
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                table[row] = table[parent]  # a parent comes before its children
            table[row, row] = True
        return table


def trees_of(answers: list[list[list[int]]]) -> Iterator[Tree]:
    """Of each question's candidates, as few as `CANDIDATES` allows."""
    for question, candidates in enumerate(answers):
        order = sorted(range(len(candidates)), key=candidates.__getitem__)
        for start in range(0, len(order), CANDIDATES):
            yield Tree(question, candidates, order[start : start + CANDIDATES])


def together(trees: Iterator[Tree], most: int) -> Iterator[list[Tree]]:
    """Trees of at most so many rows in all, or one that has more."""
    some: list[Tree] = []
    for tree in trees:
        if some and sum(len(each.tokens) for each in [*some, tree]) > most:
            yield some
            some = []
        some.append(tree)
    yield some


@torch.no_grad()
def answer_losses(
    decoder: BertLMHeadModel, images: ImageStates, answers: list[list[list[int]]]
) -> list[Tensor]:
    """For each question, the summed LM losses of its candidates [K], label smoothing included, fp32.

    images: what the decoder cross-attends to, one entry a question. answers: each question's candidates.
    """
    device = images.layers[0][0].device
    sums = torch.zeros(len(answers), max(map(len, answers)), device=device)
    for trees in together(trees_of(answers), ROWS.get(device.type, ROWS["cuda"])):
        add_losses(sums, decoder, images, trees)
    return [row[: len(candidates)] for row, candidates in zip(sums, answers)]


def add_losses(sums: Tensor, decoder: BertLMHeadModel, images: ImageStates, trees: list[Tree]) -> None:
    """Add the losses of trees' rows to those of the candidates, sums [questions, K]."""
    device = sums.device
    text = Ragged.of([tree.tokens for tree in trees], device)
    text.rows.position = torch.tensor([d for tree in trees for d in tree.depths]).to(
        device, non_blocking=True
    )
    longest = int(text.rows.lengths.max())
    sees = np.stack([tree.sees(longest) for tree in trees])
    sees = torch.from_numpy(sees).to(device, non_blocking=True)
    states = run([Part(decoder.bert, text, sees=sees)], images, [[tree.question for tree in trees]])[0]

    edges = [
        (tree.question, candidate, first + row, token)
        for first, tree in zip(text.rows.first, trees)
        for candidate, row, token in tree.edges
    ]
    edges.sort(key=lambda edge: edge[2])
    table = np.array(edges, np.int64)
    smoothing = decoder.config.label_smoothing
    for start in range(0, len(states), HEAD_ROWS):
        logits = decoder.cls(states[start : start + HEAD_ROWS]).float()
        first, last = np.searchsorted(table[:, 2], (start, start + HEAD_ROWS))
        here = torch.from_numpy(table[first:last].T.copy()).to(device, non_blocking=True)
        question, candidate, row, token = here
        row = row - start
        # cross-entropy with label smoothing: lse - (1 - s) * logit of the token - s * mean logit
        common = logits.logsumexp(1) - smoothing * logits.mean(1)
        losses = common[row] - (1 - smoothing) * logits[row, token]
        sums.index_put_((question, candidate), losses, accumulate=True)
