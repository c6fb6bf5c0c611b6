"""A few of the faults of ``make test-torture``."""

from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest

from tests.torture import Torture

pytestmark = pytest.mark.world


def test_no_run_is_lost(tmp_path: Path) -> None:
    torture = Torture(tmp_path, seed=5)
    counts = torture.run(torture.faults(kills=6, full=2, flips=2))
    assert counts["saves killed"] >= 6
    assert counts["saves on a full disk"] == 2
    assert counts["bit flips"] == 2
    assert counts["resumed from the newest good checkpoint"] >= 6
