"""Engines other than the default one: vLLM and TensorRT-LLM."""

from typing import TYPE_CHECKING, Literal

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import Count, Flag, Host, PathText, Port, Positive, Seconds, Url, Variable

if TYPE_CHECKING:
    from nemo_mapo.config.model import ModelConfig
    from nemo_mapo.config.run import RunConfig


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@config_class
class VllmConfig:
    """vLLM (`rollout.backend: vllm`), on this machine or elsewhere."""

    urls: tuple[Url, ...] = ()
    """Servers that examples/serve_vllm.py started, e.g. http://node7:8000; a batch's prompts are distributed over them,
    and move to another if one fails. Without any, the trainer starts, monitors and stops a server of its own."""
    python: PathText = ".venv-vllm/bin/python"
    """Interpreter of the environment with vLLM that starts servers; `make vllm` builds the default one."""
    host: Host = "127.0.0.1"
    """Address that examples/serve_vllm.py listens on."""
    port: Port = 8000
    """Its port; a server that the trainer starts takes a free one."""
    serve_args: tuple[str | int | float, ...] = ()
    """Further arguments of `vllm serve`, e.g. ["--tensor-parallel-size", "4"]."""
    start_seconds: Seconds = 900.0
    """Time in which a started server must answer."""
    original: PathText | None = None
    """Hugging Face directory of a Qwen Omni model, or what examples/import_hf.py keeps of it (OUTPUT/original)."""
    api_key_variable: Variable = "VLLM_API_KEY"
    """Environment variable that holds the servers' key, if they require one; a server started here gets its own."""
    timeout_seconds: Seconds = 600.0
    """Timeout of one request, and of each step of a weight update."""
    max_attempts: Count = 8
    """Requests for one prompt, including the first, over all servers; then the run saves and stops."""
    pause_seconds: Seconds = 1.0
    """Longest pause before the second attempt; doubled for each further one, up to 30 s, and randomly varied."""
    max_in_flight: Count = 64
    """Concurrent requests."""
    sync_dir: PathText | None = None
    """Directory used by this run only, for model files, updates and logs, on storage that trainer and servers share;
    null is `vllm` in the run directory."""
    weight_sync: Literal["directory", "nccl"] = "directory"
    """How weights get into servers: as files in `sync_dir`, or over NCCL from the trainer's first GPU into vLLM's."""
    bucket_megabytes: Positive = 512.0
    """Weights are written in files, or sent in pieces, of about this size."""

    @property
    def bucket_bytes(self) -> int:
        """`bucket_megabytes` in bytes."""
        return round(self.bucket_megabytes * 2**20)

    def check(self, run: "RunConfig") -> None:
        """ValueError if servers could not be reached, or could not get what they need."""
        if not self.urls and run.trainer.num_nodes > 1:
            raise ValueError(
                f"rollout.vllm.urls=[] with trainer.num_nodes={run.trainer.num_nodes}: a server that is started here "
                "is reachable from this machine only; start servers with examples/serve_vllm.py and set "
                "rollout.vllm.urls=[http://HOST:8000]"
            )
        if self.weight_sync == "nccl" and run.trainer.accelerator != "gpu":
            raise ValueError(
                f"rollout.vllm.weight_sync=nccl sends weights from a GPU, but trainer.accelerator="
                f"{run.trainer.accelerator}; set rollout.vllm.weight_sync=directory, which runs everywhere"
            )
        self.check_model(run.model)

    def check_model(self, model: "ModelConfig") -> None:
        """ValueError if vLLM would serve the model with its audio encoder and lacks something that this needs."""
        perception = model.perception
        if perception.type != "qwen_omni" or perception.projector is not None:
            return
        if self.original is None:
            raise ValueError(
                "rollout.vllm.original is not set: name the Hugging Face directory of the Qwen Omni model, or "
                "OUTPUT/original of examples/import_hf.py; vLLM needs its processor"
            )
        if perception.family == "qwen3_omni_moe" and not perception.whole_frames:
            raise ValueError(
                "rollout.backend=vllm pads the clips of Qwen3-Omni to whole frames of 10 ms, but the policy does not: "
                "set model.perception.whole_frames=true"
            )


@config_class
class TrtllmConfig:
    """TensorRT-LLM in the trainer's process (`rollout.backend: trtllm`), with NeMo-Aligner's names."""

    trt_model_dir: PathText = "runs/trt_llm_model"
    """Each process builds its engine in its own folder here and removes it at its end; use the fastest disk."""
    unload_engine_train: Flag = True
    """Unload the engine while the policy is trained; false keeps it in GPU memory along with the policy."""
    max_prompt_embedding_table_size: Count = 16384
    """Audio tokens of the clips in one engine batch, at most; batches are split to fit."""
    scoring_batch_size: Count = 8
    """Completions per pass of the policy over what the engine sampled."""

    def check(self, run: "RunConfig") -> None:
        """ValueError if TensorRT-LLM does not support the policy or its sampling."""
        sampling, decoder = run.rollout.sampling, run.model.decoder
        if (sampling.repetition_penalty, sampling.min_new_tokens) != (1.0, 0):
            raise ValueError(
                f"rollout.backend=trtllm: rollout.sampling.repetition_penalty={sampling.repetition_penalty} would "
                f"count the prompt, and rollout.sampling.min_new_tokens={sampling.min_new_tokens} would not suppress "
                "the end of turn; set them to 1 and 0, or use rollout.backend=megatron"
            )
        if run.trainer.accelerator != "gpu":
            raise ValueError(
                f"rollout.backend=trtllm needs trainer.accelerator=gpu, not {run.trainer.accelerator}; "
                "rollout.backend=megatron runs everywhere"
            )
        possible = {
            "model.decoder.qk_layernorm": (decoder.qk_layernorm, False),
            "model.decoder.add_qkv_bias": (decoder.add_qkv_bias, False),
            "model.decoder.rope_scaling": (decoder.rope_scaling, None),
            "model.decoder.num_moe_experts": (decoder.num_moe_experts, None),
            "model.pipeline_model_parallel_size": (run.model.pipeline_model_parallel_size, 1),
        }
        if problems := [f"{name}={value}" for name, (value, only) in possible.items() if value != only]:
            raise ValueError(
                "rollout.backend=trtllm builds a Llama model from the policy, which cannot have "
                f"{', '.join(problems)}; change them, or use rollout.backend=megatron or vllm"
            )
