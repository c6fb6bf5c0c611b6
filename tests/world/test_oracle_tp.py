"""The recorded numbers of the official code on two tensor-parallel ranks."""

import pytest

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.plan import ParallelPlan
from tests import oracle

pytestmark = pytest.mark.world


def check_every_case() -> None:
    """Runs on every rank; all ranks hold the full gradients, and each one compares them."""
    groups = process_groups.initialize(ParallelPlan(tp=2, world=2), 60.0)
    for case in oracle.cases():
        got = oracle.run(case, "official", groups)
        oracle.check_official(case, got)
        if case in oracle.WITH_GRADIENTS:
            ratio, name = oracle.worst_gradient(case, got.gradients)
            assert ratio < 1e-5, (case, name)  # measured up to 2e-6
            oracle.check_exact(case, oracle.run(case, "exact", groups))


def test_two_tensor_parallel_ranks_reproduce_every_case():
    run_ranks(check_every_case, world_size=2, timeout_s=120)
