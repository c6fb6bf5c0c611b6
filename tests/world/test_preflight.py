"""A preflight of real ranks, one of which is not like the others: that one is named."""

import dataclasses
import json
import os
import resource
import sys

import pytest
import yaml

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import to_dict
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.launch.node import Wish
from megatron_asvr.launch.preflight import Rank, Settings, preflight
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

ODD = 2  # the rank that is not like the others, and so its node


class SickRank(Rank):
    """What its GPU is found to do is made up; how it is asked and told is not."""

    def act(self, word):
        told = super().act(word)
        if word["do"] == "probe":
            told |= {"state": "PASS", "action": "look at its clocks"}
            if self._here.rank == ODD and word["name"] == "gemm_rate":
                told |= {"state": "FAIL", "measured": "12 TFLOP/s"}
        return told


class LateRank(Rank):
    def now(self):
        return super().now() + 100.0


def one_rank(settings, kind, argument):
    """Each rank is a node of its own; the odd one is changed as the case wants."""
    rank, make = int(os.environ["RANK"]), Rank
    os.environ.update(SLURMD_NODENAME=f"node{rank}", LOCAL_RANK="0")
    if rank == ODD:
        if kind == "package":
            sys.path.insert(0, argument)
        if kind == "folder":
            settings = dataclasses.replace(
                settings, wish=dataclasses.replace(settings.wish, folder=argument)
            )
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))
        if kind == "clock":
            make = LateRank
        if kind == "gpu":
            make = SickRank
        if kind == "data":
            settings = dataclasses.replace(
                settings, wish=dataclasses.replace(settings.wish, overrides=(argument,))
            )
        if kind == "network":
            os.environ["GLOO_SOCKET_IFNAME"] = argument
        if kind == "gone":
            return None
    report, hangs = preflight(settings, make)
    assert not hangs
    return report


def check(tmp_path, kind=None, argument=None, *, timeout_s=60.0, **wish):
    shared = tmp_path / "shared"
    settings = Settings(
        wish=Wish(**{"folder": str(shared), "write_mib": 1, **wish}),
        timeout_s=timeout_s,
        message_mib=1,
        store=str(tmp_path / "store"),
    )
    report = run_ranks(one_rank, (settings, kind, argument), 3, init=False, timeout_s=240)
    assert not shared.exists()  # nothing is left behind
    return report


def only_fault(report):
    (wrong,) = report.wrong
    assert wrong["node"] == f"node{ODD}"
    return wrong["check"], wrong["text"]


def test_nodes_that_are_alike_pass(tmp_path):
    report = check(tmp_path)
    assert report.ok, report.wrong
    measured = {(a, b) for a, b, speed in report.numbers["pairs_gb_s"] if speed > 0}
    assert {frozenset(pair) for pair in measured} == {
        frozenset(pair) for pair in (("node0", "node1"), ("node0", "node2"), ("node1", "node2"))
    }
    assert set(report.numbers["written_mb_s"]) == {"node0", "node1", "node2"}


def test_another_version_of_a_package(tmp_path):
    info = tmp_path / "packages" / "numpy-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    name, text = only_fault(check(tmp_path, "package", str(info.parent)))
    assert name == "software"
    assert "numpy 0.1, elsewhere " in text


def test_a_folder_that_is_not_shared(tmp_path):
    name, text = only_fault(check(tmp_path, "folder", str(tmp_path / "elsewhere")))
    assert name == "storage"
    assert "elsewhere is not shared" in text


def test_a_folder_that_cannot_be_written(tmp_path):
    name, text = only_fault(check(tmp_path, "full"))
    assert name == "storage"
    assert "cannot be written: File too large" in text


def test_a_clock_that_is_wrong(tmp_path):
    name, text = only_fault(check(tmp_path, "clock"))
    assert name == "clock"
    assert text.startswith(("+99.", "+100."))


def test_a_gpu_that_is_slow(tmp_path):
    name, text = only_fault(check(tmp_path, "gpu"))
    assert name == "probes"
    assert text == f"gemm_rate (rank {ODD}): 12 TFLOP/s; next: look at its clocks"


def test_data_that_one_node_cannot_read(tmp_path):
    files = make_files(tmp_path / "files")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(run_config(files, tmp_path / "run"))))
    away = f"data.train=[{{path: {tmp_path / 'away.json'}}}]"
    name, text = only_fault(check(tmp_path, "data", away, config=str(path)))
    assert name == "data"
    assert "away.json cannot be read: No such file" in text


def test_a_network_that_one_node_is_not_in(tmp_path):
    name, text = only_fault(check(tmp_path, "network", "none0", timeout_s=10.0))
    assert name == "bandwidth"
    assert text.startswith("with node")


def test_a_node_that_never_answers_is_named_in_time(tmp_path):
    report = check(tmp_path, "gone", timeout_s=5.0)
    (wrong,) = report.wrong
    assert wrong["check"] == "ranks"
    assert f"rank {ODD} did not answer to 'look' for 5 s" in wrong["text"]
    assert ["node0", "node1"] in [sorted(pair[:2]) for pair in report.numbers["pairs_gb_s"]]


def test_the_command_prints_a_table_and_json_and_fails_with_one_error(tmp_path, capsys):
    command = ["preflight", "--nproc", "2", "--folder", str(tmp_path), "--write-mib", "1"]
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == [
        *("ranks", "software", "gpus", "probes", "clock", "storage", "data", "bandwidth")
    ]
    assert table[3].split(maxsplit=3)[1:3] == ["not", "checked"]
    assert "pinned_copy, te_linear, gemm_rate NOT RUN: 0 of 1 GPUs" in table[3]
    assert main([*command, "--json", "--min-gb-s", "1e9"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert not report["ok"]
    assert report["wrong"][0]["check"] == "bandwidth"
    assert printed.err.count("asvr preflight: LaunchError: these nodes must not start") == 1
