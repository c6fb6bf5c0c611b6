"""What a GPU's rank is told of its device, seen on the CPU by standing in for the answers."""

import datetime

from megatron_asvr.platforms.cpu import CpuPlatform
from megatron_asvr.platforms.cuda import CudaPlatform

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.data.dali.pipeline import ImageDecoder
from megatron_asvr.launch import preflight, rank
from tools.make_dirty_images import good_images


class ToldError(Exception):
    """What ``init_process_group`` was told; nothing is initialised."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Of a platform that names one for its group."""
    named = torch.device("cuda", 5)

    def told(*_: object, **how: object) -> None:
        raise ToldError(how["device_id"], how["timeout"] > datetime.timedelta(0))

    monkeypatch.setattr(CpuPlatform, "group_device", named)
    monkeypatch.setattr(dist, "init_process_group", told)
    return named


def test_a_group_is_bound_to_the_ranks_device(device: torch.device) -> None:
    with pytest.raises(ToldError) as seen:
        rank.init_group(0, 1, store=dist.HashStore(), timeout_s=5.0)
    assert seen.value.args == (device, True)


def test_so_is_a_group_of_the_preflight(device: torch.device) -> None:
    here = rank.Place(launcher="torchrun", rank=0, world_size=1, local_rank=0)
    one = preflight.Rank(dist.HashStore(), here, preflight.Settings())
    with pytest.raises(ToldError) as seen:
        one._bandwidth([0], "round 0")
    assert seen.value.args == (device, True)


def test_dali_hands_over_in_the_order_of_the_platforms_stream(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(CpuPlatform, "stream", lambda _, device: asked.append(device))
    made = ImageDecoder(image_size=16, fit="pad", device=torch.device("cpu"), threads=1)
    runs, plain = [], made._pipeline.run

    def run(*how: object) -> object:
        runs.append(how)
        return plain(*how)

    monkeypatch.setattr(made._pipeline, "run", run)
    made.views([next(iter(dict(good_images()).values()))])
    assert asked == [torch.device("cpu")]
    assert runs == [(None,)]


def test_on_cuda_a_decoder_of_the_cpu_has_no_stream() -> None:
    """What can be asked of the platform for CUDA without one."""
    assert CudaPlatform().stream(torch.device("cpu")) is None


def test_the_cpu_binds_nothing() -> None:
    x = torch.ones(2)
    assert CpuPlatform().bring(x) is x
    assert CpuPlatform.group_device is None
    assert CpuPlatform().stream(torch.device("cpu")) is None
