"""Our division of positions over context-parallel ranks is Transformer Engine's.

Nobody has run this yet; docs/platforms.md says so until somebody does.
"""

import pytest
import torch

from megatron_asvr.parallel.context import partition
from tests.unit.test_context import random_documents

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cp", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_partition_is_transformer_engines(cp, seed):
    import transformer_engine.pytorch  # noqa: F401  (loads the library that the next one needs)
    import transformer_engine_torch

    documents = random_documents(cp, seed)
    total = int(documents[-1])
    on_gpu = torch.from_numpy(documents).cuda()
    for rank in range(cp):
        theirs = transformer_engine_torch.thd_get_partitioned_indices(on_gpu, total, cp, rank)
        assert partition(documents, total, cp, rank).tolist() == theirs.tolist()
