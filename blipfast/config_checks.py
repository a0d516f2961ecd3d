"""What values settings may have, and which of them contradict each other."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blipfast.config import Config, ModelConfig

Report = Callable[[str, str], None]

SCHEDULES = ("step", "cosine", "warmup_cosine")
_CHOICES = {
    "loss.duplicates": ("negative", "positive"),
    "data.format": (
        "auto",
        "pairs",
        "folder",
        "shards",
        "coco",
        "flickr30k",
        "nocaps",
        "vqa",
        "nlvr",
        "msrvtt",
    ),
    "data.randaugment": ("official", "strong", "none"),
    "data.background": ("white", "black", "random"),
    "train.optimizer": ("adamw", "deepspeed", "apex", "muon"),
    "train.schedule": SCHEDULES,
    "train.precision": ("fp32", "bf16", "auto"),
    "evaluate.precision": ("fp32", "bf16", "fp16", "int8", "fp8", "auto"),
    "evaluate.score": ("itm+itc", "itm", "itc"),
    "evaluate.inference": ("rank", "generate"),
    "evaluate.scorer": ("blipfast", "pycocoevalcap"),
}

_TASKS = ("pretrain", "caption", "retrieval", "vqa", "nlvr")

# (lowest, highest, whether the lowest itself is refused): the settings it holds for
_RANGES = {
    (1, math.inf, False): """
        model.image_size model.embed_dim model.queue_size data.max_words train.epochs train.batch_size
        train.accumulation train.log_every train.keep_checkpoints evaluate.batch_size evaluate.k_test
        evaluate.num_beams evaluate.max_length evaluate.frames""",
    (3, math.inf, False): "data.max_tokens",  # [CLS], one token, [SEP]
    (0, math.inf, False): """
        seed model.vit_ckpt_layer loss.itc loss.itm loss.lm loss.mlm loss.alpha_ramp_epochs loss.queue_warmup
        data.samples_per_epoch data.workers data.noise train.max_steps train.min_lr train.warmup_lr
        train.warmup_steps train.weight_decay train.grad_clip train.save_every train.evaluate_every
        train.patience evaluate.min_length evaluate.gallery""",
    (0, math.inf, True): """
        loss.temperature loss.temperature_min loss.temperature_max train.lr train.muon_lr train.eps
        evaluate.repetition_penalty""",
    (0, 1, False): """
        model.momentum loss.alpha loss.label_smoothing loss.mlm_probability data.flip data.swap
        data.word_dropout data.word_swap""",
    (0, 1, True): "data.min_scale train.lr_decay_rate",
}

_DEEPSPEED_SECTIONS = (
    "zero_optimization bf16 fp16 amp activation_checkpointing comms_logger flops_profiler tensorboard wandb "
    "csv_monitor timers aio optimizer scheduler data_types"
).split()
_DEEPSPEED = [  # the settings of DeepSpeed that people write; others are handed to it as they are
    *_DEEPSPEED_SECTIONS,
    *"train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping".split(),
    *"communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients steps_per_print".split(),
    *"wall_clock_breakdown dump_state memory_breakdown zero_allow_untested_optimizer".split(),
    *"zero_force_ds_cpu_optimizer disable_allgather seq_parallel_communication_data_type checkpoint".split(),
]


def check(config: Config, report: Report) -> None:
    """Report what no run could use: values outside their range, settings that contradict each other.

    `report(name, message)` is called once a problem.
    """

    def value_of(name: str) -> Any:
        section, _, key = name.rpartition(".")
        return getattr(getattr(config, section) if section else config, key)

    for name, choices in _CHOICES.items():
        if value_of(name) not in choices:
            report(name, f"{name} is {show(value_of(name))}; expected one of {', '.join(choices)}.")
    if config.task not in _TASKS and not re.fullmatch(r"[\w.]+:\w+", config.task):
        message = (
            f"task is {show(config.task)}; expected one of {', '.join(_TASKS)}, or your own as module:Class."
        )
        report("task", message)
    for (low, high, open_below), names in _RANGES.items():
        expected = ("above" if open_below else "at least") + f" {low}"
        expected += f" and at most {high}" if high < math.inf else ""
        for name in names.split():
            value = value_of(name)
            if not low <= value <= high or (open_below and value == low):
                report(name, f"{name} is {value}; expected {expected}.")
    check_model(config.model, report)
    loss, train, evaluate = config.loss, config.train, config.evaluate
    if not any((loss.itc, loss.itm, loss.lm, loss.mlm)):
        report("loss", "loss.itc, loss.itm, loss.lm and loss.mlm are all 0, so nothing would train.")
    if not loss.temperature_min <= loss.temperature <= loss.temperature_max:
        report(
            "loss.temperature",
            f"loss.temperature is {loss.temperature}, outside loss.temperature_min {loss.temperature_min}"
            f" to loss.temperature_max {loss.temperature_max}.",
        )
    if train.min_lr > train.lr:
        report("train.min_lr", f"train.min_lr {train.min_lr} is above train.lr {train.lr}.")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        report("train.betas", f"train.betas is {train.betas}; expected two numbers from 0 to below 1.")
    if evaluate.min_length > evaluate.max_length:
        report(
            "evaluate.min_length",
            f"evaluate.min_length {evaluate.min_length} is above evaluate.max_length {evaluate.max_length}.",
        )
    check_deepspeed(config.deepspeed, report)
    hook = config.data.text_hook
    if hook and not re.fullmatch(r"[\w.]+:\w+", hook):
        report("data.text_hook", f"data.text_hook is {show(hook)}; expected package.module:function.")


def check_deepspeed(settings: dict[str, Any], report: Report) -> None:
    """Report what DeepSpeed would pass over in silence, or trip over: misspelt settings, sections that are none."""
    for key, value in settings.items():
        close = difflib.get_close_matches(key, _DEEPSPEED, 1, 0.8)
        if close and key not in _DEEPSPEED:
            report(
                f"deepspeed.{key}", f"deepspeed.{key} is not a setting. Did you mean deepspeed.{close[0]}?"
            )
        if key in _DEEPSPEED_SECTIONS and not isinstance(value, dict):
            report(f"deepspeed.{key}", f"deepspeed.{key} is {show(value)}; expected a mapping of settings.")
    zero = settings.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if type(stage) is not int or not 0 <= stage <= 3:
        name = "deepspeed.zero_optimization.stage"
        report(name, f"{name} is {show(stage)}; expected 0, 1, 2 or 3.")


def check_model(model: ModelConfig, report: Report) -> None:
    """Report an image encoder that cannot be built. `model.vit` as a mapping needs width, depth and heads."""
    vit = model.vit
    sizes = {"patch_size": 16}
    if isinstance(vit, dict):
        sizes |= {key: size for key, size in vit.items() if key != "drop_path"}
        if set(sizes) != {"width", "depth", "heads", "patch_size"}:
            report(
                "model.vit", f"model.vit is {show(vit)}; expected width, depth, heads, patch_size, drop_path."
            )
            return
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            report("model.vit", f"model.vit is {show(vit)}; expected positive whole numbers.")
            return
        drop_path = vit.get("drop_path", 0.0)
        if type(drop_path) not in (int, float) or not 0 <= drop_path < 1:
            report("model.vit.drop_path", f"model.vit.drop_path is {show(drop_path)}; expected 0 to below 1.")
        if sizes["width"] % sizes["heads"]:
            report(
                "model.vit", f"model.vit.width {sizes['width']} is no multiple of its heads {sizes['heads']}."
            )
    elif vit not in ("base", "large"):
        report(
            "model.vit",
            f"model.vit is {show(vit)}; expected base, large or {{width, depth, heads, patch_size}}.",
        )
    if model.image_size % sizes["patch_size"]:
        message = (
            f"model.image_size {model.image_size} is no multiple of the patch size {sizes['patch_size']}."
        )
        report("model.image_size", message)
    if not isinstance(model.med_config, str | dict):
        message = f"model.med_config is {show(model.med_config)}; expected a path or a mapping."
        report("model.med_config", message)


def show(value: Any) -> str:
    """A value as the user would recognise it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
