import json
import subprocess
import sys

import pytest

from examples.quickstart.phases import Phase, Phases


class Work:
    """Two phases that leave a file each and count how often they ran."""

    def __init__(self, folder):
        self.folder, self.ran, self.continues = folder, [], True

    def phases(self, **settings):
        return [
            Phase(
                name=name,
                run=lambda name=name: self.work(name),
                inputs=[settings.get(name, "")],
                outputs=[self.folder / name],
                continues=self.continues,
            )
            for name in ("first", "second")
        ]

    def work(self, name):
        self.ran.append(name)
        (self.folder / name).mkdir(exist_ok=True)
        found = (self.folder / name / "file").exists()
        (self.folder / name / "file").write_text("continued" if found else "fresh")

    def run(self, **settings):
        phases = Phases(self.folder / "phases", say=lambda line: None)
        for phase in self.phases(**settings):
            phases.do(phase)
        return phases.results


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_done_phases_are_not_done_again(work):
    first, again = work.run(), work.run()
    assert work.ran == ["first", "second"]
    assert again == first
    assert all(result["seconds"] >= 0 and result["done"] for result in first.values())
    assert first["first"]["peak_mem_bytes"] > 2**20


def test_seconds_of_child_processes_count(tmp_path):
    spin = "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass"

    def work():
        subprocess.run([sys.executable, "-c", spin], check=True)

    phases = Phases(tmp_path, say=lambda line: None)
    phases.do(Phase(name="spin", run=work))
    used = phases.results["spin"]
    assert used["seconds"] >= 1.5
    assert 0.3 <= used["cpu_seconds"] <= 3  # sampled once a second; this process adds a little


def test_a_changed_phase_and_what_follows_start_afresh(work):
    work.run()
    work.run(first="other")
    assert work.ran == ["first", "second", "first", "second"]
    assert (work.folder / "first/file").read_text() == "fresh"
    work.run(first="other", second="other")
    assert work.ran[4:] == ["second"]


@pytest.mark.parametrize(("continues", "left"), [(True, "continued"), (False, "fresh")])
def test_an_interrupted_phase_continues_if_it_can(work, continues, left):
    work.continues = continues
    work.run()
    marker = work.folder / "phases/second.json"
    undone = json.loads(marker.read_text()) | {"done": False, "seconds": 100.0}
    marker.write_text(json.dumps(undone))
    results = work.run()
    assert work.ran == ["first", "second", "second"]
    assert (work.folder / "second/file").read_text() == left
    assert results["second"]["seconds"] >= 100.0


def test_a_failure_leaves_the_phase_undone(work):
    def fail():
        raise SystemExit("no")

    phases = Phases(work.folder / "phases", say=lambda line: None)
    with pytest.raises(SystemExit):
        phases.do(Phase(name="first", run=fail))
    assert not json.loads((work.folder / "phases/first.json").read_text())["done"]


def test_a_damaged_marker_is_no_marker(work):
    work.run()
    (work.folder / "phases/first.json").write_text("{")
    work.run()
    assert work.ran == ["first", "second", "first"]
