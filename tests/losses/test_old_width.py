"""The part of a new feature that is compared with old ones."""

import numpy as np
import pytest
import torch

from losses import to_old_width, with_width


def by_hand(rows, width):
    """[N, width] of rows [N, D], in plain Python and float64."""
    found = []
    for row in np.asarray(rows, np.float64):
        part = [row[place] if place < len(row) else 0.0 for place in range(width)]
        length = sum(value * value for value in part) ** 0.5
        found.append([value / length for value in part])
    return np.array(found)


@pytest.mark.parametrize("width", [3, 8, 16])
def test_first_coordinates_or_zeros_behind_then_unit_length(width):
    features = 5 * torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(to_old_width(features, width), by_hand(features, width), atol=1e-12)


def test_at_equal_width_it_is_normalisation_bit_for_bit():
    features = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_old_width(features, 32), torch.nn.functional.normalize(features, dim=1))
    assert with_width(features, 32) is features


@pytest.mark.parametrize("width", [3, 8, 16])
def test_gradient(width):
    features = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: to_old_width(rows, width), features)


def test_a_row_without_anything_to_compare_stays_zero():
    features = torch.tensor([[0.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    assert to_old_width(features, 2).tolist() == [[0, 0], [0, 1]]
