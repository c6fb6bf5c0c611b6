"""Residual quantisation and the tokenizer's folder."""

import contextlib
import dataclasses
import json

import pytest
import torch

from megatron_asvr.config.schema import VisionConfig
from megatron_asvr.errors import CheckpointError, ConfigError
from megatron_asvr.model import quantize
from megatron_asvr.model.kmeans import fit_codebooks
from megatron_asvr.model.quantize import (
    nearest_codes,
    perplexity,
    quantisation_report,
    residual_codes,
)
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer

VISION = VisionConfig(
    hidden_size=32, num_layers=3, num_heads=4, ffn_hidden_size=48, image_size=32, patch_size=8
)
SEMANTIC = TokenizerConfig(
    kind="semantic", vision=VISION, feature_layer=-2, codebook_sizes=(16, 8, 5)
)
PIXELS = TokenizerConfig(
    kind="appearance", vision=VISION, feature_layer=None, codebook_sizes=(8, 8)
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(batches, sizes, **settings):
    """Codebooks of some batches of vectors, which stay as they are."""
    return fit_codebooks({n: x.clone() for n, x in enumerate(batches)}, sizes, **settings)


def fitted(config, images=24):
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(config)
    tokenizer.fit([tokenizer.features(random(images, 3, 32, 32))], seed=1, iters=4)
    return tokenizer


def test_search_is_brute_force_and_does_not_depend_on_chunks(monkeypatch):
    vectors_RC, codebook_KC = random(101, 7), random(13, 7, seed=1)
    wanted = torch.cdist(vectors_RC.double(), codebook_KC.double()).argmin(1)
    assert torch.equal(nearest_codes(vectors_RC, codebook_KC), wanted)
    monkeypatch.setattr(quantize, "MAX_SCORES", 40)
    assert torch.equal(nearest_codes(vectors_RC, codebook_KC), wanted)


def test_a_level_quantises_what_the_levels_before_left():
    vectors_RC, books = random(50, 4), [random(6, 4, seed=1), random(3, 4, seed=2)]
    codes_RD = residual_codes(vectors_RC, books)
    first = nearest_codes(vectors_RC, books[0])
    second = nearest_codes(vectors_RC - books[0][first], books[1])
    assert torch.equal(codes_RD, torch.stack([first, second], 1))


@pytest.mark.parametrize("seed", range(3))
def test_fit_finds_separated_clusters_and_reports_them(seed):
    centres_KC = 100 * random(8, 5)
    labels_R = torch.arange(400) % 8
    vectors_RC = centres_KC[labels_R] + random(400, 5, seed=3)
    books = fit(vectors_RC.split(64), [24], seed=seed, iters=10)
    (level,) = quantisation_report([vectors_RC], books)
    assert level.mse < 1  # of a variance of 1e4: no cluster shares its codeword
    assert level.usage == 1.0
    assert 8 < level.perplexity < 24
    assert level.cosine > 0.999


def test_duplicated_background_does_not_keep_codewords_dead():
    background = torch.ones(990, 4)
    vectors_RC = torch.cat([background, 10 * random(10, 4)])
    books = fit([vectors_RC], [11], seed=0, iters=30)
    (level,) = quantisation_report([vectors_RC], books)
    assert level.usage == 1.0
    assert level.mse < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_a_noisy_background_does_not_crowd_the_first_codewords(seed):
    background = 1 + 0.05 * random(1900, 8, seed=seed)
    rare = 10 * random(10, 8, seed=seed + 10)[torch.arange(100) % 10]
    vectors_RC = torch.cat([background, rare])
    books = fit([vectors_RC], [16], seed=seed)
    (level,) = quantisation_report([vectors_RC], books)
    assert level.mse < 0.1  # drawn uniformly, the first codewords leave 1 to 4


def test_every_level_lowers_the_error_and_the_fit_repeats():
    vectors_RC = random(2000, 6)
    books = fit([vectors_RC], [16, 16, 16], seed=5)
    report = quantisation_report(vectors_RC.split(500), books)
    assert report[0].mse > report[1].mse > report[2].mse
    assert report[0].cosine < report[1].cosine < report[2].cosine
    again = fit([vectors_RC], [16, 16, 16], seed=5)
    assert all(torch.equal(a, b) for a, b in zip(books, again, strict=True))


def test_codebooks_do_not_depend_on_who_has_which_block_and_in_which_order():
    blocks = dict(enumerate(random(1500, 6).split(128)))
    one = fit(blocks.values(), [16, 16], seed=5, iters=4)
    copies = {n: blocks[n].clone() for n in reversed(blocks)}
    other = fit_codebooks(copies, [16, 16], seed=5, iters=4)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    renamed = fit_codebooks({n + 7: x.clone() for n, x in blocks.items()}, [16], seed=5, iters=4)
    assert not torch.equal(renamed[0], one[0])


class Kept(dict):
    """A journal that is interrupted after so many entries."""

    def __init__(self, entries=10**6):
        super().__init__()
        self.left = entries

    def load(self, level):
        return self.get(level)

    def save(self, level, iterations, codebook_KC):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self[level] = (iterations, codebook_KC.clone())


@pytest.mark.parametrize("entries", [1, 3, 5, 8])
def test_an_interrupted_fit_ends_like_an_undisturbed_one(entries):
    blocks = random(600, 5).split(100)
    wanted = fit(blocks, [8, 8], seed=2, iters=3)
    journal = Kept(entries)
    with contextlib.suppress(KeyboardInterrupt):
        fit(blocks, [8, 8], seed=2, iters=3, journal=journal)
    assert sum(done + 1 for done, _ in journal.values()) == entries
    journal.left = 10**6
    again = fit(blocks, [8, 8], seed=2, iters=3, journal=journal)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
    assert journal.left == 10**6 - (8 - entries)  # nothing was computed twice


def test_means_are_those_of_fp64():
    vectors_RC = random(5000, 3) * torch.tensor([1e-20, 1.0, 1e4])
    (book_KC,) = fit([vectors_RC], [1], seed=0, iters=1)
    wanted = vectors_RC.double().mean(0)
    assert float((book_KC[0, 1:] / wanted[1:] - 1).abs().max()) < 1e-6
    assert abs(float(book_KC[0, 0] - wanted[0])) < 1e-9  # of values up to 1e4


def test_vectors_that_cannot_be_fitted_are_an_error():
    with pytest.raises(ConfigError, match="only 50 vectors"):
        fit([random(50, 2)], [51], seed=0)
    with pytest.raises(ConfigError, match="not finite"):
        fit([random(50, 2) / 0], [4], seed=0)


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1.0)
    assert perplexity(torch.zeros(3, dtype=torch.int64)) == 0.0


