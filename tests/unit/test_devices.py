"""What a GPU's rank is told of its device, seen on the CPU by standing in for the answers."""

import datetime

from megatron_asvr.platforms.cpu import CpuPlatform
from megatron_asvr.platforms.cuda import CudaPlatform

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.data.dali import pipeline
from megatron_asvr.data.dali.pipeline import ImageDecoder
from megatron_asvr.launch import preflight, rank
from tools.make_dirty_images import good_images


class ToldError(Exception):
    """What ``init_process_group`` was told; nothing is initialised."""


def told(*_: object, **how: object) -> None:
    """In place of ``init_process_group``."""
    raise ToldError(how["device_id"], how["timeout"] > datetime.timedelta(0))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Of a platform that names one for its group."""
    named = torch.device("cuda", 5)
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


def test_a_rank_takes_the_gpu_of_its_place_on_the_node_and_then_its_group(monkeypatch) -> None:
    chosen: list[int] = []
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(rank, "select", lambda: (CudaPlatform(), "told"))
    monkeypatch.setattr(rank, "open_store", lambda *_: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", told)
    with pytest.raises(ToldError) as seen:
        rank.init_rank()
    assert chosen == [3]
    assert seen.value.args == (torch.device("cuda", 3), True)


def test_dali_decodes_on_the_gpu_of_its_rank(monkeypatch) -> None:
    def graph(**how: object) -> None:
        raise ToldError(how["device_id"])

    monkeypatch.setattr(pipeline, "pipeline_def", graph)
    for device, number in ((torch.device("cuda", 5), 5), (torch.device("cpu"), None)):
        with pytest.raises(ToldError) as seen:
            ImageDecoder(image_size=16, fit="pad", device=device, threads=1)
        assert seen.value.args == (number,)


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
