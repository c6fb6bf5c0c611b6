"""Bytes that the forward pass of one micro-batch keeps for the backward pass, by arithmetic.

Letters in the formulas, all of one rank: T positions (rows x columns), N of them under sequence
parallelism (T / tp), H the hidden width, q and k the widths of queries and of keys, f the inner
width of the feed-forward part, C the width of a head, w the bytes of an element.

- A norm keeps its input and an inverse root for each position, ``w N H + 4 N``; torch's, in bf16
  without Transformer Engine, its input and the normalised input in fp32, ``8 N H + 4 N``. The
  linear after it keeps the output, ``w N H``.
- Rotation keeps a cosine and a sine for queries and for keys: ``4 w T C``.
- Attention keeps the packed projection (its values are a part of it), the rotated queries and keys
  and what it gives: ``w T (q + 2k) + w T (2q + k)``; one logarithm for each head and position, and
  on the CPU the mask in numbers: ``w B S_q S_k``. Selective recomputation keeps neither.
- The feed-forward part keeps gate and up, the gate's activation, a copy of up and their product:
  ``5 w T f``.
- Full recomputation keeps a layer's input, ``w N H``, and one layer at a time in the backward pass.
- What is not trained keeps no input of a linear (``2 w N H + w T f``, with selective recomputation
  ``w T q``) and no normalised input, but what gradients pass through.

Source: the accounting of arXiv 2205.05198, section 4, done again for RMSNorm, rotary positions,
grouped queries, a gated activation and no dropout, from megatron-core's unfused layers
(transformer/mlp.py, models/common/embeddings/rope_utils.py) and precision/local.py; for
Transformer Engine a formula of our own, not yet measured on a GPU. tests/unit/test_planner_saved.py
compares the CPU's with what autograd keeps.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_asvr.config.schema import Config
from megatron_asvr.model.language import padded_vocab_size
from megatron_asvr.model.output_loss import CHUNK_BYTES

FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The largest micro-batch, as one rank sees it.

    Attributes:
        rows: sequences.
        length: columns of a row on all context-parallel ranks together.
        images: views on all ranks.
        texts: positions of this rank with a text target.
        codes: positions of this rank with a visual target.
    """

    rows: int
    length: int
    images: int
    texts: int
    codes: int


