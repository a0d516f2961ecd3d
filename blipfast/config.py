"""Typed configs: one dataclass a section, read from YAML. What is unknown or wrong is refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blipfast.config_checks import Report, check, show
from blipfast.files import whole


@dataclass
class ModelConfig:
    """What is trained."""

    vit: Any = "base"  # "base", "large", or {width, depth, heads, patch_size} for a ViT of your own
    image_size: int = 224
    med_config: Any = "configs/bert_config.json"  # a BERT config file, or its keys as a mapping
    embed_dim: int = 256
    queue_size: int = 57600
    momentum: float = 0.995
    momentum_dropout: bool = True  # official: dropout and drop-path stay active in the momentum encoders
    vit_grad_ckpt: bool = False
    vit_ckpt_layer: int = 0  # how many of its last layers recompute their activations, under vit_grad_ckpt
    text_grad_ckpt: bool = False
    tokenizer: str = "bert-base-uncased"  # or a tokenizer.json made by `blipfast tokenizer train`
    init_from: str = ""  # a checkpoint to start from (.pth, .safetensors or a run folder)
    allow_random: list[str] = field(default_factory=list)  # weights that init_from may lack: [text_decoder]
    init_vit: str = ""  # DeiT / timm ViT weights for the image encoder
    init_bert: str = ""  # BERT weights for the text encoder and decoder


@dataclass
class LossConfig:
    """The objectives and their weights."""

    itc: float = 1.0
    itm: float = 1.0
    lm: float = 1.0
    mlm: float = 0.0
    alpha: float = 0.4  # weight of the momentum targets, reached after `alpha_ramp_epochs`
    alpha_ramp_epochs: float = 2.0
    temperature: float = 0.07  # initial; learned
    temperature_min: float = 0.001
    temperature_max: float = 0.5
    label_smoothing: float = 0.1
    mlm_probability: float = 0.15
    queue_warmup: int = 0  # samples to see before the queues serve as keys; 0: at once (official)
    duplicates: str = "negative"  # what pairs with equal captions are to each other (official), or "positive"
    negative_all_rank: bool = False  # hard negatives and contrastive keys from every rank

    def alpha_at(self, step: int, steps_per_epoch: int) -> float:
        """`alpha` at a step: a linear ramp over `alpha_ramp_epochs`, then constant."""
        ramp = self.alpha_ramp_epochs * steps_per_epoch
        return self.alpha * min(1.0, step / ramp if ramp else 1.0)


@dataclass
class DataConfig:
    """Pairs, captions and augmentation."""

    train: list[str] = field(default_factory=list)  # .json, .jsonl, a folder, or shards "x-{000..009}.tar"
    format: str = "auto"  # auto, pairs, folder, shards, coco, flickr30k, nocaps, vqa, nlvr, msrvtt
    image_root: str = ""  # what pictures' paths are relative to; empty: the annotation file's own folder
    vg_root: str = ""  # pictures of Visual Genome, for VQA's vg_qa.json
    val: str = ""  # what the best checkpoint is chosen on
    test: str = ""  # Karpathy-style JSON/JSONL or any pairs source, for retrieval and caption evaluation
    answers: str = ""  # VQA: a JSON list of the answers to rank
    test_image_root: str = ""  # image_root of val and test, where it is another
    samples_per_epoch: int = 0  # for shards whose size is not known; 0: count them
    max_words: int = 30  # a caption or question is cut to these, under clean_captions
    max_tokens: int = 30  # and in pre-training then to these tokens, [CLS] and [SEP] included
    clean_captions: bool = True  # official pre_caption: lower case, punctuation to spaces
    prompt: str = ""  # before each caption in training; a captioner starts from it, too
    workers: int = 2
    cache_images: bool = False  # keep decoded pictures in memory (small sets of small pictures)
    min_scale: float = 0.2
    flip: float = 0.5
    randaugment: str = "official"  # official, strong, none
    noise: float = 0.0  # standard deviation of Gaussian pixel noise, in [0, 1] units
    background: str = "white"  # what transparent pixels are laid over: white, black, random
    word_dropout: float = 0.0
    word_swap: float = 0.0
    swap: float = 0.5  # NLVR2: how often the two pictures are exchanged, and the words left and right
    text_hook: str = ""  # "package.module:function", called as function(caption, rng) -> caption

    def root(self, split: str) -> str:
        """The folder of the pictures of "train", "val" or "test"; empty: that of the annotation file."""
        return self.image_root if split == "train" else self.test_image_root or self.image_root


@dataclass
class TrainConfig:
    """The optimizer, its schedule and the loop."""

    epochs: int = 20
    max_steps: int = 0  # stop after this many optimizer steps; 0: run all epochs
    batch_size: int = 75  # per rank and micro-batch
    accumulation: int = 1
    # adamw (ours, with the momentum average), deepspeed, apex, muon (small models from random weights)
    optimizer: str = "adamw"
    lr: float = 3.0e-4
    muon_lr: float = 0.01  # what muon takes in place of lr for the matrices of layers; same schedule
    min_lr: float = 1.0e-6
    warmup_lr: float = 1.0e-6
    warmup_steps: int = 3000
    schedule: str = "step"  # step (official pre-training), cosine (per epoch), warmup_cosine (per step)
    lr_decay_rate: float = 0.9
    weight_decay: float = 0.05
    decay_all: bool = True  # official: weight decay also on biases, norms and the temperature
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1.0e-8
    grad_clip: float = 0.0  # 0: none (official)
    precision: str = (
        "fp32"  # fp32, bf16 (autocast, fp32 weights), auto (bf16 where the hardware is fast at it)
    )
    deterministic: bool = False
    log_every: int = 50
    save_every: int = 0  # optimizer steps between checkpoints; 0: at the end of each epoch
    keep_checkpoints: int = 2
    evaluate_every: int = 0  # epochs between evaluations; 0: at the end only
    select: str = (
        ""  # metric that chooses the best weights, higher is better; empty: the task's official rule
    )
    patience: int = 0  # evaluations without a better one before training stops; 0: run all epochs


@dataclass
class EvaluateConfig:
    """Evaluation, during and after training: how to search, rank and score, and in which precision."""

    batch_size: int = 64
    precision: str = "fp32"  # fp32, bf16, fp16, int8, fp8 (GPU), auto (bf16 where the hardware is fast at it)
    k_test: int = 128  # retrieval: how many found by ITC are reranked by ITM; VQA: answers scored as a whole
    num_beams: int = 3
    max_length: int = 20  # of a caption, in tokens, the prompt's included
    min_length: int = 5
    prompt: str = ""  # what captions start from; empty: data.prompt
    repetition_penalty: float = 1.0
    score: str = "itm+itc"  # retrieval reranking: ITM logit + ITC cosine (official), itm or itc alone
    inference: str = "rank"  # VQA: rank the answer list, or generate
    # evaluate as official BLIP does, faults included: NLVR2 swaps pictures, VQA's generation reads the padding
    official_quirks: bool = False
    scorer: str = (
        "blipfast"  # of captions: ours (BLEU, ROUGE-L, CIDEr), or pycocoevalcap (Java; METEOR, SPICE too)
    )
    frames: int = 8  # of a video
    gallery: int = 60  # pictures shown in the gallery


@dataclass
class Config:
    """A whole run. `deepspeed` is handed to DeepSpeed as it is."""

    task: str = "pretrain"
    output: str = "runs/pretrain"
    seed: int = 42
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line a problem."""


