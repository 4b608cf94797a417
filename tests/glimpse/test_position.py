"""Codes of boxes."""

import pytest
import torch

from lightning_eff.glimpse.position import box_codes, cell_boxes, cells_of

FIRST = [0, 0, 1, 1, 0, 0, 1, 1, 0.8415, 0.0100, 0.5403, 0.9999, 0.8415, 0.0100, 0.5403, 0.9999]
SECOND = [0.8415, 0.0100, 0.5403, 0.9999, 0.9093, 0.0200, -0.4161, 0.9998]
SECOND += [0.1411, 0.0300, -0.9900, 0.9996, -0.7568, 0.0400, -0.6536, 0.9992]


# sin and cos of 0, 1, 2, 3, 4 and of their hundredths, to four digits
@pytest.mark.parametrize(("box", "code"), [((0, 0, 16, 16), FIRST), ((16, 32, 48, 64), SECOND)])
def test_codes_are_sines_and_cosines_of_y0_x0_y1_x1(box, code):
    torch.testing.assert_close(box_codes(torch.tensor([box]), 16, unit=16)[0], torch.tensor(code), atol=6e-5, rtol=0)


def test_unit_and_temperature_set_the_frequencies():
    code = box_codes(torch.tensor([[3.0, 0, 0, 0]]), 16, unit=2, temperature=100)[0]
    expected = torch.tensor([1.5, 0.15])
    torch.testing.assert_close(code[:4], torch.cat([expected.sin(), expected.cos()]))


def test_any_leading_axes_are_kept_and_no_box_is_no_code():
    assert box_codes(torch.zeros(2, 0, 4), 24, unit=16).shape == (2, 0, 24)
    assert box_codes(torch.zeros(2, 3, 4), 24, unit=16).shape == (2, 3, 24)


@pytest.mark.parametrize("dim", [4, 12, 63])
def test_widths_that_are_no_multiple_of_eight_are_refused(dim):
    with pytest.raises(ValueError, match=f"multiple of 8, got {dim}"):
        box_codes(torch.zeros(1, 4), dim, unit=16)


def test_cells_cover_scenes_whose_sides_are_no_multiples_of_theirs():
    assert cells_of((30, 44), 8) == (4, 6)
    boxes = cell_boxes((30, 44), 8)
    assert boxes.shape == (24, 4)
    assert boxes[7].tolist() == [8, 8, 16, 16]
    assert boxes[-1].tolist() == [24, 40, 32, 48]