def largest(config: Config) -> Shape:
    """The largest micro-batch that a run can have, when a sample shows one picture.

    Without packing every row is as long as ``data.max_length`` allows; a packed row counts as full
    of pictures, and of text targets too.

    Args:
        config: the run, checked.
    """
    d, cp, rows = config.data, config.parallel.cp, config.train.micro_batch
    patches, views = config.model.vision.num_patches, config.model.resolution.most_views
    length = (d.pack_length or d.max_length) if d.packing else d.max_length
    multiple = (2 * cp if cp > 1 else 1) * (config.parallel.tp if config.parallel.sp else 1)
    length = -(-length // multiple) * multiple
    pictures = rows * (max(1, length // (views * patches)) if d.packing else 1)
    images = pictures * views
    codes = min(images * patches, rows * length)
    texts = rows * length if d.packing else rows * length - codes
    return Shape(rows=rows, length=length, images=images, texts=texts // cp, codes=codes // cp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes kept by parts of the model, for one micro-batch.

    Args:
        config: the run, checked.
        shape: of the micro-batch.
        codebook_sizes: codes of every depth; empty without a visual head.
        code_width: width of a code vector.
        backend: who computes the layers.
    """

    config: Config
    shape: Shape
    codebook_sizes: tuple[int, ...]
    code_width: int
    backend: Literal["te", "local"]

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return 2 if self.config.train.precision == "bf16" else FP32

    @property
    def positions(self) -> int:
        """T of the module's docstring."""
        return self.shape.rows * self.shape.length // self.config.parallel.cp

    @property
    def split(self) -> int:
        """N of the module's docstring."""
        p = self.config.parallel
        return self.positions // p.tp if p.sp else self.positions

    def hidden(self) -> int:
        """What a stage sends to the next one."""
        return self.width * self.split * self.config.model.language.hidden_size

    def layer(self, recompute: str | None = None) -> int:
        """A layer of the language model.

        Args:
            recompute: instead of the run's.
        """
        recompute = recompute or self.config.train.recompute
        if recompute == "full":
            return self.hidden()
        lm, tp, w = self.config.model.language, self.config.parallel.tp, self.width
        queries = lm.num_heads * lm.width_per_head // tp
        keys = lm.kv_heads * lm.width_per_head // tp
        inner, trained = lm.ffn_hidden_size // tp, self._lm_trained
        kept = 2 * self._norm(self.split, lm.hidden_size, trained)
        kept += 2 * w * self.split * lm.hidden_size if trained else 0
        kept += 4 * w * self.positions * lm.width_per_head
        given = 0 if recompute == "selective" and not trained else queries
        kept += w * self.positions * (2 * queries + 3 * keys + given)
        kept += (4 + trained) * w * self.positions * inner
        kept += self._head_norms(queries, keys) if lm.qk_norm else 0
        if recompute == "none":
            kept += FP32 * self.positions * lm.num_heads // tp
            kept += self._mask() if self.backend == "local" else 0
        return kept

    @property
    def _lm_trained(self) -> bool:
        return "language_model" in self.config.train.trainable

    @property
    def _norm_is_one_node(self) -> bool:
        """Whether a norm is that of ``precision.norm``: in fp32 on the CPU."""
        return self.width == FP32

    def _norm(self, rows: int, size: int, trained: bool) -> int:
        if self.backend == "te" or self._norm_is_one_node:
            return self.width * rows * size + FP32 * rows
        return (1 + trained) * FP32 * rows * size + FP32 * rows

    def _head_norms(self, queries: int, keys: int) -> int:
        """Norms of each head's queries and keys; fp32 keys are a part of the packed projection."""
        heads = (queries + keys) // self.config.model.language.width_per_head
        if self.backend == "te":
            return self.positions * (self.width * queries + FP32 * heads)
        copied = queries + (keys if self.width != FP32 else 0)
        normalised = 0 if self._norm_is_one_node else (queries + keys) * self._lm_trained
        return FP32 * self.positions * (copied + normalised + heads)

    def shared(self) -> int:
        """What the layers of a chunk keep together: the bool mask and, for ``full``, angles."""
        recompute, s = self.config.train.recompute, self.shape
        kept = self._mask() // self.width if self.backend == "local" and recompute != "none" else 0
        if recompute == "full":
            kept += FP32 * self.positions * self.config.model.language.width_per_head
            kept += s.rows * s.length // self.config.parallel.cp  # padding, bool
        return kept

    def _mask(self) -> int:
        s = self.shape
        return self.width * s.rows * (s.length // self.config.parallel.cp) * s.length

    def backward(self) -> int:
        """What the backward pass of a layer has beside what the forward pass kept.

        The gradients inside the feed-forward part, and its input, gathered: ``w T (5 f + 2 H)``.
        """
        lm, tp = self.config.model.language, self.config.parallel.tp
        inner = 5 * lm.ffn_hidden_size // tp + 2 * lm.hidden_size
        again = self.layer("none") if self.config.train.recompute == "full" else 0
        if self.config.train.recompute == "selective" and self.backend == "local":
            again = self._mask()
        return self.width * self.positions * inner + again

    def projector(self) -> int:
        """Features of the patches, both linears, embeddings: ``w P (F + 2 H / tp + H)``."""
        model, p = self.config.model, self.config.parallel
        if "projector" not in self.config.train.trainable and not self._encoder_trained:
            return 0
        patches = self.shape.images * model.vision.num_patches // p.cp
        features = model.vision.hidden_size * model.resolution.num_scales
        hidden = model.language.hidden_size
        return self.width * patches * (features + 2 * hidden // p.tp + hidden)

    @property
    def _encoder_trained(self) -> bool:
        return "vision_encoder" in self.config.train.trainable

    def encoder(self) -> tuple[int, int]:
        """Kept by the encoder, and passing: of this rank's share of the images.

        For every patch a trained layer keeps ``w (8 F + 2 f) + 16`` and a logarithm for each head;
        of a frozen one only one exists at a time. Features of all images are gathered: ``w F``.
        """
        model, p, w = self.config.model, self.config.parallel, self.width
        v, crops = model.vision, model.resolution.num_crops
        rows = -(-self.shape.images // (p.tp * p.cp)) * crops * v.num_patches
        layer = rows * (w * (8 * v.hidden_size + 2 * v.ffn_hidden_size) + FP32 * (4 + v.num_heads))
        every = self.shape.images * crops * v.num_patches * w * v.hidden_size
        kept = v.num_feature_layers * layer if self._encoder_trained else 0
        return kept, layer + every

    def text_loss(self) -> int:
        """The final norm, and the gradients that the LM head has at once in the forward pass."""
        lm, trained, tp = self.config.model.language, self._lm_trained, self.config.parallel.tp
        kept = self._norm(self.split, lm.hidden_size, trained)
        kept += self.width * self.shape.texts * lm.hidden_size
        if trained:
            kept += FP32 * padded_vocab_size(lm.vocab_size, tp) * lm.hidden_size // tp
        return kept

    def visual_head(self) -> int:
        """What the visual head keeps, its output layers' gradients included."""
        if not self.codebook_sizes:
            return 0
        model, t, w = self.config.model, self.config.train, self.width
        head, tp, positions = model.visual_head, self.config.parallel.tp, self.shape.codes
        e, depth = head.width, len(self.codebook_sizes)
        rows = depth * positions
        # positions of the language model, both linears of the projector, sums of code vectors
        kept = w * positions * (model.language.hidden_size + 2 * e // tp)
        kept += w * (depth - 1) * positions * self.code_width
        kept += head.num_layers * (w * rows * e if t.recompute_visual_head else self.head_layer())
        kept += self._head_norm(rows) + w * rows * e  # final norm; gradient of its output
        if "visual_head" in t.trainable:
            kept += FP32 * (e + 1) * sum(-(-size // tp) for size in self.codebook_sizes)
        return kept

    def head_layer(self) -> int:
        """A layer of the visual head, for ``D M`` rows of width E.

        Two norms, packed queries, keys and values, what attention gives, a logarithm for each
        head, and both inner widths; in fp32 ``D M (16 E + 8) + w D M 8 E / tp + 4 D M heads``.
        """
        head, tp, w = self.config.model.visual_head, self.config.parallel.tp, self.width
        rows, split = len(self.codebook_sizes) * self.shape.codes, tp
        if head.heads % tp:
            split = 1  # every rank computes all of its attention
        norms = 2 * (self._head_norm(rows) + w * rows * head.width)
        attention = w * rows * 4 * head.width // split + FP32 * rows * head.heads // split
        return norms + attention + w * rows * 4 * head.width // tp

    def _head_norm(self, rows: int) -> int:
        return self._norm(rows, self.config.model.visual_head.width, trained=True)

    def text_logits(self) -> int:
        """The logits of the text that exist at once; see ``_logits``."""
        lm, tp = self.config.model.language, self.config.parallel.tp
        return self._logits(self.shape.texts, padded_vocab_size(lm.vocab_size, tp) // tp)

    def visual_logits(self) -> int:
        """The logits of codes that exist at once; see ``_logits``."""
        rows = -(-max(self.codebook_sizes) // self.config.parallel.tp)
        return self._logits(self.shape.codes, rows)

    def _logits(self, positions: int, rows: int) -> int:
        """Logits of a chunk (``output_loss.chunks``) in fp32, and in another precision once more.

        Args:
            positions: with a target.
            rows: of this rank's part of the vocabulary.
        """
        number = max(1, -(-positions * rows * FP32 // CHUNK_BYTES))
        chunk = -(-positions // number) * rows
        return chunk * (FP32 + (self.width if self.width != FP32 else 0))

    def head_gradients(self) -> int:
        """Gradients of all output layers of the visual head once more, in another precision."""
        if self.width == FP32:
            return 0
        rows = sum(-(-size // self.config.parallel.tp) for size in self.codebook_sizes)
        trained = "visual_head" in self.config.train.trainable
        return self.width * rows * (self.config.model.visual_head.width + 1) * trained

    def text_gradient(self) -> int:
        """The gradient of the LM head once more, in another precision."""
        if self.width == FP32 or not self._lm_trained:
            return 0
        lm, tp = self.config.model.language, self.config.parallel.tp
        return self.width * padded_vocab_size(lm.vocab_size, tp) * lm.hidden_size // tp