# Official BLIP's names, for whoever brings one of its YAML files.
OFFICIAL_NAMES = {
    "vit": "model.vit", "image_size": "model.image_size",
    "pretrained": "model.init_from", "queue_size": "model.queue_size",
    "vit_grad_ckpt": "model.vit_grad_ckpt", "vit_ckpt_layer": "model.vit_ckpt_layer",
    "alpha": "loss.alpha", "negative_all_rank": "loss.negative_all_rank",
    "train_file": "data.train", "laion_path": "data.train", "dataset": "data.format", "image_root": "data.image_root",
    "ann_root": "data.train or data.test", "coco_gt_root": "data.test", "prompt": "data.prompt",
    "batch_size": "train.batch_size", "batch_size_train": "train.batch_size", "max_epoch": "train.epochs",
    "init_lr": "train.lr", "min_lr": "train.min_lr", "warmup_lr": "train.warmup_lr",
    "warmup_steps": "train.warmup_steps", "lr_decay_rate": "train.lr_decay_rate",
    "weight_decay": "train.weight_decay", "batch_size_test": "evaluate.batch_size", "k_test": "evaluate.k_test",
    "vqa_root": "data.image_root", "vg_root": "data.vg_root", "train_files": "data.train",
    "video_root": "data.image_root",
    "inference": "evaluate.inference", "num_frm_test": "evaluate.frames",
    "repetition_penalty": "evaluate.repetition_penalty",
    "num_beams": "evaluate.num_beams", "max_length": "evaluate.max_length", "min_length": "evaluate.min_length",
}  # fmt: skip


def load_config(path: str | Path, overrides: list[str] = []) -> Config:
    """Read a YAML config, then apply `overrides` such as "train.lr=1e-4" or "data.train=[a.json, b.json]".

    Paths inside the config stay as written, relative to the working directory.
    Raises ConfigError, naming file, line and setting: file missing, empty or not YAML, unknown or repeated
    settings, wrong types, values out of range.
    """
    values, origins = read_yaml(Path(path))
    for override in overrides:
        _apply_override(values, origins, override)
    return config_from_dict(values, str(path), origins)


