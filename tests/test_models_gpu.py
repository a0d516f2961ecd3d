"""Training steps of whole models on a GPU, under autocast, by the kernels: what tests of single operations miss."""

from __future__ import annotations

import copy

import pytest
import torch

from blipfast import backends
from blipfast.models.blip import blip_decoder
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.blip_vqa import blip_vqa
from blipfast.text import train_tokenizer
from tests.conftest import BERT, VIT

CAPTIONS = ["a picture of a dog", "two red apples", "a dog", "apples"]
TOKENIZER = train_tokenizer(CAPTIONS, vocab_size=270)
SIZES = dict(
    med_config=BERT | {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
    vit=VIT | {"width": 64, "heads": 2},  # heads of 32, which kernels serve
    image_size=32,
    tokenizer=TOKENIZER,
)
QUEUE = {"queue_size": 8, "embed_dim": 32}
CASES = {
    "decoder": (blip_decoder, {}, lambda model, image: model(image, CAPTIONS)),
    "pretrain": (blip_pretrain, QUEUE, lambda model, image: sum(model(image, CAPTIONS, 0.4))),
    "retrieval": (
        blip_retrieval,
        QUEUE,
        lambda model, image: sum(model(image, CAPTIONS, 0.4, torch.arange(4, device=image.device))),
    ),
    "vqa": (
        blip_vqa,
        {},
        lambda model, image: model(
            image, CAPTIONS, CAPTIONS, n=[1] * 4, weights=torch.ones(4, device=image.device)
        ),
    ),
    "nlvr": (
        blip_nlvr,
        {},
        lambda model, image: model(image, CAPTIONS[:2], torch.tensor([0, 1], device=image.device)),
    ),
}


def gradients(model, step, image, backend: str, bf16: bool) -> torch.Tensor:
    """The loss and all gradients as one vector."""
    torch.manual_seed(7)
    # in fp32 the contrastive kernels, which multiply as TF32 does, serve only if asked for
    served = backends.use(backend) if bf16 else backends.use(backend, contrastive="torch")
    with served, torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
        loss = step(model, image)
    loss.backward()
    found = [loss.detach().float().reshape(1)]
    found += [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def compare(name: str, device: str, kernels: str) -> None:
    make, settings, step = CASES[name]
    torch.manual_seed(0)
    model = make(**copy.deepcopy(SIZES), **settings).to(device).train()
    state = copy.deepcopy(model.state_dict())
    image = torch.randn(4, 3, 32, 32, device=device)
    found = []
    for backend, bf16 in (("torch", False), ("torch", True), (kernels, True), (kernels, False)):
        model.load_state_dict(state)
        found.append(gradients(model, step, image, backend, bf16))
    truth, plain, ours, ours_fp32 = found
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()
    assert (ours_fp32 - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_a_training_step_the_gradients_of_plain_pytorch(name):
    compare(name, "cuda", "triton")


@pytest.mark.gpu
def test_recomputed_blocks_are_served_as_at_first():
    """Backward runs on a thread of its own, which knows nothing of `backends.use`."""
    sizes = copy.deepcopy(SIZES) | {"vit_grad_ckpt": True, "vit_ckpt_layer": 2}
    model = blip_decoder(**sizes).to("cuda").train()
    with backends.use("torch"), torch.autocast("cuda", torch.bfloat16):
        loss = model(torch.randn(4, 3, 32, 32, device="cuda"), CAPTIONS)
    loss.backward()
    assert all(block.attn.qkv.weight.grad.isfinite().all() for block in model.visual_encoder.blocks)
