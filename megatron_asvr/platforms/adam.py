"""AdamW for the CPU whose state is laid out as NVIDIA's FusedAdam keeps it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

LANES = 64  # a multiple of the elements in any CPU's vector register


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the step counter in the parameter group, as in apex and Transformer Engine.

    megatron-core's distributed optimizer saves and loads that layout, so checkpoints written on the
    CPU and on a GPU are interchangeable. The result is a pure function of its input, bit by bit.
    torch's fused kernel rounds what does not fill a vector register differently, so what is left
    over of all parameters goes through it together, filled up: how parameters are cut into
    tensors (by a layout) changes no bit.

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
        grads = [p.grad.float() for p in params if p.grad is not None]
        kinds = [[x.view(-1) for x in kind] for kind in (params, *self._moments(params))]
        kinds.insert(1, [grad.reshape(-1) for grad in grads])
        # A step without end has no bias left to correct.
        step = float(group["step"] if group["bias_correction"] else 2**60)
        whole, rest = zip(*map(_in_lanes, kinds), strict=True)
        adam(
            *whole,
            [],
            [torch.tensor(step - 1) for _ in whole[0]],  # counted up in there
            fused=True,
            decoupled_weight_decay=self.adam_w_mode,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for kind, tail in zip(kinds, rest, strict=True):
            tails = [x[len(x) - len(x) % LANES :] for x in kind]
            torch._foreach_copy_(
                tails, list(tail[: sum(map(len, tails))].split([len(x) for x in tails]))
            )

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments (fp32) of the parameters, created as zeros when new.

        They are parts of one piece of memory: between the activations of the first step, small
        pieces would stay and leave gaps for ever (docs/performance.md).
        """
        new = [p for p in params if "exp_avg" not in self.state[p]]
        sizes = [p.numel() for p in new]
        for name in ("exp_avg", "exp_avg_sq") if new else ():
            memory = torch.zeros(sum(sizes), dtype=torch.float32, device=new[0].device)
            for p, moment in zip(new, memory.split(sizes), strict=True):
                self.state[p][name] = moment.view(p.shape)
        states = [self.state[p] for p in params]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]


def _in_lanes(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The tensors' parts that fill vector registers, and, as one more, a copy of all others."""
    cuts = [len(x) - len(x) % LANES for x in tensors]
    rest = torch.cat([x[cut:] for x, cut in zip(tensors, cuts, strict=True)])
    rest = torch.nn.functional.pad(rest, (0, -len(rest) % LANES))
    return [*(x[:cut] for x, cut in zip(tensors, cuts, strict=True)), rest], rest
