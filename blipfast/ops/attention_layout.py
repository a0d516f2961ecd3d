"""Which rows of a packed batch attend to which keys: made once a batch on the host, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Grid:
    """T rows, each with a cell in a table of `height` lines and `width` columns; what PyTorch's attention takes."""

    def __init__(self, order: np.ndarray, counts: np.ndarray, device):
        """order [T]: the rows, line after line; counts [height]: how many each line has."""
        self.height, self.width = len(counts), int(counts.max(initial=0))
        line = np.repeat(np.arange(self.height), counts)
        column = np.arange(len(order)) - (np.cumsum(counts) - counts)[line]
        cell = np.empty(len(order), np.int64)
        cell[order] = line * self.width + column
        self.full = len(cell) == self.height * self.width and bool((cell == np.arange(len(cell))).all())
        self.cell = torch.from_numpy(cell).to(device, non_blocking=True)

    def lay_out(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [height, width, ...], zeros where there is no row."""
        if not self.full:
            table = rows.new_zeros((self.height * self.width, *rows.shape[1:]))
            rows = table.index_copy(0, self.cell, rows)
        return rows.unflatten(0, (self.height, self.width))

    def take_back(self, table: Tensor) -> Tensor:
        """[height, width, ...] -> [T, ...]."""
        rows = table.flatten(0, 1)
        return rows if self.full else rows.index_select(0, self.cell)


class Layout:
    """Texts packed one behind the other, [T, H, d], and the keys that each reads.

    query_lengths [B]: rows of each text. key_lengths [M]: rows of each set of keys, packed too ([S, H, d]) or, if all
    have N, dense ([M, N, H, d], images); None: the texts are their own keys. index [B]: the keys that each text reads,
    any number of texts the same; None: text b reads keys b. Zero lengths are fine. Everything is numbers on the host
    (tensors are copied there, which waits for a GPU); `device` is where the rows are.
    Raises ValueError for negative lengths and for an index that is not there.
    """

    def __init__(
        self,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        index: Sequence[int] | None = None,
        *,
        device: torch.device | str,
    ):
        lengths = _numbers("query_lengths", query_lengths)
        keys = lengths if key_lengths is None else _numbers("key_lengths", key_lengths)
        B, M = len(lengths), len(keys)
        if index is None and B != M:
            raise ValueError(
                f"attention: {B} texts and {M} sets of keys; say by `index` which text reads which"
            )
        read = np.arange(B) if index is None else _numbers("index", index)
        if len(read) != B or (B and read.max() >= M):
            raise ValueError(
                f"attention: index must give each of {B} texts one of {M} sets of keys, got {index}"
            )
        self.device = torch.device(device)
        self.grouped = index is not None
        self.T, self.S, self.M = int(lengths.sum()), int(keys.sum()), M
        # queries that share their keys are one segment
        self.query_lengths = np.bincount(read, weights=lengths, minlength=M).astype(np.int64)
        self.key_lengths = keys
        order = np.argsort(np.repeat(read, lengths), kind="stable")
        self.rows = None if (order[1:] > order[:-1]).all() else self._upload(order.astype(np.int32))
        self.queries = Grid(order, self.query_lengths, self.device)
        own = key_lengths is None and index is None
        self.keys = self.queries if own else Grid(np.arange(self.S), keys, self.device)
        self.query_offsets, self.key_offsets = self._offsets(self.query_lengths), self._offsets(keys)
        self._describe()

    def _describe(self) -> None:
        """What masks depend on, in plain numbers, so that torch.compile can follow."""
        spare = self.key_lengths - self.query_lengths
        asked = self.query_lengths > 0
        self.keys_each = self._common(self.key_lengths)
        self.spare_each = self._common(spare)
        self.least_spare = int(spare.min()) if len(spare) else 0
        self.some_see_none = bool((asked & (self.key_lengths == 0)).any())
        self.some_see_none_causally = self.some_see_none or bool((asked & (spare < 0)).any())
        self.ends, self.spare = self._upload(np.stack([self.key_lengths - 1, spare]))[..., None, None]

    def mask(self, causal: bool, first: int | None) -> tuple[Tensor | None, bool]:
        """For the tables of the grids: which keys a query sees, bool, broadcastable to [M, 1, Wq, Wk], None if all.

        And whether there is a query that sees none.
        """
        column = torch.arange(self.keys.width, device=self.device)
        if not causal:
            seen = None if self.keys_each is not None else (column <= self.ends)[:, None]
            return seen, self.some_see_none
        row = torch.arange(self.queries.width, device=self.device)[:, None]
        blind = self.some_see_none_causally if first is None else self.some_see_none
        shift = self.spare_each if first is None else first
        if (
            shift is not None and shift <= self.least_spare
        ):  # a text's last query does not look beyond its last key
            return (column <= row + shift)[None, None], blind
        shift = self.spare if shift is None else shift
        return (column <= torch.minimum(row + shift, self.ends))[:, None], blind

    def _offsets(self, lengths: np.ndarray) -> Tensor:
        return self._upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    def _upload(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    @staticmethod
    def _common(numbers: np.ndarray) -> int | None:
        """The value that all have; None if they differ or there are none."""
        return int(numbers[0]) if len(numbers) and (numbers == numbers[0]).all() else None


def _numbers(name: str, numbers: Sequence[int]) -> np.ndarray:
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu()
    array = np.asarray(numbers)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(
            f"attention: {name} must be a list of whole numbers, got {array.dtype} {list(array.shape)}"
        )
    if (array < 0).any():
        raise ValueError(f"attention: {name} must not be negative, got {array.min()}")
    return array.astype(np.int64)
