"""Names and shapes in a state_dict are those of official BLIP, for its 14 models: released checkpoints load."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pytest
import torch

from blipfast import reference

KEYS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "blip_keys.json.gz").read_bytes()))
# kind -> module and factory of blipfast.models, class in the reference, side of a picture in the list
KINDS = {
    "decoder": ("blip", "blip_decoder", reference.BLIP_Decoder, 384),
    "feature_extractor": ("blip", "blip_feature_extractor", reference.BLIP_Base, 224),
    "itm": ("blip_itm", "blip_itm", reference.BLIP_ITM, 384),
    "vqa": ("blip_vqa", "blip_vqa", reference.BLIP_VQA, 480),
    "nlvr": ("blip_nlvr", "blip_nlvr", reference.BLIP_NLVR, 480),
    "retrieval": ("blip_retrieval", "blip_retrieval", reference.BLIP_Retrieval, 384),
    "pretrain": ("blip_pretrain", "blip_pretrain", reference.BLIP_Pretrain, 224),
}


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def build(name: str, **options) -> torch.nn.Module:
    """A drop-in model on the meta device, its picture size that of the official default."""
    kind, vit = name.rsplit("_", 1)
    module, factory, _, _ = KINDS[kind]
    with torch.device("meta"):
        return getattr(importlib.import_module(f"blipfast.models.{module}"), factory)(vit=vit, **options)


def test_the_list_has_the_14_official_models():
    assert set(KEYS) == {f"{kind}_{vit}" for kind in KINDS for vit in ("base", "large")}


@pytest.mark.parametrize("name", KEYS)
def test_a_model_has_the_official_keys_and_shapes(name):
    assert shapes(build(name)) == KEYS[name]


@pytest.mark.parametrize("name", KEYS)
def test_the_reference_has_the_official_keys_and_shapes(name):
    kind, vit = name.rsplit("_", 1)
    with torch.device("meta"):
        model = KINDS[kind][2](vit=vit, image_size=KINDS[kind][3])
    assert shapes(model) == KEYS[name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_without_position_ids_loads_strictly(kind):
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = {"width": 24, "depth": 1, "heads": 2, "patch_size": 8}
    module, factory, _, _ = KINDS[kind]
    queue = {"queue_size": 8} if kind in ("retrieval", "pretrain") else {}
    make = getattr(importlib.import_module(f"blipfast.models.{module}"), factory)
    model = make(vit=vit, image_size=16, med_config=small, **queue)
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith("position_ids")}
    assert not model.load_state_dict(weights, strict=True).missing_keys


def test_parameter_counts_are_those_of_the_paper():
    """Trainable parameters in millions; pre-training: Table 3, all shared but self-attention."""

    def millions(name: str) -> float:
        return sum(p.numel() for p in build(name).parameters() if p.requires_grad) / 1e6

    assert millions("pretrain_base") == pytest.approx(252.4, abs=0.1)
    assert millions("decoder_base") == pytest.approx(224.0, abs=0.1)
    assert millions("vqa_base") == pytest.approx(361.5, abs=0.1)
    assert millions("nlvr_large") == pytest.approx(486.7, abs=0.1)
