"""Lengths of samples as in LLaVA's instruction data, drawn from a documented mixture.

LLaVA-665K (Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744, table
7) is a mixture of sources, whose numbers of samples (thousands) are the weights here. Texts of each
kind are log-normal, with a median and a spread in tokens that fit what the sources hold: many short
questions and answers in one sample (VQA with its format prompts, region descriptions), one short
question (OCR-VQA's few), conversations and descriptions of LLaVA-Instruct, and ShareGPT, which is
text alone and long. These medians and spreads are an estimate, not measured on the data, which
cannot be had here; `asvr data check` reports the lengths of the data that one has.
"""

import numpy as np

# samples (thousands), median tokens of text, spread of its logarithm, whether there is an image
KINDS = {
    "LLaVA-Instruct": (158, 260, 0.45, True),
    "ShareGPT": (40, 700, 0.90, False),
    "VQAv2, GQA": (83 + 72, 260, 0.50, True),
    "OKVQA, A-OKVQA": (9 + 66, 110, 0.40, True),
    "OCR-VQA, TextCaps": (80 + 22, 110, 0.35, True),
    "RefCOCO, Visual Genome": (48 + 86, 400, 0.45, True),
}
SHORTEST = 20  # tokens: a template and a few words


def llava_lengths(number: int, *, patches: int, max_length: int, seed: int) -> list[int]:
    """Positions of ``number`` samples.

    Args:
        number: samples.
        patches: positions of an image (729 for SigLIP at 384 pixels, 576 for CLIP at 336).
        max_length: longer samples lose text.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    kinds = list(KINDS.values())
    weights = np.array([kind[0] for kind in kinds], dtype=float)
    chosen = generator.choice(len(kinds), size=number, p=weights / weights.sum())
    medians, spreads, images = (np.array([kind[k] for kind in kinds])[chosen] for k in (1, 2, 3))
    texts = np.exp(np.log(medians) + spreads * generator.standard_normal(number))
    lengths = np.maximum(texts.astype(int), SHORTEST) + images * patches
    return np.minimum(lengths, max_length).tolist()
