"""Whatever the layout, all ranks together hold exactly what one rank alone holds.

A step is taken apart into facts that do not mention the layout: which token, target and position
belongs to which place of which document, which patch of which image is embedded there, and which
codes are predicted from there. The facts of one rank without packing are the reference.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_asvr.batch import IGNORE
from megatron_asvr.data.cache import CodeCache
from megatron_asvr.data.collate import View
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.text import TextTokenizer
from tests.unit.data_corpus import TEXTS, ask, config, turn

N = 4  # patches of an image
LONG = "Is there a blue triangle in the picture? " * 3
RECORDS = [
    {"id": "caption", "image": ["0"], "conversations": ask("<image>What color?", "red")},
    {"id": "text", "conversations": ask(LONG, "no")},
    {"id": "silent", "image": ["1"], "conversations": [turn("human", "<image>")]},
    {"id": "two", "image": ["2", "3"], "conversations": ask("<image> or <image>?", "a circle")},
    {
        "id": "many",
        "image": ["4", "0"],
        "conversations": [ask("What color?", "red"), ask(LONG, "a circle"), ask("Why?", "yes")],
    },
    {"id": "text2", "conversations": ask("What shape does the image contain?", "a rectangle")},
    {"id": "late", "image": ["5"], "conversations": ask(f"{LONG}<image>", "yes")},
    {"id": "one", "image": ["0"], "conversations": ask("<image>", "no")},
    {"id": "silent2", "image": ["5", "5"], "conversations": [turn("human", "<image><image>")]},
]


@dataclass(frozen=True)
class Layout:
    """Degrees of a layout, named as in the configuration."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    sp: bool = False
    vpp: int | None = None

    @property
    def settings(self):
        names = ("cp", "tp", "pp", "sp", "vpp")
        return {f"parallel__{name}": getattr(self, name) for name in names}


ALONE = Layout()
LAYOUTS = [
    Layout(dp=2),
    Layout(dp=4),
    Layout(cp=2),
    Layout(cp=4),
    Layout(tp=2),
    Layout(tp=2, sp=True, cp=2),
    Layout(pp=2, dp=2),
    Layout(pp=2, vpp=2, cp=2, dp=2),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    generator = np.random.default_rng(0)
    for number in range(6):
        pixels = generator.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / str(number), format="png")
    (folder / "train.json").write_text(json.dumps(RECORDS))
    TextTokenizer.train(TEXTS, folder / "tokenizer.model", vocab_size=420)
    with loader(folder, View(), codes=None) as made:
        keys = made.image_keys()
    table = [[[image, patch] for patch in range(N)] for image in range(len(keys))]
    cache(folder).write(keys, np.array(table))
    return folder


def cache(folder):
    return CodeCache(folder / "codes", {"name": "c"}, num_patches=N, codebook_sizes=(99, 99))


def loader(folder, view, *, codes, split="train", branches=True, **changes):
    sources = [{"path": str(folder / "train.json")}]
    settings = config(
        data__train=sources,
        data__eval=sources,
        data__cache_dir=str(folder / "cache"),
        data__prefetch_batches=0,
        **{"train__global_batch": len(RECORDS), "data__max_length": 96, **changes},
    )
    made = Loader(
        settings,
        TextTokenizer(str(folder / "tokenizer.model")),
        split=split,
        branches=branches,
        view=view,
        codes=codes,
        device=torch.device("cpu"),
    )
    made.prepare()
    return made


