"""AdamW for the CPU whose state is laid out as NVIDIA's FusedAdam keeps it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the step counter in the parameter group, as in apex and Transformer Engine.

    megatron-core's distributed optimizer saves and loads that layout, so checkpoints written on the
    CPU and on a GPU are interchangeable. The arithmetic runs in fixed order on whole tensors: the
    result is a pure function of its input, bit by bit.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta ** step``.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        adam_w_mode: decoupled weight decay; otherwise it is added to the gradient.
        weight_decay: strength of the decay.
        **unused: settings of the CUDA kernels, accepted because megatron-core passes them.

    Source: Loshchilov and Hutter, arXiv 1711.05101; state layout of apex.optimizers.FusedAdam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unused: object,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient.

        Args:
            closure: not supported; here because the base class has it.
        """
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        lr, decay, step = group["lr"], group["weight_decay"], int(group["step"])
        first, second = self._moments(params)
        grads = [p.grad.float() for p in params if p.grad is not None]
        if decay and not self.adam_w_mode:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        correct1, correct2 = 1.0, 1.0
        if group["bias_correction"]:
            correct1, correct2 = 1 - beta1**step, 1 - beta2**step
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, correct2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_addcdiv_(params, first, denominator, -lr / correct1)

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments (fp32) of the parameters, created as zeros when new."""
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        states = [self.state[p] for p in params]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