def test_pixel_patches_are_cut_like_the_encoder_does():
    tokenizer = VisualTokenizer(dataclasses.replace(PIXELS, vision=VISION))
    pixels_ICHW = random(2, 3, 32, 32)
    features_INC = tokenizer.features(pixels_ICHW)
    assert features_INC.shape == (2, 16, 3 * 8 * 8)
    patch = pixels_ICHW[1, :, 8:16, 24:32].reshape(-1)  # row 1, column 3 of a grid of 4
    assert torch.equal(features_INC[1, 1 * 4 + 3], patch)


def test_search_stays_fp32_in_a_bf16_tokenizer():
    tokenizer = fitted(SEMANTIC)
    tables = [table.clone() for table in tokenizer.codebooks.tables()]
    tokenizer.to(torch.bfloat16)
    assert tokenizer.encoder.dtype == torch.bfloat16
    for table, before in zip(tokenizer.codebooks.tables(), tables, strict=True):
        assert torch.equal(table, before)
    pixels_ICHW = random(3, 3, 32, 32)
    features_RC = tokenizer.encoder(pixels_ICHW).float().flatten(0, 1)
    wanted = residual_codes(features_RC, tables)
    assert torch.equal(tokenizer.encode(pixels_ICHW).flatten(0, 1), wanted)


