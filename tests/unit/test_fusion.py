"""Where image features go in, and where hidden states come out."""

import torch

from megatron_asvr.batch import NO_POSITION
from megatron_asvr.model.fusion import splice_images, take_positions

S, B, H = 5, 2, 3


def sequence():
    """x[s, b, 0] = 10 b + s."""
    s, b = torch.arange(S)[:, None, None], torch.arange(B)[None, :, None]
    return (10.0 * b + s).expand(S, B, H).clone().requires_grad_()


def test_features_land_on_their_positions():
    embeds_SBH, features_PH = sequence(), torch.full((3, H), -1.0, requires_grad=True)
    positions_P = torch.tensor([1, 2, 1 * S + 4])  # sample 0 at 1 and 2, sample 1 at 4
    spliced = splice_images(embeds_SBH, features_PH, positions_P)
    assert spliced[:, :, 0].T.tolist() == [[0, -1, -1, 3, 4], [10, 11, 12, 13, -1]]
    (spliced * 2).sum().backward()
    assert (features_PH.grad == 2).all()
    assert embeds_SBH.grad[:, :, 0].T.tolist() == [[2, 0, 0, 2, 2], [2, 2, 2, 2, 0]]


def test_no_images_keep_the_sequence_and_its_gradient_path():
    embeds_SBH, features_PH = sequence(), torch.zeros(0, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    spliced = splice_images(embeds_SBH, features_PH, none)
    assert torch.equal(spliced, embeds_SBH)
    spliced.sum().backward()
    assert features_PH.grad.shape == (0, H)


def test_hidden_states_are_taken_where_the_targets_are():
    hidden_SBH = sequence()
    positions_M = torch.tensor([9, 0, 9])
    taken_MH = take_positions(hidden_SBH, positions_M, may_be_cut=False)
    assert taken_MH[:, 0].tolist() == [14, 0, 14]
    taken_MH.sum().backward()
    assert hidden_SBH.grad[4, 1, 0] == 2


def test_a_position_that_was_cut_gives_a_zero_vector():
    hidden_SBH = sequence()
    positions_M = torch.tensor([NO_POSITION, 7])
    taken_MH = take_positions(hidden_SBH, positions_M, may_be_cut=True)
    assert taken_MH[:, 0].tolist() == [0, 12]
    taken_MH.sum().backward()
    assert hidden_SBH.grad.sum() == H  # none of it reached position 0


def test_one_sample_needs_no_reordering():
    hidden_SBH = sequence()[:, 1:]
    taken_MH = take_positions(hidden_SBH, torch.tensor([3, 1]), may_be_cut=False)
    assert taken_MH[:, 0].tolist() == [13, 11]
