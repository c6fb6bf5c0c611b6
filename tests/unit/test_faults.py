"""Which errors are a node's, and when a job shall not get a node again."""

import json

from megatron_asvr.platforms.faults import Fault, classify, note, note_error, this_host

import pytest

from megatron_asvr.errors import DataError


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.delenv("ASVR_OUTCOME", raising=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("CUDA error: uncorrectable ECC error encountered", ("node7", True)),
        ("CUDA error: uncorrectable NVLink error detected during the execution", ("node7", True)),
        ("NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.", ("node7", True)),
        ("NVRM: Xid (PCI:0000:3b:00): 94, Contained ECC error", ("node7", True)),
        ("CUDA error: unspecified launch failure", ("node7", False)),
        ("NCCL error: unhandled system error (run with NCCL_DEBUG=INFO)", ("node7", False)),
        (
            "NCCL error: remote process exited or there was a network error\n"
            "socketProgress: Connection closed by remote peer node3<41832>",
            ("node3", False),
        ),
        ("NCCL error: remote process exited or there was a network error", None),
        ("CUDA error: device-side assert triggered", None),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", None),
        ("Connection closed by peer [127.0.0.1]:39816", None),
        ("NVRM: Xid (PCI:0000:3b:00): 13, Graphics Exception", None),
    ],
)
def test_what_an_error_says_of_a_node(text, wanted):
    fault = classify(text)
    assert (fault and (fault.host, fault.sure)) == wanted


def test_an_error_that_another_was_raised_from_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("ASVR_OUTCOME", str(tmp_path / "outcome.12.0"))
    error = DataError("step 3 cannot be read")
    error.__cause__ = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    assert note_error(error) == Fault("node7", "uncorrectable ECC error", sure=True)
    assert (tmp_path / "exclude").read_text() == "node7\n"


def test_a_suspect_is_left_out_in_its_second_start(monkeypatch, tmp_path):
    for start, wanted in ((0, False), (0, False), (1, True)):
        monkeypatch.setenv("ASVR_OUTCOME", str(tmp_path / f"outcome.12.{start}"))
        note(Fault("node3", "hang in step 5", sure=False))
        note(Fault(f"node1{start}", "hang in step 5", sure=False))
        assert (tmp_path / "exclude").exists() == wanted
    assert (tmp_path / "exclude").read_text() == "node3\n"
    lines = (tmp_path / "faults.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "host": "node3",
        "why": "hang in step 5",
        "sure": False,
        "start": "outcome.12.0",
    }


def test_without_a_job_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    note(Fault(this_host(), "hang", sure=True))
    assert list(tmp_path.iterdir()) == []
