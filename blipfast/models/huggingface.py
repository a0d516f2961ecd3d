"""Hugging Face's BLIP and ours: names of tensors both ways, configs both ways, and folders that transformers loads.

What differs there, and is set or said here: text heads default to 8 (BLIP: 12), the image encoder's LayerNorm eps to
1e-5 (BLIP: 1e-6), dropout and label smoothing to 0. transformers never puts [ENC] first; a VQA folder's tokenizer does
it for every text. Its matcher gets one text for both heads, and ITC wants [CLS]: put [ENC] there yourself for ITM.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import processors
from torch import Tensor

from blipfast.data.transforms import MEAN, STD
from blipfast.text import VOCAB, Tokenizer, init_tokenizer

from .med_config import BertConfig
from .tensor_file import write_tensors

# in this order from ours to theirs, and in this order back
NAMES = (
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
# what transformers makes of another tensor when it loads, and so never stores
DERIVED = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
CROSS_KEY = "layer.0.crossattention.self.key.weight"  # [text width, width of what is read]
OFFICIAL_EPS = 1e-6
PROMPT = "a picture of "
THEIR_DEFAULTS = {"num_attention_heads": 8, "layer_norm_eps": 1e-12}  # of a text_config that leaves them out


class Kind(NamedTuple):
    """A class of transformers and what it holds."""

    architecture: str
    parts: tuple[str, ...]
    first: str  # the token that its tokenizer puts first
    generation: dict[str, int]


KINDS = {
    "caption": Kind(
        "BlipForConditionalGeneration",
        ("visual_encoder", "text_decoder"),
        "[CLS]",
        {"num_beams": 3, "max_length": 20, "min_length": 5},
    ),
    "retrieval": Kind(
        "BlipForImageTextRetrieval",
        ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"),
        "[CLS]",
        {},
    ),
    "vqa": Kind(
        "BlipForQuestionAnswering",
        ("visual_encoder", "text_encoder", "text_decoder"),
        "[ENC]",
        {"num_beams": 3, "max_length": 10, "min_length": 1},
    ),
}


def to_hugging_face(key: str) -> str:
    """Hugging Face's name of an official tensor."""
    if key.startswith("visual_encoder."):
        for ours, theirs in NAMES:
            key = key.replace(ours, theirs)
    return key


def to_official(key: str) -> str:
    """Official BLIP's name of a Hugging Face tensor."""
    if key.startswith("vision_model."):
        for ours, theirs in NAMES:
            key = key.replace(theirs, ours)
    return key


