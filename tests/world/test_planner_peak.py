"""The planned peak of memory is the one that training has."""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest

from megatron_asvr.launch.local import run_ranks
from tests.peak_cases import LARGER, WITHIN, measured, planned

pytestmark = pytest.mark.world

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {"tp": 1}),
    "tp2": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"tp": 1, "pp": 2}),
}


@pytest.mark.parametrize("sizes", [{}, LARGER], ids=["quick_start", "ten_times"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_is_within_a_tenth_of_what_is_measured(layout: str, sizes: dict[str, int]) -> None:
    world, degrees = LAYOUTS[layout]
    plans = planned(sizes, degrees, world)
    real = run_ranks(measured, (sizes, degrees), world, timeout_s=240)
    assert plans == pytest.approx(real, rel=WITHIN)
