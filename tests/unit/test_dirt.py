"""The dirty corpus in its short form; `make test-dirt` runs the whole one."""

from tools.dirt import check


def test_every_bad_image_of_a_dirty_corpus_is_named(tmp_path):
    found = check(tmp_path, images=400, seed=1)
    assert found["images"] == 400
    assert found["dirty"] == 20
    assert found["bad"] >= 10
    assert found["missed"] == found["good_but_named"] == []
    assert found["placeholders"] == found["named"]
    assert found["samples_met"] >= 400 - found["named"]
