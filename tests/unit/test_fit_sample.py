"""What a tokenizer is fitted to is bounded, spread evenly, and survives an interruption."""

import weakref

import pytest
import torch

from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.train.fit_sample import FitSample

N, C = 4, 8  # patches of an image, width


def sample(folder, images, **changes):
    settings = {
        "num_patches": N,
        "max_vectors": 60,
        "codebook_sizes": (8,),
        "batch": 5,
        "iters": 2,
        "seed": 0,
        "facts": {"data.image_fit": "pad"},
        "group": None,
    }
    return FitSample(folder, [f"{n:064x}" for n in range(images)], **{**settings, **changes})


class Encoder:
    """Features that say where they come from, and how many batches of them were alive at a time."""

    def __init__(self, fail_after=10**6):
        self.alive = self.most = self.calls = 0
        self.fail_after = fail_after

    def __call__(self, keys):
        if self.calls == self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        images_I = torch.tensor([int(key, 16) for key in keys], dtype=torch.float32)
        features_INC = (images_I[:, None] * N + torch.arange(N))[..., None].repeat(1, 1, C)
        weakref.finalize(features_INC.untyped_storage(), self._dies)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return features_INC

    def _dies(self):
        self.alive -= 1


def held(made):
    """Which vectors are kept, of all patches of all images."""
    blocks = made.vectors(torch.device("cpu"), C)
    assert all(rows.dtype == torch.float32 and rows.shape[1] == C for rows in blocks.values())
    return [int(row[0]) for number in sorted(blocks) for row in blocks[number]]


@pytest.mark.parametrize("images", [100, 400])
def test_memory_does_not_grow_with_the_images(tmp_path, images):
    made, encoder = sample(tmp_path, images), Encoder()
    made.read(encoder)
    chosen = held(made)
    assert encoder.calls == images / 5
    assert encoder.most <= 2  # batches of features at a time
    assert len(chosen) == len(set(chosen)) == made.num_vectors == 60
    assert made.num_all == images * N
    quarters = torch.tensor(chosen).mul(4).div(images * N, rounding_mode="floor").bincount()
    assert quarters.tolist() == [15] * 4
    assert len({place % N for place in chosen}) == N
    files = list(tmp_path.glob("block-*"))
    assert sum(file.stat().st_size for file in files) < 60 * C * 4 + 300 * len(files)


def test_few_vectors_are_all_kept(tmp_path):
    made = sample(tmp_path, 13)
    made.read(Encoder())
    assert held(made) == list(range(13 * N))


@pytest.mark.parametrize(("images", "changes"), [(1, {}), (13, {"max_vectors": 5})])
def test_too_few_vectors_are_refused_before_anything_is_read(tmp_path, images, changes):
    with pytest.raises(ConfigError, match=r"need at least 8 vectors, and [45] of \d+ are kept"):
        sample(tmp_path, images, codebook_sizes=(8, 2), **changes)
    assert not list(tmp_path.iterdir())


def test_what_was_read_is_not_read_again_unless_it_was_damaged(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "a", 30).read(Encoder(fail_after=4))
    again, encoder = sample(tmp_path / "a", 30), Encoder()
    again.read(encoder)
    assert encoder.calls == 2
    whole = sample(tmp_path / "b", 30)
    whole.read(Encoder())
    assert held(again) == held(whole)
    file = tmp_path / "a" / "block-000003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"block-000003\.safetensors was damaged"):
        held(again)
    encoder = Encoder()
    again.read(encoder)
    assert encoder.calls == 1
    assert held(again) == held(whole)


def test_the_journal_keeps_levels(tmp_path):
    made = sample(tmp_path, 30)
    assert made.load(0) is None
    made.save(0, 2, torch.arange(16.0).view(8, 2))
    iterations, codebook = sample(tmp_path, 30).load(0)
    assert (iterations, codebook.shape) == (2, (8, 2))
    (tmp_path / "level-0.safetensors").write_bytes(b"x" * 200)
    assert made.load(0) is None


@pytest.mark.parametrize(
    ("images", "changes", "named"),
    [
        (31, {}, "images was"),
        (30, {"seed": 1}, "seed was 0 and is 1"),
        (30, {"max_vectors": 50}, "vectors kept was 60 and is 50"),
        (30, {"facts": {"data.image_fit": "square"}}, "data.image_fit was 'pad' and is 'square'"),
    ],
)
def test_another_fit_is_refused_and_the_difference_is_told(tmp_path, images, changes, named):
    sample(tmp_path, 30)
    sample(tmp_path, 30)
    with pytest.raises(ConfigError, match=f"beginnings of another fit: {named}"):
        sample(tmp_path, images, **changes)
