"""Experts of a vLLM on a CPU that takes new weights (`--worker-extension-cls nemo_mapo_reload.Reload`).

On a CPU vLLM packs the weights of experts when it builds the kernels of a layer. At a reload it keeps the kernels and
does not pack, so that they read weights in a layout that is not theirs. This file is imported by vLLM, in its
environment, and imports nothing of ours.
"""

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform


class Reload:
    """Methods of vLLM's workers, called by `/collective_rpc`."""

    def forget_expert_kernels(self) -> None:
        """Have the next reload build the kernels of experts and pack their weights, as the first load does.

        Nothing on other devices: what vLLM does to experts there, it does at every load.
        """
        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, RoutedExperts):
                module.quant_method.moe_kernel = None
