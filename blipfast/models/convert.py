"""A model written for others: official BLIP's `.pth`, safetensors, or a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfast.config import to_dict

from . import huggingface
from .checkpoint import kind_of, read_state_dict, save_weights
from .load import VITS, describe, image_size_of, settings_of
from .med_config import BertConfig
from .weights import locate

# what of a checkpoint each task needs
PARTS = {task: kind.parts for task, kind in huggingface.KINDS.items()} | {
    "features": ("visual_encoder", "text_encoder"),
    "nlvr": ("visual_encoder", "text_encoder", "cls_head"),
}
USE = {
    "data": ("prompt", "clean_captions", "max_words"),
    "evaluate": ("num_beams", "max_length", "min_length", "prompt", "repetition_penalty"),
}
ENDINGS = {"official": (".pth", ".pt"), "safetensors": (".safetensors",), "huggingface": ("",)}


def convert(source: str | Path, to: str, output: str | Path, task: str | None = None) -> str:
    """Write the model in `source` for others, and say what was written.

    to: "official" (.pth that official BLIP and LAVIS load), "safetensors" (ours), "huggingface" (a folder).
    task: of a model that holds more, keep only what this task needs: caption, retrieval, vqa, nlvr, features. A
    Hugging Face folder is of one task; a pre-trained model needs to be told which.
    Raises ValueError or FileNotFoundError, with nothing written, if `source` does not hold it.
    """
    output = Path(output)
    if to not in ENDINGS:
        raise ValueError(f"--to {to}: one of {', '.join(ENDINGS)}.")
    if to != "huggingface" and output.suffix not in ENDINGS[to]:
        raise ValueError(f"{output}: --to {to} writes a file ending in {' or '.join(ENDINGS[to])}.")
    if to != "huggingface":
        state = part_of(read_state_dict(source), task, source)
        save_weights(with_position_ids(state), output)
        return f"wrote {output}: {kind_of(state)} model, {len(state)} tensors{differs(source, state)}"
    model = describe(source)
    task = task or hugging_face_task(model.state, source)
    state = part_of(model.state, task, source)
    if task not in huggingface.KINDS:
        raise ValueError(
            f"{source}: transformers has no BLIP class for {task}; use --to official or safetensors."
        )
    huggingface.write_folder(
        output,
        state,
        task,
        VITS[model.vit] if isinstance(model.vit, str) else VITS["base"] | model.vit,
        image_size_of(state),
        BertConfig.load(model.med_config),
        model.tokenizer,
        model.embed_dim,
        model.vision_eps,
        kept_settings(source),
    )
    return (
        f"wrote {output}/: {huggingface.KINDS[task].architecture}, {len(state)} tensors of {len(model.state)}"
    )


def kept_settings(source: str | Path) -> dict[str, dict[str, Any]]:
    """Of the settings of a model's run those that say how it is used; none where there is no run."""
    folder = locate(source)
    if (folder / "config.yaml").is_file():
        own = to_dict(settings_of(folder))
        return {section: {name: own[section][name] for name in names} for section, names in USE.items()}
    return huggingface.own_settings(folder) if (folder / "config.json").is_file() else {}


def part_of(state: dict[str, Tensor], task: str | None, source: str | Path) -> dict[str, Tensor]:
    """The tensors that `task` needs. ValueError if there are none of some part."""
    if not kind_of(state):
        raise ValueError(
            f"{source}: holds no BLIP model; its tensors are {', '.join(sorted(state)[:4])}, ..."
        )
    if task is None:
        return state
    if task not in PARTS:
        raise ValueError(f"--task {task}: one of {', '.join(PARTS)}.")
    kept = {key: value for key, value in state.items() if key.split(".")[0] in PARTS[task]}
    if missing := [part for part in PARTS[task] if not any(key.startswith(part + ".") for key in kept)]:
        raise ValueError(
            f"{source}: holds a {kind_of(state)} model, without {', '.join(missing)}; --task {task} needs them."
        )
    return kept


def hugging_face_task(state: dict[str, Tensor], source: str | Path) -> str:
    """The task of the only class in transformers that these tensors fill."""
    kind = kind_of(state)
    if kind == "pretrain":
        raise ValueError(
            f"{source}: holds a pretrain model; say which part: --task caption, retrieval or vqa."
        )
    if kind == "features":
        raise ValueError(f"{source}: holds a feature extractor; transformers has no class for it alone.")
    return {"itm": "retrieval"}.get(kind, kind)


def with_position_ids(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the counters 0, 1, 2, ... that official BLIP's checkpoints carry, and its loaders miss when they are gone."""
    ids = {
        key.replace("position_embeddings.weight", "position_ids"): torch.arange(len(value))[None]
        for key, value in state.items()
        if key.endswith("embeddings.position_embeddings.weight")
    }
    return ids | state


def differs(source: str | Path, state: dict[str, Tensor]) -> str:
    """A warning if a folder's settings are not those that official BLIP has in its code."""
    folder = locate(source)
    if (folder / "config.yaml").is_file():
        if kind_of(state) not in ("caption", "pretrain"):
            return ""
        prompt = settings_of(folder).data.prompt
        return (
            ""
            if prompt == huggingface.PROMPT
            else f"; its captions begin with {prompt!r}, to be given as --prompt"
        )
    if not (folder / "config.json").is_file():
        return ""
    theirs, notes = huggingface.read_config(folder), []
    if theirs.vision_eps != huggingface.OFFICIAL_EPS:
        notes.append(f"layer_norm_eps {theirs.vision_eps:g} (official code: 1e-06)")
    if theirs.med["num_attention_heads"] != 12:
        notes.append(f"{theirs.med['num_attention_heads']} text heads (official code: 12)")
    return f"; its config.json says {', '.join(notes)}, which this format cannot hold" if notes else ""
