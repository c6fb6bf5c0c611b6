"""The GPUs of this machine as ``nvidia-smi`` sees them: without a CUDA context, and all of them."""

import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = (
    *("index", "name", "memory.total", "memory.used", "utilization.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "driver_version"),
)
_ANSWER_S = 30.0  # a driver in trouble does not answer
BUSY_MEMORY_SHARE = 0.05  # a CUDA context of our own takes less
BUSY_PERCENT = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        index: its number on the machine.
        name: its product name.
        memory_mib: all of its memory.
        used_mib: what is taken.
        busy_percent: share of the last moment in which a kernel ran.
        ecc_errors: memory errors since the driver was loaded that could not be corrected.
        driver: version of the driver.
    """

    index: int
    name: str
    memory_mib: int
    used_mib: int
    busy_percent: int
    ecc_errors: int
    driver: str

    @property
    def trouble(self) -> str | None:
        """Why a job should not start on it, or None."""
        if self.ecc_errors:
            return f"GPU {self.index}: {self.ecc_errors} uncorrected memory errors; reset it"
        used = self.used_mib > BUSY_MEMORY_SHARE * self.memory_mib
        if used or self.busy_percent > BUSY_PERCENT:
            return (
                f"GPU {self.index} is not idle: {self.used_mib} of {self.memory_mib} MiB used, "
                f"{self.busy_percent}% busy; end what runs there"
            )
        return None


def look() -> tuple[list[Gpu], str]:
    """All GPUs, and why there are none when there are none."""
    if shutil.which("nvidia-smi") is None:
        return [], "no nvidia-smi on PATH"
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi has not answered for {_ANSWER_S:.0f} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        return [], f"nvidia-smi failed with status {done.returncode}: {said}"
    return parse(done.stdout), "nvidia-smi lists none"


def parse(text: str) -> list[Gpu]:
    """The GPUs in nvidia-smi's lines of comma-separated values."""
    found = []
    for line in filter(None, text.splitlines()):
        index, name, total, used, busy, ecc, driver = (word.strip() for word in line.split(","))
        found.append(
            Gpu(
                index=_number(index),
                name=name,
                memory_mib=_number(total),
                used_mib=_number(used),
                busy_percent=_number(busy),
                ecc_errors=_number(ecc),
                driver=driver,
            )
        )
    return found


def _number(word: str) -> int:
    """A count; 0 for ``[N/A]``, which a GPU without the feature gives."""
    return int(word) if word.isdecimal() else 0
