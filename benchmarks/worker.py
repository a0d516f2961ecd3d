"""Processes that measure: what breaks one (a crash, a hang, a lost CUDA context) costs a case and not the run."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from benchmarks import models, ops
from benchmarks.cases import Case
from benchmarks.measure import PATIENCE, at_most, explain, measure, measure_ceiling

MARGIN = 5.0  # seconds of a case's for its answer, before it is given up


class Lost(RuntimeError):
    """The process died, did not answer in time, or could not do what it was asked."""


@dataclass(frozen=True)
class Title:
    """Which case: by this a process that has the cases talks with one that has only their names."""

    op: str
    shape: str
    dtype: str
    mode: str
    rank: int
    targets: tuple[str, ...]
    seconds: float  # after which it is given up
    place: int  # among the operation's cases


def collect(device: str, packages: Sequence[ModuleType] = (models, ops)) -> tuple[list[Case], dict[str, str]]:
    """The cases of every file in benchmarks/models and benchmarks/ops; and of the files that give none, why."""
    cases, failed = [], {}
    for package in packages:
        for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
            name = f"{package.__name__}.{name}"
            try:
                cases += importlib.import_module(name).cases(device)
            except Exception as error:  # an operation that does not even import must not hide the others
                failed[name] = explain(error)
    if device == "cpu":  # targets are for the shapes on a GPU
        cases = [replace(case, targets=()) for case in cases]
    return cases, failed


class Worker:
    """A process with all the cases. `titles` and `failed` are those of `collect`.

    ask(verb, *arguments) -> answer: "ceiling" -> Ceiling; "measure", place in titles, Ceiling, seconds a contender and
    in all -> list of rows;
    "warm", places -> None, after what is compiled there ran once, and so lies in the compilers' caches on disk.
    """

    def __init__(self, device: str, patience: float = 120.0) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device), daemon=True)
        self.process.start()
        theirs.close()
        self.titles, self.failed = self.answer(patience)

    def tell(self, verb: str, *arguments: object) -> None:
        """Ask without waiting for the answer."""
        self.connection.send((verb, arguments))

    def answer(self, seconds: float) -> Any:
        """The next answer. Raises Lost if there is none, or an error in its place.

        Ends the process if it does not answer, and if its CUDA context is lost.
        """
        try:
            if self.connection.poll(seconds):
                answer, healthy = self.connection.recv()
                if not healthy:
                    self.close()
                if isinstance(answer, Lost):
                    raise answer
                return answer
            reason = f"no answer in {seconds:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"the process died (exit code {self.process.exitcode})"
        self.close()
        raise Lost(reason)

    def ask(self, verb: str, *arguments: object, seconds: float) -> Any:
        """`tell`, then `answer`."""
        try:
            self.tell(verb, *arguments)
        except OSError as error:
            self.close()
            raise Lost("the process died") from error
        return self.answer(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection: Any, device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # others convolve: the fastest way for each shape
    cases, failed = collect(device)
    places: dict[str, int] = {}
    titles = []
    for case in cases:
        place = places[case.op] = places.get(case.op, -1) + 1
        targets, seconds = tuple(map(str, case.targets)), 3 * PATIENCE if case.items else 60
        title = Title(case.op, case.shape, str(case.dtype), case.mode, case.rank, targets, seconds, place)
        titles.append(title)
    connection.send(((titles, failed), True))
    verbs = {
        "ceiling": lambda: measure_ceiling(device),
        "measure": lambda index, *limits: measure(cases[index], device, *limits),
        "warm": lambda indices: _warm([cases[index] for index in indices], device),
    }
    while True:
        try:
            verb, arguments = connection.recv()
        except EOFError:  # nobody is left to ask
            return
        torch._dynamo.reset()  # a case compiles for its own shape only
        try:
            answer = verbs[verb](*arguments)
        except Exception as error:  # of a case's setup, say: it costs the case alone
            answer = Lost(explain(error))
        connection.send((answer, _healthy(device)))


def _healthy(device: str) -> bool:
    """False once a kernel's fault has cost this process its CUDA context."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _warm(cases: list[Case], device: str) -> None:
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.08)  # there may be ten of them
    for case in cases:
        torch._dynamo.reset()
        with contextlib.suppress(Exception):  # will be told when the case is measured
            contenders = case.setup()
            for label in contenders:
                if label in ("ours triton", "ours") or "compiled" in label:
                    with contextlib.suppress(Exception), at_most(2 * PATIENCE):
                        contenders[label]()
