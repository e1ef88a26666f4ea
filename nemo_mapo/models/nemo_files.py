"""What a `.nemo` file or a NeMo module's config may hold: weights, and classes of NeMo.

NeMo unpickles the weights it finds and builds whatever class a config names, and both can run code. So both are
checked here first.
"""

import importlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from nemo_mapo.config.yaml_files import read_yaml
from nemo_mapo.models.untrusted import refuse_pickled_code

_TARGETS: Final = ("_target_", "target", "cls")
"""Keys under which NeMo and Hydra look for a class to build."""
_REMOTE_CODE: Final = "trust_remote_code"
"""Argument of NeMo's own AutoTokenizer."""
_NEMO: Final = ("nemo.collections.", "nemo.core.")
_WEIGHTS: Final = (".ckpt", ".pt", ".pth", ".bin")


def refuse_code(archive: Path) -> None:
    """ValueError, naming file and member, if restoring a `.nemo` file could run code or write outside its folder.

    refuse_code(Path("parakeet.nemo"))
    """
    with tarfile.open(archive) as members:
        for member in members:
            where = f"{archive}: {member.name}"
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise ValueError(f"{where} is a link, a device, or lies outside the archive: do not use this file")
            content = members.extractfile(member)
            if content is None:
                continue
            if path.suffix in _WEIGHTS:
                refuse_pickled_code(io.BytesIO(content.read()), where)
            elif path.suffix in (".yaml", ".yml"):
                refuse_foreign_classes(read_yaml(content.read(), where), where)


def refuse_foreign_classes(config: Any, where: str) -> None:
    """ValueError if a config, or anything inside it, names something to build other than a class of NeMo.

    Values that OmegaConf would compute are refused as well: `${oc.create:...}` can hold a class that is not seen here.
    """
    for path, value in _values(config):
        key = path.rpartition(".")[2]
        if key in _TARGETS and isinstance(value, str) and not _is_class_of_nemo(value):
            raise ValueError(f"{where}: {path} is {value!r}, not a class of NeMo's collections, and is not built")
        if _is_computed(value):
            raise ValueError(f"{where}: {path} is {value!r}, which is computed when it is read: write the value itself")
        if key == _REMOTE_CODE and value:
            raise ValueError(f"{where}: {path} is {value!r}, but a model's own code is not run here: remove it")


def _is_computed(value: Any) -> bool:
    """Whether OmegaConf would call a resolver: `${name:...}`; a reference to another field is `${name}`."""
    return isinstance(value, str) and "${" in value and ":" in value


def _is_class_of_nemo(name: Any) -> bool:
    """Whether the name is that of a class that NeMo itself defines; other names in a module may lead anywhere."""
    if not isinstance(name, str) or not name.startswith(_NEMO):
        return False
    module, _, attribute = name.rpartition(".")
    try:
        found = vars(importlib.import_module(module)).get(attribute)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__.startswith("nemo.")


def _values(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from _values(value, here)
