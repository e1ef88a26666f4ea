"""Keys that users of Lightning and NeMo type by habit, and what to use here instead."""

from typing import Final

_LOOP: Final = ("max_steps", "max_epochs", "val_check_interval", "gradient_clip_val")
_BEST: Final = "exp_manager.checkpoint_callback_params"
_WHEN_SAVED: Final = ("save_last", "every_n_train_steps", "every_n_epochs", "train_time_interval")
_CALLED: Final = ("filename", "dirpath", "prefix", "postfix")

HABITS: Final[dict[str, str]] = {
    **{f"trainer.{name}": f"use trainer.mapo.{name} (examples/sft.py: trainer.sft.{name})" for name in _LOOP},
    "trainer.max_time": "use trainer.mapo.max_time_per_run=DD:HH:MM:SS (examples/sft.py: trainer.sft.max_time_per_run)",
    "trainer.accumulate_grad_batches": "micro-batches follow from model.global_batch_size and model.micro_batch_size",
    "trainer.limit_train_batches": "use trainer.mapo.max_steps, or data.train_ds.max_samples",
    "trainer.limit_val_batches": "use data.validation_ds.max_samples",
    "trainer.limit_test_batches": "use data.test_ds.max_samples",
    "trainer.log_every_n_steps": "every step is logged",
    "trainer.enable_checkpointing": "use trainer.mapo.save_interval (0 is never)",
    "trainer.strategy": "the layout is model.*_parallel_size; there is one strategy",
    "trainer.gpus": "use trainer.devices with trainer.accelerator=gpu",
    "trainer.logger": "use exp_manager.create_tensorboard_logger and exp_manager.create_wandb_logger",
    "trainer.use_distributed_sampler": "batches are distributed by data parallelism itself",
    "exp_manager.version": "a run directory has no versions: choose another exp_manager.name",
    "exp_manager.create_checkpoint_callback": "use trainer.mapo.save_interval (0 is never)",
    **{f"{_BEST}.{name}": "use trainer.mapo.save_interval and trainer.mapo.keep_checkpoints" for name in _WHEN_SAVED},
    **{f"{_BEST}.{name}": "a checkpoint is checkpoints/step_N, and the best has a link" for name in _CALLED},
    **{f"{_BEST}.{name}": "use examples/export_hf.py" for name in ("always_save_nemo", "save_nemo_on_train_end")},
    "exp_manager.resume_ignore_no_checkpoint": "resume_if_exists=true starts afresh if there is no checkpoint",
    "exp_manager.max_time_per_run": "use trainer.mapo.max_time_per_run=DD:HH:MM:SS",
    "trainer.mapo.asynchronous": "use trainer.mapo.generation.type=one_ahead",
    "trainer.mapo.dynamic_sampling": "use trainer.mapo.generation.type=dynamic_sampling",
    "model.restore_from_path": "use pretrained_checkpoint.restore_from_path",
    "model.pretrained_checkpoint": "use pretrained_checkpoint.restore_from_path",
    "model.resume_from_checkpoint": "use exp_manager.resume_if_exists=true",
    "model.peft": "use model.lora={rank: 16, alpha: 32}",
    "model.seed": "use seed",
    "model.data": "use data.train_ds, data.validation_ds and data.test_ds",
    "model.train_ds": "use data.train_ds",
    "model.validation_ds": "use data.validation_ds",
    "model.test_ds": "use data.test_ds",
    "model.tokenizer": "use data.tokenizer",
    "model.precision.precision": "use trainer.precision",
    "model.encoder_seq_length": "use model.decoder.max_position_embeddings",
    "model.num_layers": "use model.decoder.num_layers",
    "model.hidden_size": "use model.decoder.hidden_size",
    "model.num_attention_heads": "use model.decoder.num_attention_heads",
    "model.activations_checkpoint_granularity": "use model.decoder.recompute_granularity",
    "rollout.vllm.launch": "leave it out: a server is started here unless rollout.vllm.urls names servers",
    "data.train_ds.num_workers": "audio is read in the training process",
    "data.train_ds.batch_duration": "use data.train_ds.batch_size with bucket_duration_bins, or model.packed_tokens",
}
"""Advice by path of the key; it follows the words "unknown key"."""