def config_from_dict(
    values: dict[str, Any], source: str = "config", origins: dict[str, str] | None = None
) -> Config:
    """Build a checked Config from nested mappings, as `to_dict` gives them; what is not named keeps its default.

    `origins` says where a setting was written ("train.lr" -> "my.yaml:7"), for messages; otherwise they name `source`.
    Raises ConfigError with all problems found.
    """
    problems: list[str] = []

    def report(name: str, message: str) -> None:
        problems.append(f"{(origins or {}).get(name, source)}: {message}")

    config = _build(Config, values, "", report)
    if not problems:  # ranges make sense only once every type is right
        check(config, report)
    if problems:
        raise ConfigError("\n".join(problems))
    config.output, config.data.answers = map(os.path.expanduser, (config.output, config.data.answers))
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting as YAML that `load_config` reads back to an equal Config; an old file is replaced whole."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts and lists."""
    return dataclasses.asdict(config)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number: YAML 1.1 asks for a dot and a signed exponent."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's nested values, and for each dotted setting the "file:line" it is written on."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        origins = {} if root is None else _origins(root, path)
        values = None if root is None else loader.construct_document(root)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: there is no such config file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file. A config is a YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if values is None:
        raise ConfigError(f"{path}: the file is empty. A config has sections such as `data:` and `train:`.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as `train: {{lr: 3e-4}}`, found {show(values)}.")
    return values, origins


def _origins(node: yaml.Node, path: Path, prefix: str = "") -> dict[str, str]:
    """Walk the mappings below `node`; raises ConfigError for a setting written twice."""
    origins: dict[str, str] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, where = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
        if name in origins:
            raise ConfigError(f"{where}: {name} is set twice, first at {origins[name]}. Keep one of the two.")
        origins |= {name: where} | _origins(value, path, f"{name}.")
    return origins


def _apply_override(values: dict[str, Any], origins: dict[str, str], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {override}: expected name=value, such as train.lr=1e-4.")
    *sections, key = name.strip().split(".")
    for depth, section in enumerate(sections):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            above = ".".join(sections[: depth + 1])
            raise ConfigError(f"--set {override}: {above} is {show(values)}, which has no settings inside.")
    values[key] = _override_value(name.strip(), text)
    origins[name.strip()] = "--set"


def _override_value(name: str, text: str) -> Any:
    if _field_types().get(name) is str and not text.startswith(("'", '"')):
        return text  # as typed: a prompt may end in a space, a run may be called 2024
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {name}={text}: cannot read the value. Lists are [a, b], mappings {{a: 1}}."
        ) from None


def _field_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every setting's dotted name -> its annotated type; sections are included."""
    types = {}
    for name, hint in typing.get_type_hints(cls).items():
        types[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            types |= _field_types(hint, f"{prefix}{name}.")
    return types


def _build(cls: type, values: dict[str, Any], prefix: str, report: Report) -> Any:
    """Make the dataclass `cls` from `values`; what is wrong goes to `report` and keeps its default."""
    types = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in types:
            report(name, f"{name} is not a setting. {_suggestion(prefix, str(key))}".rstrip())
        elif dataclasses.is_dataclass(types[key]):
            if value is not None and not isinstance(value, dict):
                report(name, f"{name} is a section; expected settings inside it, found {show(value)}.")
            else:  # a section left empty keeps its defaults
                built[key] = _build(types[key], value or {}, f"{name}.", report)
        else:
            try:
                built[key] = _convert(value, types[key])
            except TypeError as expected:
                report(name, f"{name} is {show(value)}; expected {expected}.")
    return cls(**built)


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type; whole floats pass as integers. Raises TypeError saying what was expected."""
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        try:
            return [_convert(entry, item) for entry in (value if isinstance(value, list) else [None])]
        except TypeError:
            raise TypeError(_EXPECTED[hint]) from None
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint == dict[str, Any] and (value is None or isinstance(value, dict)):
        return value or {}
    if hint is float and number:
        return float(value)
    if hint is int and number and value == int(value):
        return int(value)
    if hint is Any or (hint in (bool, str) and isinstance(value, hint)):
        return value
    raise TypeError(_EXPECTED[hint])


_EXPECTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of text, such as [a.json, b.json]",
    list[float]: "a list of numbers, such as [0.9, 0.999]",
    dict[str, Any]: "a mapping, such as {name: value}",
}


def _suggestion(prefix: str, key: str) -> str:
    """`Did you mean train.batch_size?`: the closest name of the section, or official BLIP's, or one elsewhere."""
    names = list(_field_types())
    here = {
        name.removeprefix(prefix): name for name in names if name.rpartition(".")[0] == prefix.rstrip(".")
    }
    everywhere = {
        name.rpartition(".")[2]: name for name in reversed(names)
    }  # the first section's, if in several
    for known, cutoff in ((here, 0.8), (OFFICIAL_NAMES, 1.0), (everywhere, 0.75), (here, 0.6)):
        for close in difflib.get_close_matches(key, known, n=1, cutoff=cutoff):
            return f"Did you mean {known[close]}?"
    return f"Known here: {', '.join(here.values())}."
