"""Local ranks: results, logs, and every way a rank can fail."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch import job
from megatron_asvr.launch.local import run_ranks

pytestmark = pytest.mark.world

FOLDER = tempfile.TemporaryDirectory()  # removed when the process ends that imported this


def describe(word: str) -> dict[str, object]:
    total = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    print(f"{word} from {dist.get_rank()}")  # noqa: T201
    return {
        "total": total.item(),
        "rank": int(os.environ["RANK"]),
        "world": int(os.environ["WORLD_SIZE"]),
        "threads": torch.get_num_threads(),
        "parent": os.getppid(),
    }


def test_the_result_of_rank_0_comes_back_and_every_rank_has_a_log(tmp_path):
    logs = tmp_path / "logs"
    got = run_ranks(describe, ("hello",), 2, log_dir=logs, threads_per_rank=2, timeout_s=300)
    assert (got["total"], got["rank"], got["world"], got["threads"]) == (3.0, 0, 2, 2)
    assert "hello from 0" in (logs / "rank_0.log").read_text()
    assert "hello from 1" in (logs / "rank_1.log").read_text()


def test_what_rank_0_prints_also_reaches_the_terminal(tmp_path):
    code = (
        "from tests.world.test_local_ranks import describe, run_ranks\n"
        f"run_ranks(describe, ('hello',), 2, log_dir={str(tmp_path)!r})"
    )
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "hello from 0" in done.stdout
    assert "hello from 1" not in done.stdout


def test_the_next_job_uses_the_same_nursery():
    first = run_ranks(describe, ("",), 1, timeout_s=300)
    second = run_ranks(describe, ("",), 1, timeout_s=300)
    assert first["parent"] == second["parent"] != os.getpid()


def nursery_folder() -> str:
    assert pathlib.Path(FOLDER.name).exists()
    return FOLDER.name


def test_a_rank_leaves_alone_what_the_nursery_cleans_up():
    folder = run_ranks(nursery_folder, (), 2, timeout_s=300)
    assert run_ranks(nursery_folder, (), 1, timeout_s=300) == folder != FOLDER.name


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the first mistake")
    dist.barrier()


def kill_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_1_exits() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(600)


def test_the_earliest_traceback_comes_first():
    with pytest.raises(LaunchError) as caught:
        run_ranks(fail_on_rank_1, (), 3, timeout_s=300)
    text = str(caught.value)
    assert text.index("rank 1: Traceback") < text.index("the first mistake")
    assert all(text.index("rank 1:") < text.index(f"rank {r}:") for r in (0, 2))


@pytest.mark.parametrize(
    ("fn", "cause"), [(kill_rank_1, "killed by SIGKILL"), (rank_1_exits, "exited with status 7")]
)
def test_a_dead_rank_ends_the_others(fn, cause, tmp_path):
    with pytest.raises(LaunchError) as caught:  # measured: after 0.2 s and 1.2 s
        run_ranks(fn, (), 2, log_dir=tmp_path, timeout_s=300)
    assert "had not finished" not in str(caught.value)
    failures = str(caught.value).partition("\n")[2]
    assert failures.startswith(f"rank 1: {cause}")


def start_helper(folder: str, end: str) -> None:
    """Rank 1 starts a process, as a checkpoint writer is, and does not end well."""
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    helper.start()
    pathlib.Path(folder, f"{dist.get_rank()}.pid").write_text(str(helper.pid))
    dist.barrier()
    if end == "killed" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.parametrize("end", ["killed", "late"])
def test_no_process_of_a_failed_rank_stays(tmp_path, end):
    run_ranks(describe, ("warm",), 1, timeout_s=300)
    with pytest.raises(LaunchError):
        run_ranks(start_helper, (str(tmp_path), end), 2, timeout_s=10)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    wait_until(lambda: not any(running(pid) for pid in pids))


def sleep() -> None:
    time.sleep(600)


def test_ranks_that_run_out_of_time_show_where_they_stand(tmp_path):
    run_ranks(describe, ("warm",), 1, timeout_s=300)
    with pytest.raises(LaunchError, match=r"had not finished after 5 s(.|\n)*in sleep"):
        run_ranks(sleep, (), 2, log_dir=tmp_path, timeout_s=5)


def unknown_place() -> None:
    """Returns what cannot be pickled."""
    return lambda: None


def test_a_result_that_cannot_be_pickled_is_a_failure():
    with pytest.raises(LaunchError, match="pickle"):
        run_ranks(unknown_place, (), 1, timeout_s=300)


def write_pids_and_sleep(folder: str) -> None:
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    helper.start()
    path = pathlib.Path(folder, f"{dist.get_rank()}.pid")
    path.write_text(f"{os.getpid()} {helper.pid}")
    time.sleep(600)


def running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, limit_s: float = 300.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_ranks_die_with_the_process_that_started_them(tmp_path, number):
    code = (
        "from tests.world.test_local_ranks import write_pids_and_sleep, run_ranks\n"
        f"run_ranks(write_pids_and_sleep, ({str(tmp_path)!r},), 2)"
    )
    root = pathlib.Path(__file__).parents[2]
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len([p for p in tmp_path.glob("*.pid") if p.read_text()]) == 2)
        pids = [int(n) for p in tmp_path.glob("*.pid") for n in p.read_text().split()]
        assert all(running(pid) for pid in pids)
        launcher.send_signal(number)
        assert launcher.wait(timeout=300) != 0
        wait_until(lambda: not any(running(pid) for pid in pids))
    finally:
        launcher.kill()
        launcher.wait()


def signals_reach(folder: str) -> str:
    got = []
    signal.signal(signal.SIGUSR1, lambda *_: got.append("SIGUSR1"))
    pathlib.Path(folder, f"{dist.get_rank()}.pid").write_text("ready")
    wait_until(lambda: got)
    return got[0]


def signal_when_ready(folder: str) -> None:
    """Another process's part: ask the launcher, its parent, to stop early."""
    path = pathlib.Path(folder)
    wait_until(lambda: len(list(path.glob("*.pid"))) == 2)
    os.kill(os.getppid(), signal.SIGUSR1)


