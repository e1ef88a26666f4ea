"""Rollouts from servers (how the trainer reaches them, how one is run) and from TensorRT-LLM."""

from typing import Annotated, Literal

from pydantic import Field

from nemo_mapo.config.base import config_class

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]

TOKEN_VARIABLE = "NEMO_MAPO_ROLLOUT_TOKEN"


@config_class
class RolloutServerConfig:
    """The rollout servers of `rollout.backend: server`, as the trainer sees them."""

    urls: tuple[str, ...] = ()
    """Addresses without a path, e.g. http://node7:8000; requests are shared out, and go to another when one fails."""
    kind: Literal["nemo_mapo", "vllm", "trtllm"] = "nemo_mapo"
    """What serves: examples/serve_rollouts.py, vLLM or trtllm-serve. Only the first takes weights and can train."""
    model: str | None = None
    """Name of the model on the server; null is the only one that it lists."""
    token_variable: str = TOKEN_VARIABLE
    """Environment variable that holds the bearer token, if the servers want one."""
    timeout_seconds: Seconds = 600.0
    """Of one request, and of each transfer of a weight update."""
    max_attempts: Count = 8
    """Requests for one prompt, the first included, over all servers; then the run saves and stops."""
    pause_seconds: Seconds = 1.0
    """Before the second attempt; doubled for each one after up to 30 s, and varied at random by half."""
    max_in_flight: Count = 64
    """Requests under way at a time."""
    weight_sync: Literal["directory", "process_group"] = "directory"
    """How weights travel: files in a directory that all can read, or a process group."""
    sync_dir: str | None = None
    """Directory of `weight_sync: directory`, on storage that trainer and servers share."""
    sync_host: str = "127.0.0.1"
    """Address at which the servers reach the trainer with `weight_sync: process_group`."""
    sync_backend: Literal["gloo", "nccl"] = "gloo"
    """Library of the process group; `nccl` has not been run yet."""
    bucket_megabytes: Annotated[float, Field(gt=0)] = 512.0
    """Weights are sent in pieces of about this size."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("urls is empty: name at least one server, e.g. urls=[http://127.0.0.1:8000]")
        if wrong := [url for url in self.urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"urls={wrong} must start with http:// or https://")
        if self.kind == "nemo_mapo" and self.weight_sync == "directory" and self.sync_dir is None:
            raise ValueError("weight_sync=directory needs sync_dir, a directory that trainer and servers share")


@config_class
class TrtllmConfig:
    """TensorRT-LLM in the trainer's process (`rollout.backend: trtllm`), in NeMo-Aligner's names; has not been run."""

    trt_model_dir: str = "runs/trt_llm_model"
    """Each process builds its engine in a folder of its own here, which goes with it; as fast a disk as there is."""
    unload_engine_train: bool = True
    """Unload the engine while the policy is trained; false keeps it in GPU memory beside the policy."""
    max_prompt_embedding_table_size: Count = 16384
    """Audio tokens of the clips in one engine batch, at most; batches are cut to fit."""
    scoring_batch_size: Count = 8
    """Completions of one pass of the policy over what the engine drew."""


@config_class
class ServingConfig:
    """How `examples/serve_rollouts.py` listens, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen at; another than this machine's own needs a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one, which is printed."""
    model_name: str = "policy"
    """What /v1/models calls the model."""
    token_variable: str = TOKEN_VARIABLE
    """Environment variable that holds the bearer token; unset, no token is asked for (at a loopback address only)."""
    sync_dir: str | None = None
    """Where updates of `weight_sync: directory` are read; null refuses them."""
    max_request_megabytes: Count = 64
    """Larger requests are refused with 413."""
    max_waiting: Count = 4096
    """Completions that may wait for the engine; further requests get 429."""
    request_timeout_seconds: Seconds = 600.0
    """A request that is not answered by then gets 504; one whose body is not there by then gets 408."""
    drain_seconds: Seconds = 60.0
    """How long SIGTERM lets requests under way end."""
    batching_seconds: Annotated[float, Field(ge=0)] = 0.01
    """How long a batch that is not full waits for further requests."""
