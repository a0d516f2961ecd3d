"""Muon: its update against torch's, which matrices it takes, resume, and what it refuses."""

import pytest
import torch

from blipfast.config import TrainConfig
from blipfast.training import deepspeed_engine, loop, optimizer
from blipfast.training.errors import CheckpointError, TrainingError
from blipfast.training.muon import Muon, matrices, orthogonalize
from tests.launch import losses
from tests.toy_run import ToyModel, ToyTask, toy_config

MUON = "train.optimizer=muon"


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40)])
def test_orthogonalize_makes_all_singular_values_about_one_and_keeps_the_directions(shape):
    torch.manual_seed(0)
    batch = torch.randn(3, *shape)
    for matrix, result in zip(batch, orthogonalize(batch).float()):
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        rotated = u.T @ result @ vt.T  # diagonal if the directions stayed
        assert 0.5 < rotated.diagonal().min() and rotated.diagonal().max() < 1.3
        assert (rotated - rotated.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_torchs_muon_and_adamw(weight_decay):
    torch_muon = pytest.importorskip("torch.optim._muon").Muon
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s) * 0.1) for s in [(24, 8), (24, 8), (8, 8), (8, 24), (8,)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [
        {"params": ours[:4], "weight_decay": weight_decay, "muon": True},
        {"params": ours[4:], "weight_decay": weight_decay, "muon": False},
    ]
    both = Muon(groups, lr=0.02)
    optimizer.init_state(both, ours)
    one = torch_muon(theirs[:4], lr=0.02, weight_decay=weight_decay)
    other = torch.optim.AdamW(theirs[4:], lr=0.02, weight_decay=weight_decay)
    start = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        both.step(), one.step(), other.step()
    torch.testing.assert_close(ours[4], theirs[4])
    for p, q, first in zip(ours[:4], theirs, start):
        assert (p - q).norm() < 0.02 * (q - first).norm(), "torch iterates in bf16: equal to its rounding"


def test_matrices_of_layers_take_muon_and_all_else_takes_adamw():
    model = ToyModel(0.0)
    assert set(matrices(model)) == {"blocks.0.weight", "blocks.3.weight"}
    built = optimizer.build_optimizer(
        TrainConfig(optimizer="muon", decay_all=False), model, torch.device("cpu")
    )
    held = [p for group in built.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == sum(p.requires_grad for p in model.parameters())


def test_the_learning_rate_of_matrices_keeps_its_ratio_and_a_resumed_run_repeats_the_losses(tmp_path):
    assert loop.run(toy_config(tmp_path / "whole", MUON, "train.muon_lr=0.02"), ToyTask) == 0
    part = toy_config(tmp_path / "part", MUON, "train.muon_lr=0.02", "train.max_steps=4")
    assert loop.run(part, ToyTask) == 0
    assert loop.run(toy_config(tmp_path / "part", MUON, "train.muon_lr=0.02"), ToyTask) == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert loop.run(toy_config(tmp_path / "other", MUON, "train.muon_lr=0.2"), ToyTask) == 0
    assert losses(tmp_path / "other")[6] != losses(tmp_path / "whole")[6], "muon_lr has an effect"


def test_a_checkpoint_of_adamw_is_refused_with_what_to_do(tmp_path):
    assert loop.run(toy_config(tmp_path / "run", "train.max_steps=2"), ToyTask) == 0
    with pytest.raises(
        CheckpointError, match=r"train.optimizer=adamw, which muon cannot take over.*model.init_from"
    ):
        loop.run(toy_config(tmp_path / "run", MUON), ToyTask)


@pytest.mark.parametrize("section", [{"zero_optimization": {"stage": 2}}, {"bf16": {"enabled": True}}])
def test_zero_that_cuts_matrices_is_refused(section, tmp_path):
    config = toy_config(tmp_path, MUON)
    config.deepspeed = section
    with pytest.raises(ValueError, match="train.optimizer=muon needs whole matrices"):
        deepspeed_engine.deepspeed_config(config, 1)


def test_a_model_without_layers_is_refused():
    with pytest.raises(TrainingError, match="no transformer layers"):
        optimizer.build_optimizer(TrainConfig(optimizer="muon"), torch.nn.Linear(3, 3), torch.device("cpu"))