def test_signals_to_the_launcher_reach_the_ranks(tmp_path):
    code = (
        "from tests.world.test_local_ranks import signal_when_ready\n"
        f"signal_when_ready({str(tmp_path)!r})"
    )
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as sender:
        assert run_ranks(signals_reach, (str(tmp_path),), 2, timeout_s=300) == "SIGUSR1"
        assert sender.wait(timeout=300) == 0


def nested() -> int:
    return job.run(dist.get_world_size, (), 2)


TERMINATED_AT_BIRTH = """
import os, signal
from megatron_asvr.launch.nursery import Job, Nursery

nursery = Nursery(os.pipe()[0], os.pipe()[1])
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
settings = dict(folder=".", path=[], cwd=".", env={}, log_dir=None, threads=1)
settings |= dict(init=False, deterministic=False)
job = Job(world_size=1, module="math", timeout_s=1, fork=True, **settings)
_, status = os.waitpid(nursery._start(job, 0), 0)
print(os.waitstatus_to_exitcode(status))
"""


def test_a_signal_in_its_first_moment_ends_a_rank_and_is_no_success():
    command = [sys.executable, "-c", TERMINATED_AT_BIRTH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == -signal.SIGTERM, done.stderr


def test_inside_a_job_a_run_joins_it():
    assert job.run(nested, (), 2, timeout_s=300) == 2


@pytest.mark.slow
def test_a_rank_can_be_a_new_interpreter(monkeypatch):
    """As on a GPU, where ranks are not forked."""
    from megatron_asvr.platforms import cpu

    monkeypatch.setattr(cpu.CpuPlatform, "supports_fork", False)
    assert run_ranks(describe, ("spawned",), 2, timeout_s=120)["total"] == 3.0
