"""Small models and pictures that the tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from blipfast import backends

torch.set_num_threads(1)

BERT = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
VIT = dict(width=32, depth=2, heads=4, patch_size=8)


def pytest_configure(config) -> None:
    """Without `-m gpu` all is done on the CPU, and Triton, which reads this when it is imported, interprets kernels."""
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


@pytest.fixture
def small() -> dict:
    """Constructor arguments of a model that runs in milliseconds."""
    return dict(med_config=dict(BERT), vit=dict(VIT), image_size=32)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def served_by(name: str) -> Iterator[str]:
    """Operations are served by backend `name` while a test runs, which is skipped if that is not installed."""
    if name == "triton":
        pytest.importorskip("triton")
    with backends.use(name):
        yield name


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> Iterator[str]:
    """Runs a test once by PyTorch and once by the kernels; the backend's name."""
    yield from served_by(request.param)


@pytest.fixture(params=["torch", "sdpa", "triton"])
def attention_backend(request) -> Iterator[str]:
    """As `backend`, for attention, which PyTorch serves in two ways."""
    yield from served_by(request.param)


@pytest.fixture
def triton() -> Iterator[str]:
    """The kernels serve."""
    yield from served_by("triton")


@pytest.fixture
def poison_empty(monkeypatch) -> None:
    """Makes torch.empty, torch.empty_like and Tensor.new_empty give NaN, so that what a kernel forgets shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and: pytest -m gpu")
    if item.get_closest_marker("aot") and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install 'blipfast[kernels]'")


@pytest.fixture
def finished(tmp_path):
    """A toy run of six steps with checkpoints at 4 and 6."""
    from tests.toy_run import train

    assert train(tmp_path / "run") == 0
    return tmp_path / "run"
