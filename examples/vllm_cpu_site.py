"""For `make vllm`, which copies it into the environment as sitecustomize.py: makes torchvision work without CUDA.

Its compiled part needs CUDA libraries and does not load there. Importing torchvision looks up two of its operators,
but no served model calls them, so it is enough to declare them.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class DeclaresOperators(MetaPathFinder):
    """Declares them before the first import of torchvision; finds no modules itself."""

    libraries: list[Any] = []  # noqa: RUF012
    """Declarations live as long as this does."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Called for every import."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                self.libraries.append(library)
        return None


sys.meta_path.insert(0, DeclaresOperators())
