import json

import pytest

from examples.quickstart.phases import Phase, Phases


class Work:
    """Two phases that leave a file each and count how often they ran."""

    def __init__(self, folder):
        self.folder, self.ran = folder, []

    def phases(self, **settings):
        return [
            Phase(
                name=name,
                run=lambda name=name: self.work(name),
                inputs=[settings.get(name, "")],
                outputs=[self.folder / name],
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


def test_a_changed_phase_and_what_follows_start_afresh(work):
    work.run()
    work.run(first="other")
    assert work.ran == ["first", "second", "first", "second"]
    assert (work.folder / "first/file").read_text() == "fresh"
    work.run(first="other", second="other")
    assert work.ran[4:] == ["second"]


def test_an_interrupted_phase_continues_in_what_it_left(work):
    work.run()
    marker = work.folder / "phases/second.json"
    left = json.loads(marker.read_text()) | {"done": False, "seconds": 100.0}
    marker.write_text(json.dumps(left))
    results = work.run()
    assert work.ran == ["first", "second", "second"]
    assert (work.folder / "second/file").read_text() == "continued"
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
