"""Operations of the models, one file each: public function, PyTorch path, autograd, choice of backend."""

import importlib
import pkgutil


def load_all() -> None:
    """Import every operation, so that `backends.describe` knows it."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