class Ranks:
    """The micro-batches of one step on every rank of a layout, by (dp, pp, cp, tp) rank."""

    def __init__(self, folder, layout=ALONE, *, step=0, online=False, **changes):
        self.layout = layout
        self.batches, self.reports = {}, {}
        codes = None if online else cache(folder)
        changes = {"data__codes": "online" if online else "cache", **layout.settings, **changes}
        degrees = (layout.dp, layout.pp, layout.cp, layout.tp)
        for place in itertools.product(*map(range, degrees)):
            dp, stage, cp, tp = place
            view = View(
                dp_rank=dp,
                dp=layout.dp,
                cp_rank=cp,
                encoder_rank=cp * layout.tp + tp,
                encoder_world=layout.cp * layout.tp,
                first_stage=stage == 0,
                text_loss=stage == layout.pp - 1,
                visual_loss=stage == layout.pp - 1,
            )
            with loader(folder, view, codes=codes, **changes) as made:
                self.batches[place] = made.step(step)
                self.reports[place] = made.report()
        (self.count,) = {len(batches) for batches in self.batches.values()}

    def micro_batches(self):
        """Every micro-batch as its views, by (pp, cp, tp) rank."""
        for dp, number in itertools.product(range(self.layout.dp), range(self.count)):
            yield {p[1:]: b[number] for p, b in self.batches.items() if p[0] == dp}

    def facts(self):
        """Everything that the ranks hold together, without a word about the layout."""
        found = Counter()
        for views in self.micro_batches():
            self._check_shared(views)
            images = self._images(views)
            for cp in range(self.layout.cp):
                same = [
                    rank_facts(views[0, cp, tp], views[self.layout.pp - 1, cp, tp], images)
                    for tp in range(self.layout.tp)
                ]
                assert all(facts == same[0] for facts in same)
                found.update(same[0])
        return found

    def _check_shared(self, views):
        first = views[0, 0, 0]
        names = ("position_ids_BS", "document_BS", "branch_BS", "index_BS")
        for batch in views.values():
            for name in (*names, "cu_seqlens", "cu_seqlens_padded"):
                assert torch.equal(getattr(batch, name), getattr(first, name))
        assert first.cu_seqlens.dtype == first.cu_seqlens_padded.dtype == torch.int32
        assert first.cu_seqlens_padded[-1] == first.document_BS.numel()
        assert first.cu_seqlens[-1] == (first.document_BS >= 0).sum()
        multiple = 2 * self.layout.cp if self.layout.cp > 1 else 1
        multiple *= self.layout.tp if self.layout.sp else 1
        if self.layout.cp > 1:
            assert not (first.cu_seqlens_padded % multiple).any()
        assert first.document_BS.shape[1] % multiple == 0

    def _images(self, views):
        """A name for what each image of a micro-batch shows, from the shares of all ranks."""
        shares = [b for (stage, _, _), b in views.items() if stage == 0]
        pixels = [b.pixel_values_ICHW for b in shares if b.num_images]
        assert all(b.pixel_values_ICHW is None for b in shares if not b.num_images)
        found = [sha256(x.numpy().tobytes()).hexdigest() for part in pixels for x in part]
        assert len(found) == shares[0].num_images
        return found


