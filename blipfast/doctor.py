"""What this machine and this installation can do, for `blipfast doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import blipfast

CPU_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
CORE = ("torch", "numpy", "pillow", "tokenizers", "safetensors", "PyYAML", "tqdm")
OPTIONAL = {
    "deepspeed": "training with ZeRO and several ranks: pip install 'blipfast[train]'",
    "triton": "GPU kernels; comes with the CUDA build of torch, else pip install 'blipfast[kernels]'",
    "flash-attn": "another backend of attention; not needed",
    "xformers": "another backend of attention; not needed",
    "simplejpeg": "faster JPEG decoding: pip install 'blipfast[fast]'",
    "matplotlib": "loss curves: pip install 'blipfast[plot]'",
    "optuna": "searching hyperparameters: pip install 'blipfast[tune]'",
    "pycocoevalcap": "METEOR and SPICE of captions, with Java: pip install 'blipfast[metrics]'",
    "av": "retrieval of videos: pip install 'blipfast[video]'",
}


def report() -> str:
    """A table of lines `name  state`. Imports torch; looks at everything else without importing it."""
    lines = {
        "blipfast": blipfast.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "compiler": compiler(),
        "gpu": gpu(),
    }
    for package in CORE:
        lines[package] = installed(package) or f"missing: pip install {package}"
    for package, use in OPTIONAL.items():
        lines[package] = installed(package) or f"not installed ({use})"
    lines["apex"] = apex()
    lines |= operations()
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {state}" for name, state in lines.items())


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """Cores this process may use, and the instruction sets that matter for speed (Linux only)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().lower().split()) if info.exists() else set()
    features = [feature for feature in CPU_FEATURES if feature in words]
    return f"{cores} cores; {', '.join(features) or 'features unknown'}"


def compiler() -> str:
    """The C++ compiler and ninja, which DeepSpeed's own operators are built with."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)
    ninja = "ninja found" if shutil.which("ninja") else "no ninja"
    return f"{found or 'none (DeepSpeed with several ranks needs one)'}; {ninja}"


def gpu() -> str:
    """The GPUs torch can use, or why there are none."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"unknown, torch does not load ({error})"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none that torch sees (built for {built})" if built else "none (torch is a CPU build)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    return f"{', '.join(names)}; CUDA {torch.version.cuda}, compute capability {major}.{minor}"


def operations() -> dict[str, str]:
    """What precision "auto" is, who serves each operation on each device, and why.

    See `blipfast.backends` for how to overrule the latter.
    """
    try:
        import torch

        from . import backends, ops
        from .precision import dtype_of
    except (ImportError, OSError) as error:
        return {"operations": f"unknown, torch does not load ({error})"}
    ops.load_all()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    lines = {
        f"precision auto ({device})": str(dtype_of("auto", device)).removeprefix("torch.")
        for device in devices
    }
    return lines | {f"{op} ({device})": f"{name}: {why}" for op, device, name, why in backends.describe()}


def apex() -> str:
    """Whether NVIDIA's apex is there: `apex` on PyPI is another project, so look for the parts we would use."""
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations if spec else None) or []
    if not spec:
        return "not installed (train.optimizer: apex needs NVIDIA's, built from its source)"
    if not any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return (
            "another package of that name, not NVIDIA's (pip uninstall apex; build NVIDIA's from its source)"
        )
    if importlib.util.find_spec("amp_C") is None:
        return "NVIDIA's, without its CUDA extension amp_C (rebuild it with --cuda_ext)"
    return "NVIDIA's, with amp_C"