@pytest.mark.parametrize("config", [SEMANTIC, PIXELS], ids=["semantic", "pixels"])
def test_a_saved_tokenizer_gives_the_same_codes(config, tmp_path):
    tokenizer = fitted(config)
    tokenizer.save(tmp_path / "tok")
    loaded = VisualTokenizer.load(tmp_path / "tok")
    pixels_ICHW = random(5, 3, 32, 32, seed=9)
    codes_IND = loaded.encode(pixels_ICHW)
    assert codes_IND.shape == (5, 16, len(config.codebook_sizes))
    assert codes_IND.dtype == torch.int64
    assert torch.equal(codes_IND, tokenizer.encode(pixels_ICHW))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.config == config
    assert not any(x.requires_grad for x in loaded.parameters())
    assert loaded.encode(torch.empty(0, 3, 32, 32)).shape == (0, 16, loaded.depth)


def test_a_bf16_encoder_is_loaded_as_saved(tmp_path):
    tokenizer = fitted(SEMANTIC).to(torch.bfloat16)
    tokenizer.save(tmp_path)
    loaded = VisualTokenizer.load(tmp_path)
    assert loaded.encoder.dtype == torch.bfloat16
    assert loaded.fingerprint == VisualTokenizer.load(tmp_path).fingerprint


def test_the_fingerprint_follows_the_weights():
    tokenizer = fitted(PIXELS)
    before = tokenizer.fingerprint
    tokenizer.set_codebooks([table + 1 for table in tokenizer.codebooks.tables()])
    assert tokenizer.fingerprint != before


def damage_weights(path):
    file = path / "tokenizer.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def change_config(path):
    file = path / "config.json"
    document = json.loads(file.read_text())
    document["feature_layer"] = -3
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_weights, "fingerprint is"),
        (change_config, "fingerprint is"),
        (lambda path: (path / "tokenizer.safetensors").unlink(), "not a complete"),
        (lambda path: (path / "tokenizer.safetensors").write_bytes(b"no"), "not a complete"),
        (lambda path: (path / "config.json").unlink(), "asvr tokenizer fit"),
        (lambda path: (path / "config.json").write_text("{}"), "asvr tokenizer fit"),
    ],
)
def test_a_damaged_folder_is_refused(harm, message, tmp_path):
    fitted(SEMANTIC).save(tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        VisualTokenizer.load(tmp_path)


def test_a_tokenizer_of_another_grid_is_refused():
    tokenizer = VisualTokenizer(SEMANTIC)
    tokenizer.check_fits(VISION)
    with pytest.raises(ConfigError, match=r"4 x 4 patches.*model.vision has a grid of 8 x 8"):
        tokenizer.check_fits(dataclasses.replace(VISION, patch_size=4))
    with pytest.raises(ConfigError, match=r"image_size=32.*image_size=33"):
        tokenizer.check_fits(dataclasses.replace(VISION, image_size=33))


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="needs the feature_layer"):
        dataclasses.replace(SEMANTIC, feature_layer=None)
    with pytest.raises(ConfigError, match=r"codebook_sizes=\[8, 1\]"):
        dataclasses.replace(SEMANTIC, codebook_sizes=(8, 1))
    with pytest.raises(
        ConfigError, match="2 levels with 4194306 codewords together; at most 4194304"
    ):
        dataclasses.replace(SEMANTIC, codebook_sizes=(2**22, 2))


@pytest.mark.parametrize("layer", [-5, 4])
def test_a_layer_that_the_encoder_does_not_have_is_refused(layer):
    with pytest.raises(ConfigError, match=f"feature_layer={layer} does not exist.*-4 to 3"):
        TokenizerConfig(kind="semantic", vision=VISION, feature_layer=layer, codebook_sizes=(8, 8))


def test_appearance_is_refused_on_a_late_layer():
    with pytest.raises(ConfigError, match="feature_layer=-2 comes after 2 of 3 layers; use pixels"):
        dataclasses.replace(PIXELS, feature_layer=-2)
    assert dataclasses.replace(PIXELS, feature_layer=1).width == VISION.hidden_size