def hugging_face_state(state: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """The tensors of `task`'s class in transformers, under its names. ValueError if `state` lacks some of them."""
    kind = KINDS[task]
    kept = {key: value for key, value in state.items() if key.split(".")[0] in kind.parts}
    if missing := [part for part in kind.parts if not any(key.startswith(part + ".") for key in kept)]:
        raise ValueError(
            f"{kind.architecture} needs {', '.join(missing)}, which the checkpoint does not hold."
        )
    read = {key.split(".")[0]: value.shape[1] for key, value in kept.items() if key.endswith(CROSS_KEY)}
    if len(set(read.values())) > 1:
        raise ValueError(
            f"transformers has no {kind.architecture} whose image encoder is {read['text_encoder']} wide and whose "
            f"texts are {read['text_decoder']}: it gives both text models one config. Use --to official or safetensors."
        )
    return {
        to_hugging_face(key): value.detach().cpu().clone().contiguous()
        for key, value in kept.items()
        if not key.endswith(DERIVED)
    }


def hugging_face_config(
    task: str,
    vit: dict[str, int],
    image_size: int,
    med: BertConfig,
    tokenizer: Tokenizer,
    embed_dim: int = 256,
    vision_eps: float = OFFICIAL_EPS,
    settings: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """config.json of a model. vit: {width, depth, heads, patch_size}. settings: of blipfast's, see `own_settings`."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    text = {
        "model_type": "blip_text_model",
        "encoder_hidden_size": vit["width"],
        "hidden_act": "gelu",
        "is_decoder": True,
        "projection_dim": med.hidden_size,
        "label_smoothing": med.label_smoothing,
        "vocab_size": len(tokenizer),
    } | {name: getattr(med, name) for name in SHARED}
    vision = {
        "model_type": "blip_vision_model",
        "hidden_size": vit["width"],
        "intermediate_size": 4 * vit["width"],
        "num_hidden_layers": vit["depth"],
        "num_attention_heads": vit["heads"],
        "patch_size": vit["patch_size"],
        "image_size": image_size,
        "hidden_act": "gelu",
        "layer_norm_eps": vision_eps,
    }
    return {
        "architectures": [KINDS[task].architecture],
        "model_type": "blip",
        "image_text_hidden_size": embed_dim,
        "projection_dim": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "text_config": text | special,
        "vision_config": vision,
    } | ({"blipfast": settings} if settings else {})


SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
)


class Described(NamedTuple):
    """What a Hugging Face config says of a model."""

    vit: dict[str, int]  # width, depth, heads, patch_size
    image_size: int
    med: dict[str, Any]
    embed_dim: int
    vision_eps: float
    vocab_size: int


def own_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of the run that a folder was made from, which transformers has no place for: {"data", "evaluate"}."""
    settings = read_json(folder / "config.json").get("blipfast")
    return settings if isinstance(settings, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file, empty if it holds something else. ValueError if it is not JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    return config if isinstance(config, dict) else {}


def read_config(folder: Path) -> Described:
    """A folder's config.json; what it leaves out is transformers' default. ValueError if it is no BLIP model's."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "blip":
        raise ValueError(f'{path}: a model of type {config.get("model_type")!r}; expected "blip".')
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    for section in (text, vision):
        if section.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f'{path}: hidden_act {section["hidden_act"]!r}; BLIP has "gelu" (exact) everywhere.'
            )
    width = vision.get("hidden_size", 768)
    if vision.get("intermediate_size", 4 * width) != 4 * width:
        raise ValueError(f"{path}: the image encoder's intermediate_size must be 4 x {width}.")
    med = THEIR_DEFAULTS | {name: text[name] for name in SHARED if name in text and "dropout" not in name}
    vit = {
        "width": width,
        "depth": vision.get("num_hidden_layers", 12),
        "heads": vision.get("num_attention_heads", 12),
        "patch_size": vision.get("patch_size", 16),
    }
    return Described(
        vit,
        vision.get("image_size", 384),
        med,
        config.get("image_text_hidden_size", 256),
        vision.get("layer_norm_eps", 1e-5),
        text.get("vocab_size", 30524),
    )


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, [DEC] and [ENC] added where it has only BERT's tokens."""
    path = folder / "tokenizer.json"
    if path.is_file():
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.add_special_tokens(["[DEC]", "[ENC]"])
        tokenizer = Tokenizer(backend, str(path))
    else:
        words = folder / "vocab.txt"
        bert = VOCAB.read_text(encoding="utf-8").splitlines()
        if words.is_file() and words.read_text(encoding="utf-8").splitlines()[: len(bert)] != bert:
            raise ValueError(
                f"{words}: not the vocabulary of bert-base-uncased, and there is no tokenizer.json."
            )
        tokenizer = init_tokenizer()
    if len(tokenizer) != vocab_size:
        raise ValueError(f"{path}: {len(tokenizer)} tokens, but the model embeds {vocab_size}.")
    return tokenizer


def write_folder(
    output: Path,
    state: dict[str, Tensor],
    task: str,
    vit: dict[str, int],
    image_size: int,
    med: BertConfig,
    tokenizer: Tokenizer,
    embed_dim: int = 256,
    vision_eps: float = OFFICIAL_EPS,
    settings: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write the folder that transformers loads as `task`'s class; whole or not at all. An old one is never touched.

    settings: {"data", "evaluate"} of the run, to be found there again by `own_settings`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not empty. Give another --output, or remove it first.")
    weights = hugging_face_state(state, task)
    config = hugging_face_config(task, vit, image_size, med, tokenizer, embed_dim, vision_eps, settings)
    own = (settings or {}).get("evaluate", {}) if task == "caption" else {}
    limits = {name: own.get(name, value) for name, value in KINDS[task].generation.items()}
    prompt = (settings or {}).get("data", {}).get("prompt", PROMPT)
    unfinished = output.with_name(output.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_tensors(unfinished / "model.safetensors", weights, {"format": "pt"})
        write_json(unfinished / "config.json", config)
        write_tokenizer(unfinished, tokenizer, KINDS[task].first)
        write_json(unfinished / "preprocessor_config.json", preprocessor(image_size))
        write_json(unfinished / "processor_config.json", {"processor_class": "BlipProcessor"})
        ids = {key: value for key, value in config["text_config"].items() if key.endswith("_token_id")}
        ids.pop("sep_token_id")
        write_json(unfinished / "generation_config.json", ids | limits)
        (unfinished / "README.md").write_text(readme(task, prompt, limits), encoding="utf-8")
        if output.exists():
            output.rmdir()
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, first: str) -> None:
    """tokenizer.json, its config and, for BERT's words, vocab.txt; every text starts with the token `first`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    pair = [(token, backend.token_to_id(token)) for token in (first, "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single=f"{first} $A [SEP]", special_tokens=pair)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "bos": "[DEC]"}
    special = {f"{name}_token": token for name, token in names.items()}
    special["additional_special_tokens"] = ["[ENC]"]
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "processor_class": "BlipProcessor",
    }
    write_json(folder / "tokenizer_config.json", settings | special)
    if isinstance(backend.model, tokenizers.models.WordPiece):
        words = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")


def preprocessor(image_size: int) -> dict[str, Any]:
    """Official BLIP's evaluation transform: squeezed to a square, bicubic, CLIP's mean and deviation."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def readme(task: str, prompt: str, limits: dict[str, int]) -> str:
    """How to get blipfast's results of `task` from transformers."""
    name, limits = KINDS[task].architecture, ", ".join(f"{k}={v}" for k, v in limits.items())
    say = {
        "caption": f'inputs = processor(image, "{prompt.strip()}", return_tensors="pt")\n'
        f"ids = model.generate(**inputs, {limits})\nprint(processor.decode(ids[0], skip_special_tokens=True))",
        "vqa": f'inputs = processor(image, "what is it?", return_tensors="pt")  # begins with [ENC]\n'
        f"ids = model.generate(**inputs, {limits})\nprint(processor.decode(ids[0], skip_special_tokens=True))",
        "retrieval": 'inputs = processor(image, "a dog", return_tensors="pt")\n'
        "cosine = model(**inputs, use_itm_head=False).itm_score\n"
        'inputs.input_ids[:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as the ITM head was trained\n'
        "match = model(**inputs).itm_score.softmax(1)[:, 1]",
    }[task]
    return (
        f"# BLIP, {task}\n\nWritten by blipfast from weights in BLIP's own format.\n\n```python\n"
        f'from transformers import BlipProcessor, {name}\n\nprocessor = BlipProcessor.from_pretrained(".")\n'
        f'model = {name}.from_pretrained(".")\n{say}\n```\n'
    )
