"""Contracts of the ledger that no other file holds."""

from pathlib import Path

from megatron_asvr.platforms.cpu import CpuPlatform
from megatron_asvr.platforms.cuda import CudaPlatform

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.checkpoint.state import Part
from megatron_asvr.checkpoint.write import plan, write
from megatron_asvr.errors import AsvrError
from megatron_asvr.hf.suite import answer
from megatron_asvr.parallel import collectives
from tests.language_cases import one_rank


@pytest.mark.parametrize(("copy", "written"), [(True, 1.0), (False, 2.0)])
def test_what_is_saved_in_the_background_may_change(copy, written, tmp_path: Path) -> None:
    memory = torch.ones(3)
    part = Part(key="x", memory=memory, shape=(3,), offset=(0,), is_main=True, is_padded=False)
    share = plan([part], tmp_path, rank=0, copy=copy)
    memory.add_(1)
    write(share)
    assert torch.load(share.path).tolist() == [written] * 3


def test_answers_are_of_the_platforms_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, dtype in ((CpuPlatform(), torch.float32), (CudaPlatform(), torch.bfloat16)):
        monkeypatch.setattr(answer, "select", lambda platform=platform: (platform, "told"))
        assert answer.answer_dtype() == dtype


def test_nccl_gets_no_tensor_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_rank() as groups:
        monkeypatch.setattr(dist, "get_backend", lambda _: "nccl")
        with pytest.raises(AsvrError, match="on cpu over 1 ranks: nccl wants tensors on cuda"):
            collectives._all_gather(torch.ones(2), groups.world)
