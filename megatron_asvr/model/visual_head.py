"""The visual head: the codes of an image position, one depth after the other.

One hidden state of the language model goes in; out come, for every depth d, logits over the
K_d codewords, given the true codes of depths 0..d-1 (teacher forcing)::

    x_0 = projector(hidden)            x_d = code_projection(C_0[c_0] + .. + C_{d-1}[c_{d-1}])
    per layer:   y = x + attention(norm1(x))        causal over depth, no position embedding
                 r = norm2(y)                       the residual stream is *replaced* by its norm
                 x = r + W2_d gelu(W1_d r)          own matrices for each depth, no biases
    logits_d = heads_d(norm(x_d))

Under tensor parallelism the attention heads, the inner widths of both MLPs and the codewords are
split. Activations are depth first, [D, M, E]: the per-depth matrices are then one batched product.

Positions do not see one another here. Where it is known what gradient the losses will get, some of
them at a time go through the head and back, so that the activations of few exist at once: that is
exact, and nothing is computed twice. Gradients of weights are then stored in the forward pass.

Source: arXiv 2506.09040, section 3, as its official code computes it (commit ea87c3e).
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_asvr.config.schema import VisualHeadConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.layers import MLP, degree, enter, leave, normal, share, zeros
from megatron_asvr.model.loss import summed_cross_entropy
from megatron_asvr.model.output_loss import OutputLayer, check_scales, output_loss
from megatron_asvr.model.quantize import Codebooks
from megatron_asvr.model.sharding import mark
from megatron_asvr.precision.depths import attend_depths
from megatron_asvr.precision.fp8.product import Product, grouped_linear, linear
from megatron_asvr.precision.norm import RMSNorm
from megatron_asvr.precision.products import into_buffers, multiply_each
from megatron_asvr.precision.remake import kept_whole, remade, remember

logger = logging.getLogger(__name__)

MASKED_LOGIT = -1e30  # of a padding codeword: its probability and gradient are exactly 0
WIDTH = "model.visual_head.width"
PART_BYTES = 2**27  # of activations that wait for their part's backward pass
KEPT = 9  # activations [D, M, E] that a layer keeps: measured 7 (8 without kernels) and some more


class Affine(nn.Module):
    """A weight and a bias under a common name; what is done with them stands where they are used.

    Args:
        weight: any shape.
        bias: any shape.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.fp8: Product | None = None


