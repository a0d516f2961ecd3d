"""The package. `pip install --no-build-isolation` once torch is there: DeepSpeed is built against it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
readme = here / "README.md"

extras = {
    "train": ["deepspeed>=0.16", "ninja", "packaging", "psutil"],
    "fast": ["simplejpeg>=1.8"],
    "plot": ["matplotlib>=3.8"],
    "tune": ["optuna>=4.5", "matplotlib>=3.8"],
    "video": ["av>=12"],
    "metrics": ["pycocoevalcap>=1.2"],  # METEOR and SPICE, and Java
    "easy-vqa": ["easy-vqa==1.0"],
    "kernels": ["triton>=3.6; sys_platform == 'linux'"],  # CUDA builds of torch bring their own
}
extras["dev"] = (
    extras["kernels"]
    + extras["tune"]
    + [
        "pytest>=8",
        "pytest-benchmark>=5",
        "ruff>=0.9",
        "transformers>=5",
        "webdataset>=1",
    ]
)
extras["all"] = sorted({package for packages in extras.values() for package in packages})

setup(
    name="blipfast",
    version=re.search(r'__version__ = "(.+)"', (here / "blipfast" / "__init__.py").read_text()).group(1),
    description="BLIP pre-training, captioning, matching and retrieval; exact, fast and maintained",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["blipfast", "blipfast.*"]), "blipfast.kernels"],
    package_dir={"blipfast.kernels": "kernels"},
    package_data={
        "blipfast": ["py.typed", "assets/**", "models/*.json"],
        "blipfast.kernels": ["tables/*.json"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "pillow>=10",
        "tokenizers>=0.20.1",
        "safetensors>=0.4.3",
        "pyyaml>=6",
        "tqdm>=4.60",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["blipfast=blipfast.cli:main"]},
)
