"""The joint loss as one would write it today with PyTorch and transformers, without a second look.

The other side of `benchmarks.step`: rows padded to the longest, logits of every position and of
every code, the tokenizer (an encoder of its own) run in every step, AdamW as torch ships it. The
loss is the exact one, so both sides can be compared to the last digits.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.processes import Step, state_bytes, tensor_bytes
from benchmarks.workload import BEFORE, LR, Sample, Workload, samples
from megatron_asvr.batch import IGNORE
from megatron_asvr.config.schema import VisionConfig
from megatron_asvr.hf import tables


class PlainHead(nn.Module):
    """The depth transformer and the output layers of all codes.

    Args:
        load: sizes.
        codebooks: one table for each depth.
    """

    def __init__(self, load: Workload, codebooks: list[Tensor]) -> None:
        super().__init__()
        head, hidden = load.model.visual_head, load.model.language.hidden_size
        self.codebooks, self.depth = codebooks, len(codebooks)
        width, depth = head.width, self.depth
        self.projector = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width))
        self.in_proj = nn.Linear(codebooks[0].shape[1], width)
        self.layers = nn.ModuleList()
        for _ in range(head.num_layers):
            layer = nn.Module()
            layer.norm1 = nn.RMSNorm(width, eps=head.norm_eps)
            layer.attention = nn.MultiheadAttention(width, head.heads, batch_first=True)
            layer.norm2 = nn.RMSNorm(width, eps=head.norm_eps)
            layer.linear1 = nn.Linear(width * depth, 2 * width, bias=False)
            layer.linear2 = nn.Linear(2 * width * depth, width, bias=False)
            self.layers.append(layer)
        self.norm = nn.RMSNorm(width, eps=head.norm_eps)
        self.out = nn.ModuleList(nn.Linear(width, len(table)) for table in codebooks)

    def forward(self, hidden_MH: Tensor, codes_MD: Tensor) -> list[Tensor]:
        """Logits of each depth."""
        vectors = [F.embedding(codes_MD[:, d], self.codebooks[d]) for d in range(self.depth - 1)]
        sums_MDC = torch.stack(vectors, 1).cumsum(1)
        x_MDE = torch.cat([self.projector(hidden_MH)[:, None], self.in_proj(sums_MDC)], 1)
        mask = torch.ones(self.depth, self.depth, dtype=torch.bool).triu(1)
        for layer in self.layers:
            normed = layer.norm1(x_MDE)
            attended, _ = layer.attention(
                normed, normed, normed, attn_mask=mask, need_weights=False, is_causal=True
            )
            x_MDE = layer.norm2(x_MDE + attended)
            width = x_MDE.shape[-1]
            w1 = layer.linear1.weight.view(2 * width, self.depth, width)
            w2 = layer.linear2.weight.view(width, self.depth, 2 * width)
            inner = F.gelu(torch.einsum("mde,fde->mdf", x_MDE, w1))
            x_MDE = x_MDE + torch.einsum("mdf,edf->mde", inner, w2)
        x_MDE = self.norm(x_MDE)
        return [out(x_MDE[:, d]) for d, out in enumerate(self.out)]


class PlainModel(nn.Module):
    """Encoder, projector, language model, head, and the tokenizer that makes the codes.

    Args:
        load: sizes.
        codebooks: the tokenizer's tables.
        timed: called with the name of a part, gives the context in which it runs.
    """

    def __init__(self, load: Workload, codebooks: list[Tensor], timed: Callable) -> None:
        super().__init__()
        lm, vision = load.model.language, load.model.vision
        self.load, self.timed = load, timed
        config = LlamaConfig(
            hidden_size=lm.hidden_size,
            num_hidden_layers=lm.num_layers,
            num_attention_heads=lm.num_heads,
            intermediate_size=lm.ffn_hidden_size,
            vocab_size=lm.vocab_size,
            rms_norm_eps=lm.norm_eps,
            rope_theta=lm.rope_theta,
            max_position_embeddings=lm.max_positions,
            tie_word_embeddings=False,
        )
        self.llm = LlamaForCausalLM(config)
        self.tower = _siglip(vision)
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, lm.hidden_size),
            nn.GELU(),
            nn.Linear(lm.hidden_size, lm.hidden_size),
        )
        self.head = PlainHead(load, codebooks)
        self.tokenizer, self.codebooks = _siglip(vision), codebooks
        self.tower.requires_grad_(False)
        self.tokenizer.requires_grad_(False)

    def load_ours(self, weights: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> None:
        """Take over weights.

        Args:
            weights: all parts, by this project's names.
            tokenizer: the tokenizer's state.
        """
        found: dict[str, Tensor] = {}
        for rule in tables.llava_rules(self.load.model):
            found.update(rule.split(weights[rule.name]))
        parts = {"language_model.": self.llm, "vision_tower.": self.tower}
        for prefix, module in parts.items():
            _load(module, {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)})
        encoder = {k[len("encoder.") :]: v for k, v in tokenizer.items() if k[0] == "e"}
        _load(self.tokenizer, {f"vision_model.{name}": x for name, x in encoder.items()})
        names = {"linear_1": "0", "linear_2": "2"}
        for own, theirs in ((self.projector, "projector."), (self.head.projector, HEAD_PROJECTOR)):
            own.load_state_dict(
                {
                    f"{number}.{kind}": weights[f"{theirs}{name}.{kind}"]
                    for name, number in names.items()
                    for kind in ("weight", "bias")
                }
            )
        self.head.load_state_dict(
            {
                name: _head_weight(name, weights)
                for name in self.head.state_dict()
                if not name.startswith("projector.")
            },
            strict=False,
        )

    def features(self, tower: nn.Module, pixels_ICHW: Tensor) -> Tensor:
        """Features of the selected layer."""
        output = tower(pixels_ICHW, output_hidden_states=True)
        return output.hidden_states[self.load.model.vision.feature_layer]

    @torch.no_grad()
    def encode(self, pixels_ICHW: Tensor) -> Tensor:
        """Codes [I * N, D]."""
        residual = self.features(self.tokenizer, pixels_ICHW).flatten(0, 1)
        codes = []
        for table in self.codebooks:
            distance = residual.square().sum(1, keepdim=True) - 2 * residual @ table.T
            codes.append((distance + table.square().sum(1)).argmin(1))
            residual = residual - table[codes[-1]]
        return torch.stack(codes, 1)

    def forward(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """The text loss and the visual loss."""
        timed, patches = self.timed, self.load.model.vision.num_patches
        pixels = torch.stack([x.pixels_CHW for x in batch if x.pixels_CHW is not None])
        with timed("encoder"), torch.no_grad():
            features = self.features(self.tower, pixels)
        with timed("tokenizer"):
            codes_MD = self.encode(pixels)
        tokens, labels, mask, is_image = _collate(batch, patches)
        with timed("language model, forward"):
            embeds = self.llm.get_input_embeddings()(tokens)
            image = self.projector(features).flatten(0, 1)
            embeds = embeds.masked_scatter(is_image[..., None], image)
            hidden = self.llm.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        self.hidden = hidden
        with timed("LM head and loss, forward"):
            logits = self.llm.lm_head(hidden).float()
            text = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
        with timed("visual head and loss, forward"):
            all_logits = self.head(hidden[is_image], codes_MD)
            losses = [F.cross_entropy(x, codes_MD[:, d]) for d, x in enumerate(all_logits)]
            visual = torch.stack(losses).mean()
        return text, visual


def side(load: Workload, args: argparse.Namespace, watch: Any) -> tuple[Step, Callable[[], float]]:
    """A step, and the bytes of weights, gradients and optimizer state."""
    state = load_file(args.folder / "tokenizer" / "tokenizer.safetensors")
    books = [state.pop(f"codebooks.{d}").clone() for d in range(len(load.codebook_sizes))]
    model = PlainModel(load, books, watch.part)
    model.load_ours(load_file(args.folder / "weights.safetensors"), state)
    state.clear()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)

    def step(number: int) -> list[float]:
        text, visual = model(samples(load, number))
        watch.lap("other, forward")
        model.hidden.register_hook(lambda _: watch.lap("heads, backward"))
        (text + visual).backward()
        watch.lap("rest, backward")
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.hidden = None
        return [text.item(), visual.item(), norm.item()]

    def static() -> float:
        held = [*model.parameters(), *books, *trained]  # trained twice: its gradients
        return tensor_bytes(held) + state_bytes(optimizer)

    return step, static


HEAD_PROJECTOR = "visual_head.projector."


def _collate(batch: list[Sample], patches: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, attention mask and image positions, all [B, S], padded on the right."""
    rows = []
    for sample in batch:
        places = patches if sample.pixels_CHW is not None else 0
        image = torch.zeros(places, dtype=torch.int64)
        tokens = torch.cat([sample.tokens[:BEFORE], image, sample.tokens[BEFORE:]])
        labels = torch.cat([sample.labels[:BEFORE], image + IGNORE, sample.labels[BEFORE:]])
        is_image = torch.zeros_like(tokens, dtype=torch.bool)
        is_image[BEFORE : BEFORE + places] = True
        rows.append((tokens, labels, torch.ones_like(tokens), is_image))
    pads = (0, IGNORE, 0, False)
    return tuple(
        nn.utils.rnn.pad_sequence([row[k] for row in rows], batch_first=True, padding_value=pad)
        for k, pad in enumerate(pads)
    )


def _siglip(vision: VisionConfig) -> SiglipVisionModel:
    """A vision tower without its pooling head."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.ffn_hidden_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
            vision_use_head=False,
        )
    ).eval()


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights by the names of a file; transformers 5 drops a level of them in memory."""
    wanted = module.state_dict()
    if not set(state) <= set(wanted):
        state = {name.removeprefix("vision_model."): x for name, x in state.items()}
    module.load_state_dict(state)


def _head_weight(name: str, weights: dict[str, Tensor]) -> Tensor:
    """A weight of the plain head from those of this project's head."""
    ours = name.replace("in_proj_", "in_proj.")
    if name.startswith("in_proj."):
        ours = name.replace("in_proj.", "code_projection.")
    ours = ours.replace("out.", "heads.").replace("linear1.weight", "mlp.w1")
    x = weights["visual_head." + ours.replace("linear2.weight", "mlp.w2")]
    if "linear" in name:  # [D, out, in] -> [out, D * in]
        return x.transpose(0, 1).flatten(1)
    return x.flatten(0, 1) if "in_proj_" in name else x