class DepthAttention(nn.Module):
    """Multi-head attention, causal over the depths of one position.

    Args:
        config: width and number of attention heads.
        tp: group that splits the attention heads, or None.
        dtype: of the parameters.
    """

    def __init__(
        self, config: VisualHeadConfig, *, tp: ProcessGroup | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tp = tp
        self.num_heads = config.heads // degree(tp)  # of this rank
        width, rows, std = config.width, config.width // degree(tp), config.init_std
        self.in_proj = Affine(
            normal(3, rows, width, dtype=dtype, std=std), zeros(3, rows, dtype=dtype)
        )
        self.out_proj = Affine(normal(width, rows, dtype=dtype, std=std), zeros(width, dtype=dtype))
        if tp is not None:
            for parameter in (self.in_proj.weight, self.in_proj.bias, self.out_proj.weight):
                mark(parameter, dim=1)

    def forward(self, x_DME: Tensor) -> Tensor:
        """Attended vectors [D, M, E], the same on every rank."""
        to = self.in_proj
        with remade(x_DME):
            packed = linear(enter(x_DME, self.tp), to.weight, to.bias, to.fp8)
        attended, out = attend_depths(packed, self.num_heads), self.out_proj
        with remade(attended):
            if self.tp is None:
                return linear(attended, out.weight, out.bias, out.fp8)
            partial = linear(attended, out.weight, None, out.fp8)
        return leave(partial, self.tp) + out.bias


class DepthMLP(nn.Module):
    """Two matrices of its own for each depth, around an exact GELU; no biases.

    Args:
        config: width.
        depth: number of depths.
        tp: group that splits the inner width, or None.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: VisualHeadConfig,
        depth: int,
        *,
        tp: ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.tp = tp
        width, std = config.width, config.init_std
        inner = share(f"2 * {WIDTH}", 2 * width, tp)
        self.w1 = mark(normal(depth, inner, width, dtype=dtype, std=std), dim=1)
        self.w2 = mark(normal(depth, width, inner, dtype=dtype, std=std), dim=2)
        slots = [f"{name}.{d}" for d in range(depth) for name in ("w1", "w2")]
        self.fp8: dict[str, Product | None] = dict.fromkeys(slots)

    def forward(self, x_DME: Tensor) -> Tensor:
        """``x`` plus its transform, [D, M, E], the same on every rank."""
        with remade(x_DME):
            outer = self._multiply(enter(x_DME, self.tp), "w1")
        kept = outer.detach()
        inner = remember(F.gelu(outer), lambda: F.gelu(kept))
        with remade(inner):
            return x_DME + leave(self._multiply(inner, "w2"), self.tp)

    def _multiply(self, x_DMK: Tensor, name: str) -> Tensor:
        """Each depth's ``x`` times its own matrix, [D, M, N]."""
        weight_DNK = getattr(self, name)
        products = [self.fp8[f"{name}.{depth}"] for depth in range(len(weight_DNK))]
        if not any(products):
            return multiply_each(x_DMK, weight_DNK)
        return grouped_linear(x_DMK, weight_DNK, products)


class DepthLayer(nn.Module):
    """One layer of the depth transformer.

    Args:
        config: width, attention heads, eps of the norms.
        depth: number of depths.
        tp: tensor-parallel group, or None.
        attention_tp: the same group when it splits the attention heads, else None.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: VisualHeadConfig,
        depth: int,
        *,
        tp: ProcessGroup | None,
        attention_tp: ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.attention = DepthAttention(config, tp=attention_tp, dtype=dtype)
        self.norm2 = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.mlp = DepthMLP(config, depth, tp=tp, dtype=dtype)

    def forward(self, x_DME: Tensor) -> Tensor:
        """The layer's output [D, M, E]."""
        return self.mlp(self.norm2(x_DME + self.attention(self.norm1(x_DME))))


class VisualHead(nn.Module):
    """Hidden states and true codes to the logits of every depth.

    Args:
        config: sizes of the head.
        hidden_size: width of the language model.
        codebooks: the tokenizer's frozen tables, one [K_d, C] for each depth.
        tp: tensor-parallel group, or None.
        dtype: of the parameters.
        recompute: keep only the layers' inputs for the backward pass, and compute them again.

    Raises:
        ConfigError: the attention heads do not divide the width, or ``tp`` does not.
    """

    def __init__(
        self,
        config: VisualHeadConfig,
        hidden_size: int,
        codebooks: Sequence[Tensor],
        *,
        tp: ProcessGroup | None,
        dtype: torch.dtype,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.rows = slice(None)  # the positions that are on their way through the layers
        self.config = config
        self.tp = tp
        self.codebook_sizes = tuple(len(table) for table in codebooks)
        self.codebooks = Codebooks(codebooks, persistent=False)
        attention_tp, self.attention_reason = split_attention(config, tp)
        logger.info("visual head attention: %s", self.attention_reason)
        width, std, depth = config.width, config.init_std, len(codebooks)
        self.projector = MLP(WIDTH, hidden_size, width, tp=tp, dtype=dtype, std=std)
        self.code_projection = Affine(
            normal(width, codebooks[0].shape[1], dtype=dtype, std=std), zeros(width, dtype=dtype)
        )
        self.layers = nn.ModuleList(
            DepthLayer(config, depth, tp=tp, attention_tp=attention_tp, dtype=dtype)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(width, eps=config.norm_eps, dtype=dtype)
        self.heads = nn.ModuleList(self._head(size, dtype) for size in self.codebook_sizes)

    @property
    def depth(self) -> int:
        """Number of depths."""
        return len(self.codebook_sizes)

    def forward(self, hidden_MH: Tensor, codes_MD: Tensor) -> list[Tensor]:
        """Logits of each depth: fp32 [M, K_d padded / tp], this rank's codewords.

        Args:
            hidden_MH: final hidden states, the same on every rank; M may be 0.
            codes_MD: int64 true codes; those of the last depth are not read.
        """
        x_DME = self._trunk(hidden_MH, codes_MD)
        return [self._logits(depth, x_ME) for depth, x_ME in enumerate(x_DME.unbind(0))]

    def loss(
        self, hidden_MH: Tensor, codes_MD: Tensor, scales_D: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each depth and codes on top; see ``output_loss``.

        Args:
            hidden_MH: final hidden states, the same on every rank; M may be 0.
            codes_MD: int64 true codes.
            scales_D: the gradients that the sums will get, where they are known: a backward pass
                must follow, and what it would do in the head may have been done already.

        Raises:
            AsvrError: by the backward pass, when it brings another gradient than ``scales_D``.
        """
        if scales_D is None or not torch.is_grad_enabled() or not self._stores_gradients():
            return self._loss(hidden_MH, codes_MD, scales_D)
        grad_MH = torch.empty_like(hidden_MH)
        sum_D = hidden_MH.new_zeros(self.depth, dtype=torch.float32)
        top_D = torch.zeros_like(sum_D, dtype=torch.int64)
        for rows in self._parts(hidden_MH):
            self.rows = rows
            part_MH = hidden_MH[rows].detach().requires_grad_(hidden_MH.requires_grad)
            with into_buffers():  # also of the layers that are computed again
                part_sum_D, part_top_D = self._loss(part_MH, codes_MD[rows], scales_D)
                part_sum_D.backward(part_sum_D.new_tensor(scales_D))
            if part_MH.grad is not None:
                grad_MH[rows] = part_MH.grad
            sum_D += part_sum_D.detach()
            top_D += part_top_D
        self.rows = slice(None)
        return _Known.apply(hidden_MH, grad_MH, sum_D, scales_D), top_D

    def _stores_gradients(self) -> bool:
        """Whether a backward pass of some positions adds to buffers: those of megatron-core.

        Not where products are in 8 bits: what they round to depends on all positions.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        slots = [x for module in self.modules() if (x := getattr(module, "fp8", None)) is not None]
        is_8_bits = any(any(x.values()) if isinstance(x, dict) else True for x in slots)
        return all(hasattr(p, "main_grad") for p in trained) and not is_8_bits

    def _parts(self, hidden_MH: Tensor) -> Iterator[slice]:
        """Nearly equal parts of the positions, each of at most ``PART_BYTES`` if it can be."""
        each = KEPT * len(self.layers) * self.depth * self.config.width * hidden_MH.element_size()
        positions = len(hidden_MH)
        number = max(1, min(positions, -(-positions * each // PART_BYTES)))
        ends = [positions * n // number for n in range(number + 1)]
        return (slice(start, end) for start, end in pairwise(ends))

    def _loss(
        self, hidden_MH: Tensor, codes_MD: Tensor, scales_D: Sequence[float] | None
    ) -> tuple[Tensor, Tensor]:
        """``loss`` of all positions at once."""
        if any(head.fp8 is not None for head in self.heads):
            return summed_cross_entropy(self(hidden_MH, codes_MD), codes_MD, tp=self.tp)
        rank = 0 if self.tp is None else self.tp.rank()
        layers = [
            OutputLayer(head.weight, head.bias, rank * len(head.weight), size)
            for head, size in zip(self.heads, self.codebook_sizes, strict=True)
        ]
        x_DME = self._trunk(hidden_MH, codes_MD)
        return output_loss(x_DME, layers, codes_MD, tp=self.tp, scales=scales_D)

    def _trunk(self, hidden_MH: Tensor, codes_MD: Tensor) -> Tensor:
        """What the output layers read: [D, M, E]."""
        start_ME = self.projector(hidden_MH)
        sums_DMC = self._code_sums(codes_MD).to(start_ME.dtype)
        to_width = self.code_projection
        codes_DME = linear(sums_DMC, to_width.weight, to_width.bias, to_width.fp8)
        x_DME = torch.cat([start_ME[None], codes_DME])
        for layer in self.layers:
            if self.recompute:
                again = functools.partial(_whole, layer)
                x_DME = checkpoint(again, x_DME, use_reentrant=False, preserve_rng_state=False)
            else:
                x_DME = layer(x_DME)
        return enter(self.norm(x_DME), self.tp)

    def _head(self, size: int, dtype: torch.dtype) -> Affine:
        """The output layer of one depth, its codewords padded to a multiple of the degree."""
        rows = -(-size // degree(self.tp))
        return Affine(
            mark(
                normal(rows, self.config.width, dtype=dtype, std=self.config.init_std),
                dim=0,
                full_size=size,
            ),
            mark(zeros(rows, dtype=dtype), dim=0, full_size=size),
        )

    def _code_sums(self, codes_MD: Tensor) -> Tensor:
        """fp32 [D - 1, M, C]: for depths 1.. the sum of the code vectors of all depths before."""
        tables = self.codebooks.tables()
        if self.depth == 1:
            return tables[0].new_zeros(0, codes_MD.shape[0], tables[0].shape[1])
        sums = [F.embedding(codes_MD[:, 0], tables[0])]
        for depth in range(1, self.depth - 1):
            sums.append(sums[-1] + F.embedding(codes_MD[:, depth], tables[depth]))
        return torch.stack(sums)

    def _logits(self, depth: int, x_ME: Tensor) -> Tensor:
        """This rank's logits of one depth, fp32."""
        head = self.heads[depth]
        logits_MK = linear(x_ME, head.weight, head.bias, head.fp8).float()
        if self.tp is not None:
            rows = logits_MK.shape[1]
            real = self.codebook_sizes[depth] - self.tp.rank() * rows
            if real < rows:
                # Unseen by autograd on purpose: these columns have no probability, so no gradient.
                with torch.no_grad():
                    logits_MK[:, max(0, real) :].fill_(MASKED_LOGIT)
        return logits_MK


def _whole(layer: DepthLayer, x_DME: Tensor) -> Tensor:
    with kept_whole():
        return layer(x_DME)


class _Known(torch.autograd.Function):
    """Sums whose gradient with respect to the hidden states is there already."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, grad_MH: Tensor, sum_D: Tensor, scales_D: Sequence[float]
    ) -> Tensor:
        ctx.save_for_backward(grad_MH)
        ctx.scales_D = scales_D
        return sum_D.clone()

    @staticmethod
    def backward(ctx: Any, grad_D: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MH,) = ctx.saved_tensors
        if len(grad_MH):
            check_scales(grad_D, ctx.scales_D)
        return grad_MH, None, None, None


def split_attention(
    config: VisualHeadConfig, tp: ProcessGroup | None
) -> tuple[ProcessGroup | None, str]:
    """The group that splits the head's attention (None: replicated), and the reason.

    Raises:
        ConfigError: the attention heads do not divide the width.
    """
    if config.width % config.heads:
        fits = [str(n) for n in range(1, config.width + 1) if config.width % n == 0]
        raise ConfigError(
            f"model.visual_head.num_heads={config.heads} does not divide {WIDTH}={config.width}; "
            f"use one of {', '.join(fits)}"
        )
    if tp is None:
        return None, f"{config.heads} heads on one rank"
    if config.heads % tp.size():
        return None, (
            f"replicated: parallel.tp={tp.size()} does not divide its {config.heads} heads, so "
            "every rank computes all of them"
        )
    return tp, f"{config.heads} heads split over parallel.tp={tp.size()} ranks"
