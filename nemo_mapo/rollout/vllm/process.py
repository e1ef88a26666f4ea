"""vLLM as a process on this machine: its command line, and starting, watching and stopping it."""

import contextlib
import functools
import os
import secrets
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from nemo_mapo.config.rollout import VllmConfig
from nemo_mapo.http_client import JsonServer, Refused, Unreachable
from nemo_mapo.processes import end_with_parent
from nemo_mapo.rollout.protocol import RolloutUnavailable

MODEL_NAME: Final = "policy"
MOST_CLIPS: Final = 8
"""Of a prompt, in native audio; vLLM refuses more."""
_PLUGIN: Final = Path(__file__).parent / "plugin"
"""Modules that vLLM imports by their names."""
_TOKENS_TOGETHER: Final = 4096
"""Of the prompts that are read in one pass, on a CPU."""
_POLL_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 20.0
_SHOWN_LINES: Final = 15
_CPU_DEFAULTS: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}


def serve_command(
    config: VllmConfig,
    directory: Path,
    *,
    hears: bool,
    max_length: int,
    batch_size: int,
    dtype: torch.dtype,
    on_cpu: bool,
    port: int,
) -> list[str]:
    """The `vllm serve` line of a model directory.

    Args:
        config: address, interpreter and further arguments.
        directory: of `write_model_directory`.
        hears: whether the model is served with its audio encoder; else prompts are embeddings.
        max_length: longest prompt and completion, in tokens.
        batch_size: completions generated together.
        dtype: of the weights.
        on_cpu: leave out what is compiled for a GPU.
        port: to listen at.
    """
    command = [config.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    options = {
        "--served-model-name": MODEL_NAME,
        "--host": config.host,
        "--port": str(port),
        "--dtype": str(dtype).removeprefix("torch."),
        "--max-model-len": str(max_length),
        "--max-num-seqs": str(batch_size),
        # Weights come with the first update.
        "--load-format": "dummy",
        # Log-probs of the distribution that is sampled from.
        "--logprobs-mode": "processed_logprobs",
        # Sampling options are those of a request, not those of a generation_config.json.
        "--generation-config": "vllm",
        "--logits-processors": "nemo_mapo_penalty:CompletionPenalty",
        "--worker-extension-cls": "nemo_mapo_reload.Reload",
    }
    if hears:
        options["--limit-mm-per-prompt"] = f'{{"audio": {MOST_CLIPS}, "image": 0, "video": 0}}'
    if config.weight_sync == "nccl":
        options["--weight-transfer-config"] = '{"backend": "nccl"}'
    command += [word for option in options.items() for word in option]
    # Token ids in and out, and prompts of embeddings, have to be asked for.
    command.append("--enable-scale-out" if hears else "--enable-prompt-embeds")
    if on_cpu:
        # A prompt that is read in chunks draws a token of its seed too early, and undoing that fails on a CPU.
        together = str(max(max_length, _TOKENS_TOGETHER))
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", together]
    return [*command, *map(str, config.serve_args)]


def serve_environment(*, key: str | None, on_cpu: bool, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of that command: routes for weight updates, the key, no access to a model hub."""
    added = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if key is not None:
        added["VLLM_API_KEY"] = key
    added["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PLUGIN), given.get("PYTHONPATH")]))
    defaults = _CPU_DEFAULTS if on_cpu else {}
    return {**defaults, **given, **added}


def free_port() -> int:
    """A free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


class VllmProcess:
    """A server beside the trainer, at a free port of the loopback address, with a key of its own."""

    def __init__(self, command: list[str], *, port: int, log: Path, on_cpu: bool) -> None:
        """Start it and return at once.

        Raises:
            ValueError: the interpreter is not there.
        """
        self.url = f"http://127.0.0.1:{port}"
        self.key = secrets.token_hex(16)
        self._log = log
        environment = serve_environment(key=self.key, on_cpu=on_cpu)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
                )
            except OSError as error:
                raise ValueError(
                    f"rollout.vllm.python={command[0]}: {error.strerror}; `make vllm` builds an environment with vLLM, "
                    "or name the interpreter of yours"
                ) from error
        self._stop = weakref.finalize(self, _stop, self._process)

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._process.pid

    def wait_until_it_serves(self, seconds: float) -> None:
        """Return when it answers; RolloutUnavailable with the end of its log if it ends first or takes longer."""
        server = JsonServer(self.url, token=self.key, timeout_seconds=5.0, expected=True)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if ended := self.ended():
                raise RolloutUnavailable(ended)
            try:
                server.get("/health")
            except Unreachable:
                time.sleep(_POLL_SECONDS)
            except Refused as error:
                raise RolloutUnavailable(f"vLLM does not serve: {error}") from error
            else:
                return
        raise RolloutUnavailable(f"vLLM did not serve within {seconds:g} s:\n{self._end_of_log()}")

    def ended(self) -> str:
        """How it ended, with the last lines of its log; empty while it runs."""
        status = self._process.poll()
        return "" if status is None else f"vLLM ended with status {status}; the last lines of {self._end_of_log()}"

    def stop(self) -> None:
        """End it, with all its processes."""
        self._stop()

    def _end_of_log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        return "\n".join([f"{self._log}:", *lines])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    # Its engine runs in processes of its own, in the same session.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