def rank_facts(first, last, images):
    """Facts of one rank's part, from the first and the last stage of it."""
    document, index = first.own(first.document_BS), first.own(first.index_BS)
    inside = document >= 0
    lengths = first.cu_seqlens.diff()
    begins, lengths = first.cu_seqlens_padded[:-1][lengths > 0], lengths[lengths > 0]
    row = torch.arange(len(index))[:, None]
    place = torch.full_like(index, -1)
    place[inside] = (row * first.index_BS.shape[1] + index)[inside] - begins[document[inside]]
    assert (place[inside] >= 0).all()
    assert (place[inside] < lengths[document[inside]]).all()
    assert (last.text_targets_BS[~inside] == IGNORE).all()
    where = [
        (first.sample_ids[d], p) if d >= 0 else None
        for d, p in zip(document.flatten().tolist(), place.flatten().tolist(), strict=True)
    ]
    columns = (
        first.tokens_BS,
        last.text_targets_BS,
        first.own(first.position_ids_BS),
        first.own(first.branch_BS),
    )
    values = zip(where, *(x.flatten().tolist() for x in columns), strict=True)
    facts = [("token", *value) for value in values if value[0] is not None]
    patches = zip(first.image_positions_P.tolist(), first.image_patches_P.tolist(), strict=True)
    facts += [("patch", where[flat], images[patch // N], patch % N) for flat, patch in patches]
    if last.codes_PD is not None:
        targets = last.codes_PD[last.visual_patches_M].tolist()
    else:
        targets = [[images[patch // N], patch % N] for patch in last.visual_patches_M.tolist()]
    sources = zip(last.visual_positions_M.tolist(), targets, strict=True)
    facts += [("visual", where[flat], *target) for flat, target in sources]
    assert ("token", None) not in {fact[:2] for fact in facts}
    assert all(fact[1] is not None for fact in facts)
    return facts


@pytest.fixture(scope="module")
def references(corpus):
    """Facts of one rank with one sample in every micro-batch, by the settings that change them."""
    found = {}
    for shift, branches, online in itertools.product((0, 1), (True, False), (True, False)):
        alone = Ranks(corpus, loss__target_shift=shift, branches=branches, online=online)
        assert alone.count == len(RECORDS)
        found[shift, branches, online] = alone.facts()
    return found


def test_the_reference_holds_what_the_records_say(references):
    for (shift, branches, online), facts in references.items():
        kinds = Counter(fact[0] for fact in facts.elements())
        shown = sum(len(record.get("image", ())) for record in RECORDS)
        assert kinds["visual"] == shown * N
        assert kinds["patch"] == (shown if branches else shown + 2 * 2) * N
        if online and branches:  # a patch is predicted from its place or from the one before
            predicted = {(i, p + shift, *which) for k, (i, p), *which in facts if k == "visual"}
            assert predicted == {(i, p, *which) for k, (i, p), *which in facts if k == "patch"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("shift", "branches", "online"), [(0, True, True), (1, False, False)])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_layout_holds_what_one_rank_holds(
    corpus, references, layout, packing, shift, branches, online, micro_batch
):
    ranks = Ranks(
        corpus,
        layout,
        online=online,
        branches=branches,
        loss__target_shift=shift,
        data__packing=packing,
        train__micro_batch=micro_batch,
    )
    assert ranks.facts() == references[shift, branches, online]
    if packing:
        lengths = [views[0, 0, 0].document_BS.shape[1] for views in ranks.micro_batches()]
        assert max(lengths) <= 96


def test_a_document_of_the_greatest_length_fits_with_its_padding(corpus):
    ranks = Ranks(corpus, Layout(cp=4), data__packing=True, data__max_length=61)
    assert ranks.facts() == Ranks(corpus, data__max_length=61).facts()
    assert max(v[0, 0, 0].document_BS.shape[1] for v in ranks.micro_batches()) == 64


def test_packing_fills_few_sequences_and_cuts_no_document(corpus):
    loose = Ranks(corpus, train__micro_batch=4)
    packed = Ranks(corpus, train__micro_batch=4, data__packing=True)
    assert (loose.count, packed.count) == (3, 1)
    (views,) = packed.micro_batches()
    batch = views[0, 0, 0]
    assert batch.document_BS.shape == (4, 96)
    assert sorted(batch.sample_ids) == sorted(record["id"] for record in RECORDS)
    for number in range(len(RECORDS)):
        rows = (batch.document_BS == number).any(1)
        assert rows.sum() == 1
    report, before = packed.reports[0, 0, 0, 0], loose.reports[0, 0, 0, 0]
    assert (report["sequences"], before["sequences"]) == (4, 9)
    assert report["fill"] == pytest.approx((batch.document_BS >= 0).float().mean().item())
    assert before["fill"] < 0.7 < 0.75 < report["fill"]


def test_the_plan_of_sequences_does_not_depend_on_the_ranks(corpus):
    def sequences(layout, **more):
        ranks = Ranks(corpus, layout, data__packing=True, **more)
        found = [b.sample_ids for views in ranks.micro_batches() for b in [views[0, 0, 0]]]
        return sorted(ids for ids in found if ids)

    alone = sequences(ALONE)
    assert len(alone) == 4
    assert sequences(Layout(dp=4)) == alone
    assert sequences(Layout(dp=2, pp=2, vpp=2)) == alone
    assert sequences(ALONE, run__seed=1) != alone  # another order of the samples


def test_stages_get_what_they_use(corpus):
    for online in (False, True):
        ranks = Ranks(corpus, Layout(pp=3), online=online)
        for views in ranks.micro_batches():
            first, middle, last = (views[stage, 0, 0] for stage in range(3))
            for batch in (middle, last):
                assert batch.tokens_BS is None
                assert batch.image_positions_P.numel() == batch.image_patches_P.numel() == 0
            for batch in (first, middle):
                assert batch.text_targets_BS is batch.codes_PD is None
                assert batch.num_text_targets == batch.num_visual_targets == 0
            assert middle.pixel_values_ICHW is None
            assert (last.pixel_values_ICHW is not None) == (online and last.num_images > 0)
            assert (last.codes_PD is None) == online
            assert len({b.document_BS.shape for b in views.values()}) == 1
            assert len({b.num_images for b in views.values()}) == 1


def test_without_a_visual_loss_the_last_stage_needs_no_pixels(corpus):
    ranks = Ranks(corpus, Layout(pp=2), online=True, loss__visual_weight=0.0)
    assert all(views[1, 0, 0].pixel_values_ICHW is None for views in ranks.micro_batches())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("branches", [False, True])
def test_pipelines_have_one_shape_and_a_multiple_of_the_stages(corpus, packing, branches):
    layout = Layout(pp=2, vpp=2, dp=2)
    changes = {"data__packing": packing, "data__pack_length": 128, "branches": branches}
    ranks = Ranks(corpus, layout, train__micro_batch=2, **changes)
    assert ranks.count % 2 == 0
    for dp in range(2):
        shapes = {b.document_BS.shape for b in ranks.batches[dp, 0, 0, 0]}
        assert len(shapes) == 1
    unlike = Ranks(corpus, ALONE, **changes)
    assert len({views[0, 0, 0].document_BS.shape for views in unlike.micro_batches()}) > 1


def test_empty_micro_batches_fill_up_and_hold_nothing(corpus):
    ranks = Ranks(corpus, Layout(dp=4, cp=2, tp=2, sp=True), step=1, train__global_batch=8)
    assert ranks.count == 2
    held_out = Ranks(
        corpus, Layout(dp=4, cp=2, tp=2, sp=True), step=1, split="eval", train__global_batch=8
    )
    assert held_out.count == 1  # one record is left for four ranks
    empty = [views for views in held_out.micro_batches() if not views[0, 0, 0].sample_ids]
    assert len(empty) == 3
    for views in empty:
        for batch in views.values():
            assert batch.document_BS.tolist() == [[-1] * 8]
            assert batch.tokens_BS.shape == (1, 4)
            assert (batch.text_targets_BS == IGNORE).all()
            assert batch.num_images == batch.num_visual_targets == batch.num_text_targets == 0
            assert batch.pixel_values_ICHW is None
            assert batch.codes_PD.shape == (0, 2)
            assert batch.cu_seqlens.tolist() == [0, 0]
            assert batch.cu_seqlens_padded.tolist() == [0, 8]
    assert held_out.reports[1, 0, 0, 0]["empty_micro_batches"] in (0, 1)
    total = sum(r["empty_micro_batches"] for p, r in held_out.reports.items() if p[2:] == (0, 0))
    assert total == 3


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_meets_every_record_once_on_any_number_of_ranks(corpus, packing):
    for dp in (1, 3):
        met = Counter()
        for step in range(3):
            changes = {"split": "eval", "data__packing": packing, "data__max_length": 40}
            ranks = Ranks(
                corpus,
                Layout(dp=dp),
                step=step,
                train__global_batch=4,
                **changes,
                data__on_overlong="drop",
            )
            assert ranks.count >= 1
            met.update(i for v in ranks.micro_batches() for i in v[0, 0, 0].sample_ids)
        short = [r["id"] for r in RECORDS if LONG not in str(r)]
        assert met == Counter(short)
