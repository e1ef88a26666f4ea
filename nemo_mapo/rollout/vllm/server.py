"""One vLLM server: its model, the version of its weights, and updates from a directory."""

import re
import threading
from pathlib import Path
from typing import Any, Final

from nemo_mapo.http_client import JsonServer, Unreachable
from nemo_mapo.rollout.vllm.weights import check_update

OLDEST: Final = (0, 32)
TOO_NEW: Final = (0, 33)
"""vLLM's releases from OLDEST on and below TOO_NEW have the routes that are used here."""

NO_WEIGHTS: Final = "default"
"""Version reported by a server that has received no weights."""


def unfinished(version: str) -> str:
    """Version of weights that are never requested: their update is in progress, or was interrupted."""
    return f"{version} unfinished"


class VllmServer:
    """A server in development mode (VLLM_SERVER_DEV_MODE=1), which has the routes that take weights."""

    def __init__(self, url: str, *, token: str | None, timeout_seconds: float) -> None:
        self.http = JsonServer(url, token=token, timeout_seconds=timeout_seconds)
        self.url = self.http.url
        self.updates = 0
        """Number of updates; completions requested before the last one may come from other weights."""
        self.updating = threading.Lock()
        """Held during an update while other threads send requests."""

    def look(self) -> dict[str, Any]:
        """The served model's entry of /v1/models.

        Raises:
            ValueError: the server is of an unsupported version, has no development mode, or serves several models.
            Refused: it requires a different key.
            Unreachable: it does not answer.
        """
        version = str(self.http.get("/version")["version"])
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if not OLDEST <= numbers < TOO_NEW:
            raise ValueError(
                f"{self.url} is vLLM {version}; supported are {_dotted(OLDEST)} and later releases before "
                f"{_dotted(TOO_NEW)}"
            )
        models: list[dict[str, Any]] = self.http.get("/v1/models")["data"]
        if len(models) != 1:
            raise ValueError(f"{self.url} serves {', '.join(model['id'] for model in models)}; it has to serve one")
        return models[0]

    def weight_version(self) -> str:
        """The version of the server's weights; NO_WEIGHTS if it has received none."""
        return str(self.http.get("/weight_info")["weight_version"])

    def load(self, update: Path, version: str) -> None:
        """Load the weights of a directory; the server then reports them as `version` unfinished.

        Args:
            update: of `write_update`, on storage that the server reads.
            version: of the weights.

        Raises:
            WeightsError: the directory is not whole; nothing was changed.
            Refused, Unreachable: a step failed.
        """
        check_update(update)
        self.begin_update(version)
        # A server starts without weights (load format "dummy"), and this one reads files.
        self._call("update_config", overrides={"load_config": {"load_format": "auto"}})
        self._call("forget_expert_kernels")
        self._call("reload_weights", weights_path=str(update.resolve()))
        self.end_update()

    def begin_update(self, version: str) -> None:
        """Have the server finish its requests and prepare for new weights.

        From here on the server reports a version that is never requested, until `name` sets the new one: if anything
        fails in between, no completion is accepted. The old weights are overwritten with zeros, because vLLM keeps
        tensors that an update lacks and only logs it.
        """
        self.updates += 1
        self.http.post("/pause", mode="wait")
        self.name(unfinished(version))
        self.http.post("/weight_checker", {"action": "reset"})

    def end_update(self) -> None:
        """Drop what was computed with the old weights (encoder outputs, keys and values), and resume."""
        for cache in ("mm", "encoder"):
            self.http.post(f"/reset_{cache}_cache")
        if not self.http.post("/reset_prefix_cache")["success"]:
            raise Unreachable(f"{self.url}: requests under way keep the prefix cache from being reset")
        self.http.post("/resume")

    def name(self, version: str) -> None:
        """Set the version that the server reports to `version`."""
        self.http.post("/update_weight_version", {"new_version": version})

    def _call(self, method: str, **arguments: Any) -> None:
        self.http.post("/collective_rpc", {"method": method, "kwargs": arguments})


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
