"""Which experts a token goes to, and the loss that keeps experts equally busy.

Routing is megatron-core's: scores in fp32, the best ``k`` experts, no capacity, so no token is
dropped. The load-balancing loss is ours, because megatron-core's depend on how a batch is cut into
micro-batches: even its global one counts only the micro-batches that came before. Here the tokens
of the whole global batch are counted first, in a forward pass without gradients. Then every
micro-batch adds its exact part, whatever the layout, for the price of that pass; without a
coefficient there is neither.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_asvr.parallel.collectives import sum_in_place


class Router(TopKRouter):
    """megatron-core's router with a load-balancing loss from counts of the global batch.

    Inside ``balanced`` each layer adds ``c * E * sum_e f_e * P_e`` to the objective: E experts, f_e
    the fraction of the global batch's choices that fell on expert e, P_e the mean probability of e
    over its tokens, c the coefficient. Padding is not counted. Only P has a gradient.

    Args:
        config: megatron-core's; ``moe_aux_loss_coeff`` is c.
        settings: what else megatron-core gives to its routers.

    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6; with global statistics: arXiv
    2501.11873. Hugging Face's loss for these models takes one f and P for all layers together, and
    does not divide the choices by k.
    """

    def __init__(self, config: TransformerConfig, **settings: Any) -> None:
        super().__init__(config=config, **settings)
        self.coefficient = config.moe_aux_loss_coeff
        self.counts_E: Tensor | None = None  # choices of the global batch by expert
        self.is_counting = False

    def gating(self, input: Tensor) -> Tensor:
        """Scores of all experts, fp32.

        megatron-core 0.16's own way needs Transformer Engine (moe_utils.py:1192 reads a name that
        exists only with it).
        """
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of experts, [tokens, E] both, the choice as bool.

        Args:
            logits: scores [S, B, E].
            padding_mask: bool [S, B], True = padding.
        """
        weights_XE, chosen_XE = super().routing(logits, padding_mask)
        if self.counts_E is None or padding_mask is None:
            return weights_XE, chosen_XE
        real_X1 = ~padding_mask.reshape(-1, 1)
        if self.is_counting:
            self.counts_E += (chosen_XE & real_X1).sum(0)
        elif torch.is_grad_enabled():
            # The scale that the schedule gives to this is 1 (schedules.py,
            # forward_step_calc_loss, with calculate_per_token_loss).
            loss = self._loss(logits.flatten(0, -2), real_X1, self.counts_E)
            weights_XE = MoEAuxLossAutoScaler.apply(weights_XE, loss)
        return weights_XE, chosen_XE

    def _loss(self, logits_XE: Tensor, real_X1: Tensor, counts_E: Tensor) -> Tensor:
        """This micro-batch's part of the loss of the global batch."""
        choices = counts_E.sum().clamp(min=1)
        fraction_E = counts_E / choices
        probability_E = (logits_XE.float().softmax(-1) * real_X1).sum(0) * self.topk / choices
        return self.coefficient * self.num_experts * (fraction_E * probability_E).sum()


@contextlib.contextmanager
def balanced(
    chunks: Sequence[nn.Module], forward: Callable[[], object], *, group: ProcessGroup
) -> Iterator[None]:
    """Inside, backward passes include the load-balancing loss, if the model has one.

    Args:
        chunks: this rank's model chunks.
        forward: passes all micro-batches of the step through the model; called once, without
            gradients, when there is something to count.
        group: all ranks of this pipeline stage.
    """
    # A pipeline stage without layers has no router; its neighbours' passes need it all the same.
    config = chunks[0].config
    is_active = config.num_moe_experts is not None and config.moe_aux_loss_coeff > 0
    modules = (module for chunk in chunks for module in chunk.modules())
    routers = [x for x in modules if isinstance(x, Router)] if is_active else []
    try:
        for router in routers:
            router.counts_E = torch.zeros(
                router.num_experts, dtype=torch.int64, device=router.weight.device
            )
            router.is_counting = True
        if is_active:
            with torch.no_grad():
                forward()
            sum_in_place([router.counts_E for router in routers], group=group)
        for router in routers:
            router.is_counting = False
        yield
    finally:
        for router in routers:
            router.counts_E, router.is_counting = None, False


def use_router(layer: ModuleSpec) -> None:
    """Put ``Router`` into a layer that has a mixture of experts."""
    mlp = layer.submodules.mlp  # a ModuleSpec in megatron-core 0.16, a functools.partial in 0.19
    parts = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    parts.router = Router
