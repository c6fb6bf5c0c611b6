import math

import pytest

from megatron_asvr.model.asvr import build_model
from megatron_asvr.model.sharding import full_shape
from megatron_asvr.planner.parameters import count_parameters
from tests.language_cases import one_rank
from tests.run_cases import CODEBOOK_SIZES, config, tokenizer

MIXTURE = {"model__language__num_experts": 5, "model__language__expert_ffn_hidden_size": 20}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_real_model(family, tied):
    made = config(
        model__language__family=family,
        model__language__tied_embeddings=tied,
        **(MIXTURE if family in ("mixtral", "qwen3_moe") else {}),
    )
    visual = tokenizer(made.model.vision)
    with one_rank() as groups:
        model = build_model(made, groups=groups, tokenizer=visual)
        real = {
            name: sum(math.prod(full_shape(p, groups=groups)) for p in part.parameters())
            for name, part in model.parts().items()
        }
    assert count_parameters(made.model, CODEBOOK_SIZES, visual.width) == real


def test_the_paper_s_head_has_the_published_size():
    # 724 M for the depth transformer with 8 x 16,384 codes, 737 M with the projector to Vicuna-7B.
    head = count_parameters(config().model.__class__(), [16384] * 8, 1152)["visual_head"]
    assert round(head / 1e6) == 737
