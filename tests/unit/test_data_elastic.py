"""Global batches do not depend on ranks, interruptions or an index: contents compared by hash."""

import random
from collections import Counter
from hashlib import sha256

import pytest
import torch

from megatron_asvr.batch import NO_POSITION
from megatron_asvr.data.collate import View
from megatron_asvr.data.index import build
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.text import TextTokenizer
from tests.unit.test_data_index import corpus, settings

CPU = torch.device("cpu")
STEPS = 14
WORLDS = (1, 2, 4, 8)


def documents(batches):
    """A hash of each document's tokens, targets, positions and pixels, and how often it occurs."""
    found = Counter()
    for batch in batches:
        for number, name in enumerate(batch.sample_ids):
            inside = batch.document_BS == number
            text = [
                x[inside].tolist()
                for x in (batch.tokens_BS, batch.text_targets_BS, batch.position_ids_BS)
            ]
            shown = batch.image_positions_P
            own = inside.flatten()[shown] & (shown != NO_POSITION)
            images = (batch.image_patches_P[own] // 4).unique()
            pixels = [batch.pixel_values_ICHW[i].numpy().tobytes() for i in images]
            found[name, sha256(repr((text, pixels)).encode()).hexdigest()] += 1
    return found


class World:
    """The loaders of some data-parallel ranks, as a start of a run makes them."""

    def __init__(self, cfg, text, dp):
        self.loaders = []
        for rank in range(dp):
            view = View(dp_rank=rank, dp=dp)
            self.loaders.append(Loader(cfg, text, split="train", view=view, device=CPU))
            self.loaders[-1].prepare()

    def step(self, step):
        """Documents and digest of a global batch."""
        parts = [made.step(step) for made in self.loaders]
        assert len({len(part) for part in parts}) == 1
        batches = [batch for part in parts for batch in part]
        return documents(batches), sum(batch.digest for batch in batches)

    def close(self):
        for made in self.loaders:
            made.close()


@pytest.mark.parametrize("packing", [False, True])
def test_interrupted_anywhere_and_continued_on_other_ranks(tmp_path, packing):
    sources = corpus(tmp_path)
    text = TextTokenizer(tmp_path / "tokenizer.model")
    cfg = settings(tmp_path, sources, train__global_batch=8, data__packing=packing)
    alone = World(cfg, text, 1)
    wanted = [alone.step(step) for step in range(STEPS)]
    alone.close()
    assert len({digest for _, digest in wanted}) == STEPS
    assert all(0 < sum(found.values()) <= 8 for found, _ in wanted)  # bad ones hold nothing

    generator, used = random.Random(int(packing)), set()
    for indexed in (False, True):
        if indexed:  # made between two starts
            build(cfg, cfg.data.train, text, device=CPU)
        step = 0
        while step < STEPS:
            dp = generator.choice([w for w in WORLDS if w not in used] or WORLDS)
            used.add(dp)
            stop = min(STEPS, step + generator.randint(1, 4))
            world = World(cfg, text, dp)
            for each in range(step, stop):
                assert world.step(each) == wanted[each], (indexed, dp, each)
            world.close()
            step = stop
    assert used == set(WORLDS)
