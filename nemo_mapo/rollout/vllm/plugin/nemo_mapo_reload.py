"""Fixes reloads of expert weights in vLLM on a CPU (`--worker-extension-cls nemo_mapo_reload.Reload`).

On a CPU vLLM packs the weights of experts when it builds the kernels of a layer. At a reload it keeps the kernels and
does not pack, so they read weights in the wrong layout. vLLM imports this file in its own environment; it imports
nothing of ours.
"""

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform


class Reload:
    """Methods of vLLM's workers, called by `/collective_rpc`."""

    def forget_expert_kernels(self) -> None:
        """Have the next reload build the kernels of experts and pack their weights, as the first load does.

        Does nothing on other devices, where vLLM processes expert weights at every load.
        """
        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, RoutedExperts):
                module.quant_method.moe_kernel = None
