"""blipfast: BLIP pre-training, captioning, matching and retrieval; exact, fast and maintained."""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"


class _KernelsOfCheckout:
    """Finds `blipfast.kernels` beside this folder, where a checkout has it, if no installation did.

    In here it would be the top-level `kernels` of `deepspeed blipfast/train.py`, which is Hugging Face's name.
    """

    folder = Path(__file__).resolve().parents[1] / "kernels"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "blipfast.kernels" and (cls.folder / "table.py").is_file():
            return spec_from_file_location(name, cls.folder / "__init__.py")
        return None


sys.meta_path.append(_KernelsOfCheckout)
