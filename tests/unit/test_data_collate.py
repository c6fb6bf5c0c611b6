"""Micro-batches: padding, image positions, the shift of visual targets, the official dummy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_asvr.batch import IGNORE, NO_POSITION
from megatron_asvr.config.schema import Fp8Config, ParallelConfig, PrecisionConfig
from megatron_asvr.data.collate import WHOLE, Collator, Document, View
from megatron_asvr.data.pixels import ZERO_KEY
from megatron_asvr.data.records import parse_record
from megatron_asvr.data.sample import Row, SampleBuilder
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import ImageLayouts
from tests.unit.data_corpus import TEXTS, ask, config

N = 4
PLAIN = ImageLayouts(config().model).of((1, 1))
RECORDS = [
    {"id": "one", "image": "a", "conversations": ask("<image>What color?", "red")},
    {"id": "text", "conversations": ask("Is there a blue triangle?", "no")},
    {"id": "two", "image": ["b", "c"], "conversations": ask("<image> or <image>?", "a circle")},
    {
        "id": "many",
        "image": "d",
        "conversations": [ask("What color?", "red"), ask("Shape?", "a circle")],
    },
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("collate") / "tokenizer.model"
    return TextTokenizer.train(TEXTS, path, vocab_size=420)


def documents_of(samples):
    return [
        Document(row=row, sample_id=sample.id, keys=[image[-1] for image in sample.images])
        for sample in samples
        for row in sample.rows
    ]


def micro_batch(tokenizer, tmp_path, *, branches=True, view=WHOLE, codes=None, **changes):
    settings = config(**changes)
    builder = SampleBuilder(settings, tokenizer, branches=branches)
    samples = [
        builder.build(parse_record(raw, where=raw["id"], folder=tmp_path)) for raw in RECORDS
    ]
    collator = Collator.from_config(settings, tokenizer.pad_id, view=view, code_depth=2)
    asked = []

    def pixels(wanted):
        asked.extend(wanted)
        return torch.zeros(len(wanted), 3, 16, 16)

    rows = [[document] for document in documents_of(samples)]
    batch = collator.collate(rows, pixels=pixels, codes=codes)
    return batch, asked


def test_rows_are_padded_and_keep_their_samples(tokenizer, tmp_path):
    batch, asked = micro_batch(tokenizer, tmp_path)
    assert batch.sample_ids == ["one", "text", "two", "many"]
    assert asked == ["a", "b", "c", "d"]
    assert batch.num_images == 4
    assert batch.image_share == (0, 4)
    assert batch.pixel_values_ICHW.shape == (4, 3, 16, 16)
    padding = batch.document_BS == -1
    assert padding.any()
    assert (batch.tokens_BS[padding] == tokenizer.pad_id).all()
    assert (batch.text_targets_BS[padding] == IGNORE).all()
    assert batch.document_BS.amax(1).tolist() == [0, 1, 2, 3]
    assert batch.branch_BS[3].max() == 2
    dtypes = (batch.tokens_BS.dtype, batch.document_BS.dtype, batch.branch_BS.dtype)
    assert dtypes == (torch.int64, torch.int32, torch.int32)


def test_image_positions_hold_the_image_token(tokenizer, tmp_path):
    batch, _ = micro_batch(tokenizer, tmp_path)
    tokens = batch.tokens_BS.flatten()
    assert batch.image_positions_P.numel() == 4 * N == (tokens == tokenizer.image_id).sum()
    assert (tokens[batch.image_positions_P] == tokenizer.image_id).all()
    assert (batch.image_positions_P.view(4, N).diff(dim=1) == 1).all()
    assert torch.equal(batch.visual_positions_M, batch.image_positions_P)
    assert batch.visual_patches_M.tolist() == list(range(4 * N))


def test_shift_moves_every_visual_target_one_position_ahead(tokenizer, tmp_path):
    batch, _ = micro_batch(tokenizer, tmp_path, loss__target_shift=1)
    assert torch.equal(batch.visual_positions_M, batch.image_positions_P - 1)
    assert batch.visual_patches_M.tolist() == list(range(4 * N))


def test_shift_loses_the_first_patch_of_an_image_without_predecessor(tokenizer, tmp_path):
    settings = config(loss__target_shift=1)
    builder = SampleBuilder(settings, tokenizer, branches=True)
    sample = builder.build(parse_record(RECORDS[0], where="x", folder=tmp_path))
    (row,) = sample.rows
    start = row.image_starts[0]
    headless = type(row)(
        tokens_S=row.tokens_S[start:],
        targets_S=row.targets_S[start:],
        positions_S=row.positions_S[start:],
        branch_S=row.branch_S[start:],
        image_starts=(0,),
        layouts=(PLAIN,),
    )
    sample = type(sample)(id="x", images=sample.images, rows=(headless,))
    collator = Collator.from_config(settings, tokenizer.pad_id)
    rows = [documents_of([sample])]
    batch = collator.collate(rows, pixels=lambda keys: None, codes=None)
    assert batch.visual_positions_M.tolist() == [0, 1, 2]
    assert batch.visual_patches_M.tolist() == [1, 2, 3]
    assert collator.lost_first_patches(sample) == 1


def test_a_packed_document_has_no_predecessor_in_the_one_before(tokenizer, tmp_path):
    settings = config(loss__target_shift=1)
    text = np.array([1, 5, 6, 2])
    plain = {"positions_S": np.arange(4), "branch_S": np.zeros(4, np.int32)}
    words = Row(tokens_S=text, targets_S=text, image_starts=(), layouts=(), **plain)
    image = Row(tokens_S=text, targets_S=text, image_starts=(0,), layouts=(PLAIN,), **plain)
    documents = [
        Document(row=words, sample_id="words", keys=[]),
        Document(row=image, sample_id="image", keys=["a"]),
    ]
    batch = Collator.from_config(settings, tokenizer.pad_id).collate(
        [documents], pixels=lambda keys: None, codes=None
    )
    assert batch.image_positions_P.tolist() == [4, 5, 6, 7]
    assert batch.visual_positions_M.tolist() == [4, 5, 6]
    assert batch.visual_patches_M.tolist() == [1, 2, 3]
    assert batch.cu_seqlens.tolist() == batch.cu_seqlens_padded.tolist() == [0, 4, 8]


def test_context_parallel_ranks_by_hand(tokenizer):
    words = {"positions_S": np.arange(5), "branch_S": np.zeros(5, np.int32)}
    tokens = np.arange(11, 16)
    row = Row(tokens_S=tokens, targets_S=tokens + 100, image_starts=(1,), layouts=(PLAIN,), **words)
    # Padded to 8: rank 0 holds places 0, 1, 6, 7 and rank 1 holds 2, 3, 4, 5; patches at 1 to 4.
    expected = {
        0: ([11, 12, 0, 0], [1], [0], [0, 1], [0, 1]),
        1: ([13, 14, 15, 0], [0, 1, 2], [1, 2, 3], [0, 1], [2, 3]),
    }
    settings = config(parallel__cp=2, loss__target_shift=1)
    for rank, (own, positions, patches, sources, targets) in expected.items():
        collator = Collator.from_config(settings, 0, view=View(cp_rank=rank))
        document = Document(row=row, sample_id="x", keys=["a"])
        batch = collator.collate([[document], []], pixels=lambda keys: None, codes=None)
        assert batch.context == (rank, 2)
        assert batch.tokens_BS.tolist() == [own, [0] * 4]
        assert batch.index_BS.tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]] * 2
        assert batch.document_BS[0].tolist() == [0, 0, -1, -1, 0, 0, 0, -1]
        assert batch.image_positions_P.tolist() == positions
        assert batch.image_patches_P.tolist() == patches
        assert batch.visual_positions_M.tolist() == sources
        assert batch.visual_patches_M.tolist() == targets
        assert batch.cu_seqlens.tolist() == [0, 5, 5]
        assert batch.cu_seqlens_padded.tolist() == [0, 8, 16]


def test_targets_without_a_position_count_on_one_context_parallel_rank(tokenizer, tmp_path):
    changes = {"loss__mode": "official", "data__max_length": 6, "branches": False}
    whole, _ = micro_batch(tokenizer, tmp_path, **changes)
    parts = [
        micro_batch(tokenizer, tmp_path, view=View(cp_rank=rank), parallel__cp=2, **changes)[0]
        for rank in range(2)
    ]
    predicted = sorted(patch for part in parts for patch in part.visual_patches_M.tolist())
    assert predicted == whole.visual_patches_M.tolist()
    assert (parts[1].visual_positions_M != NO_POSITION).all()


def test_repeated_images_have_one_visual_loss(tokenizer, tmp_path):
    batch, asked = micro_batch(tokenizer, tmp_path, branches=False)
    assert asked == ["a", "b", "c", "d", "d"]
    assert batch.tokens_BS.shape[0] == 5
    assert batch.num_visual_targets == 4 * N
    assert batch.visual_patches_M.max() == 4 * N - 1
    assert batch.image_positions_P.numel() == 5 * N
    branched, _ = micro_batch(tokenizer, tmp_path)
    assert batch.num_text_targets == branched.num_text_targets


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_encoder_ranks_share_the_images_and_nothing_else_differs(tokenizer, tmp_path, world):
    views = [View(encoder_rank=rank, encoder_world=world) for rank in range(world)]
    parts = [micro_batch(tokenizer, tmp_path, view=view) for view in views]
    assert [key for _, asked in parts for key in asked] == ["a", "b", "c", "d"]
    for batch, asked in parts:
        first, stop = batch.image_share
        assert len(asked) == len(batch.pixel_values_ICHW) == stop - first
        assert torch.equal(batch.tokens_BS, parts[0][0].tokens_BS)
        assert torch.equal(batch.image_positions_P, parts[0][0].image_positions_P)


def test_codes_follow_the_images(tokenizer, tmp_path):
    table = {key: np.full((N, 2), n, dtype=np.uint16) for n, key in enumerate("abcd")}
    batch, _ = micro_batch(tokenizer, tmp_path, codes=table.__getitem__)
    assert batch.codes_PD.dtype == torch.int64
    assert batch.codes_PD[:, 0].tolist() == [0] * N + [1] * N + [2] * N + [3] * N


def test_length_is_a_multiple_under_sequence_parallelism(tokenizer, tmp_path):
    plain, _ = micro_batch(tokenizer, tmp_path)
    split, _ = micro_batch(tokenizer, tmp_path, parallel__tp=16, parallel__sp=True)
    assert split.tokens_BS.shape[1] % 16 == 0
    assert 0 <= split.tokens_BS.shape[1] - plain.tokens_BS.shape[1] < 16


def test_the_digest_is_of_contents_and_places():
    numbers = np.arange(6)
    row = Row(
        tokens_S=numbers,
        targets_S=numbers + 1,
        positions_S=numbers,
        branch_S=np.zeros(6, dtype=np.int32),
        image_starts=(1,),
        layouts=(PLAIN,),
    )
    document = Document(row=row, sample_id="a", keys=["k"], place=(3, 0))
    changed = [
        replace(document, keys=["l"]),
        replace(document, place=(4, 0)),
        replace(document, row=replace(row, targets_S=numbers)),
        replace(document, row=replace(row, tokens_S=numbers[::-1])),
        replace(document, row=replace(row, image_starts=(2,))),
    ]
    digests = {x.digest() for x in (document, *changed)}
    assert len(digests) == 6
    assert max(digests) < 2**48  # 32,768 of them add up within 63 bits
    assert replace(document, sample_id="b").digest() == document.digest()


def test_text_only_micro_batch_has_no_pixels(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.unit.test_data_collate.RECORDS", RECORDS[1:2])
    batch, _ = micro_batch(tokenizer, tmp_path, codes={}.__getitem__)
    assert batch.pixel_values_ICHW is None
    assert batch.num_images == batch.num_visual_targets == batch.image_positions_P.numel() == 0
    assert batch.codes_PD.shape == (0, 2)


def test_official_mode_adds_an_image_of_zeros_and_cuts_through_images(tokenizer, tmp_path):
    batch, asked = micro_batch(
        tokenizer, tmp_path, loss__mode="official", data__max_length=6, branches=False
    )
    assert asked == ["a", ZERO_KEY, "b", "c", "d", "d"]
    image_P = batch.image_patches_P // N
    assert 1 not in image_P
    assert (batch.visual_positions_M.view(-1, N)[1] == NO_POSITION).all()
    tokens = batch.tokens_BS.flatten()
    kept = batch.image_positions_P[image_P == 0]
    assert 0 < len(kept) < N
    assert (tokens[kept] == tokenizer.image_id).all()
    assert batch.num_visual_targets == 5 * N


@pytest.mark.parametrize("shift", [0, 1])
def test_newlines_are_positions_without_a_target(tokenizer, tmp_path, shift):
    resolution = {"mode": "anyres", "grids": [[1, 2]], "newline": True}
    settings = config(model__resolution=resolution, loss__target_shift=shift)
    builder = SampleBuilder(settings, tokenizer, branches=True)
    record = parse_record(RECORDS[2], where="x", folder=tmp_path)
    sample = builder.build(record, [(16, 32), (8, 80)])
    keys = [
        view for x, key in zip(sample.rows[0].layouts, "bc", strict=True) for view in x.keys(key)
    ]
    document = Document(row=sample.rows[0], sample_id="two", keys=keys)
    collator = Collator.from_config(settings, tokenizer.pad_id, code_depth=2)
    places = {key: number for number, key in enumerate(keys)}
    batch = collator.collate(
        [[document]],
        pixels=lambda asked: torch.tensor([places[key] for key in asked]),
        codes=lambda key: np.arange(2 * N).reshape(N, 2) + 10 * places[key],
    )
    assert batch.num_images == 6
    starts = torch.tensor(sample.rows[0].image_starts)
    assert batch.newline_positions.tolist() == [s + N + i for s in starts.tolist() for i in (4, 9)]
    assert (batch.tokens_BS.flatten()[batch.newline_positions] == tokenizer.image_id).all()
    rows = [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]  # the tiles' patches stand row by row
    assert batch.image_patches_P.tolist() == [12 * image + row for image in (0, 1) for row in rows]
    where = dict(
        zip(batch.visual_patches_M.tolist(), batch.visual_positions_M.tolist(), strict=True)
    )
    at = dict(zip(batch.image_patches_P.tolist(), batch.image_positions_P.tolist(), strict=True))
    behind = {at[patch] - 1: patch for patch in at}
    lost = (
        {behind.get(int(newline)) for newline in batch.newline_positions} - {None}
        if shift
        else set()
    )
    assert where == {patch: at[patch] - shift for patch in at if patch not in lost}
    assert len(lost) == collator.lost_first_patches(sample) == (2 if shift else 0)
    assert batch.codes_PD[7].tolist() == [16, 17]  # the last but one patch of the first tile


@pytest.mark.parametrize(("recipe", "rows"), [("current", 16), ("block", 128)])
def test_every_rank_has_as_many_positions_as_8_bits_need(recipe, rows):
    run = replace(config(), parallel=ParallelConfig(tp=2, sp=True, cp=3))
    plain = Collator.from_config(run, 0).row_multiple
    for emulate, wanted in ((False, np.lcm(plain, 2 * 3 * rows)), (True, plain)):
        precision = PrecisionConfig(fp8=Fp8Config(recipe=recipe, emulate=emulate))
        collator = Collator.from_config(replace(run, precision=precision), 0)
        assert collator.row_multiple == wanted
