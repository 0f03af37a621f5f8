"""Augmentation is a pure function of (seed, sample, view)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from limbeck.data.augment import Augment, uniforms
from limbeck.data.colour import pca_colours

EVERYTHING = Augment(crop=3, flip=True, zoom=0.5, rand_ops=2, erase=0.5)
EACH = [
    Augment(crop=4),
    Augment(flip=True),
    Augment(zoom=0.4),
    Augment(rand_ops=1),
    Augment(erase=0.7),
    EVERYTHING,
]
MIXING = [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)]


def noise(number: int, channels: int = 3, height: int = 12, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (number, channels, height, width)
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)


def places(cut: Tensor, whole: Tensor, crop: int) -> list[tuple[int, int, bool]]:
    """Every (top, left, mirrored) whose cut out of the padded image, made by PIL, is ``cut``."""
    _, height, width = whole.shape
    wide = Image.new("RGB", (width + 2 * crop, height + 2 * crop))
    wide.paste(Image.fromarray(whole.permute(1, 2, 0).numpy()), (crop, crop))
    found = []
    for top in range(2 * crop + 1):
        for left in range(2 * crop + 1):
            plain = np.array(wide.crop((left, top, left + width, top + height)))
            for mirrored in (False, True):
                candidate = plain[:, ::-1] if mirrored else plain
                if np.array_equal(candidate, cut.permute(1, 2, 0).numpy()):
                    found.append((top, left, mirrored))
    return found


@pytest.mark.parametrize("augment", EACH, ids=str)
def test_a_sample_looks_the_same_alone_in_company_and_in_any_order(augment: Augment) -> None:
    pixels, rows = noise(40), torch.arange(40) * 977 + 3
    together = augment(pixels, rows, seed=7, view=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(pixels[order], rows[order], seed=7, view=2), together[order])
    for i in range(40):
        alone = augment(pixels[i : i + 1], rows[i : i + 1], seed=7, view=2)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("augment", EACH, ids=str)
def test_view_seed_and_sample_each_change_the_pixels(augment: Augment) -> None:
    pixels, rows = noise(1).expand(64, -1, -1, -1), torch.arange(64)
    first = augment(pixels, rows, seed=0, view=0)
    assert torch.equal(first, augment(pixels, rows, seed=0, view=0))
    assert not torch.equal(first, augment(pixels, rows, seed=1, view=0))
    assert not torch.equal(first, augment(pixels, rows, seed=0, view=1))
    assert not torch.equal(first, augment(pixels, rows + 64, seed=0, view=0))


@pytest.mark.parametrize("augment", EACH, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 3, 7, 10), (1, 3, 1, 1)], ids=str)
def test_shape_and_type_stay_and_the_input_is_left_alone(
    augment: Augment, shape: tuple[int, ...]
) -> None:
    pixels = noise(*shape)
    before = pixels.clone()
    after = augment(pixels, torch.arange(shape[0]), seed=0, view=0)
    assert after.shape == pixels.shape
    assert after.dtype == torch.uint8
    assert torch.equal(pixels, before)


def test_nothing_asked_changes_nothing() -> None:
    pixels = noise(9)
    for nothing in (Augment(), Augment(crop=0, flip=False, zoom=1.0, erase=0.0)):
        assert torch.equal(nothing(pixels, torch.arange(9), seed=3, view=4), pixels)


def test_a_crop_is_the_cut_that_pil_makes_of_the_image_padded_with_black() -> None:
    pixels = noise(60, height=9, width=11)
    cuts = Augment(crop=3)(pixels, torch.arange(60), seed=0, view=0)
    for cut, whole in zip(cuts, pixels, strict=True):
        found = places(cut, whole, 3)
        assert len(found) == 1
        assert not found[0][2]


def test_a_flip_mirrors_what_was_cut() -> None:
    pixels = noise(60)
    cuts = Augment(crop=2, flip=True)(pixels, torch.arange(60), seed=0, view=0)
    found = [places(cut, whole, 2) for cut, whole in zip(cuts, pixels, strict=True)]
    assert all(len(f) == 1 for f in found)
    assert {mirrored for ((_, _, mirrored),) in found} == {False, True}


def test_all_crop_positions_occur_about_equally_often() -> None:
    crop, number = 2, 20_000
    mark = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    mark[0, 0, 4, 4] = 255
    cuts = Augment(crop=crop)(mark.expand(number, -1, -1, -1), torch.arange(number), 1, 0)
    counts = cuts.long().sum((0, 1))[2:7, 2:7] // 255
    assert counts.sum() == number
    expected = number / 25
    # 99.99 % of a chi squared variable with 24 degrees of freedom lie below 58.6.
    assert float(((counts - expected) ** 2 / expected).sum()) < 58.6


def test_half_the_images_are_flipped() -> None:
    number = 20_000
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(number, 1, 1, 2)
    flipped = Augment(flip=True)(pixels, torch.arange(number), seed=2, view=9)[:, 0, 0, 0] == 255
    assert abs(float(flipped.double().mean()) - 0.5) < 4 * 0.5 / number**0.5


def test_a_zoom_shows_a_part_of_a_ramp_at_its_own_slope() -> None:
    width = 64
    ramp = (torch.arange(width) * 4).to(torch.uint8).expand(200, 1, width, width)
    zoomed = Augment(zoom=0.5)(ramp, torch.arange(200), seed=0, view=0).double()
    # Away from the border, where the ramp is reflected, the slope is the side of what was cut.
    slopes = (zoomed[:, 0, 32, 60] - zoomed[:, 0, 32, 3]) / 57 / 4
    assert float(slopes.min()) > 0.5 - 0.01
    assert float(slopes.max()) < 1.0 + 0.01
    assert float(slopes.min()) < 0.53
    assert float(slopes.max()) > 0.97
    assert float((zoomed[:, 0, 1:] - zoomed[:, 0, :1]).abs().max()) == 0


def test_a_zoom_of_one_colour_is_that_colour() -> None:
    flat = torch.full((30, 3, 8, 8), 201, dtype=torch.uint8)
    assert torch.equal(Augment(zoom=0.2)(flat, torch.arange(30), seed=0, view=0), flat)


def test_an_erased_box_is_one_grey_rectangle_of_2_to_20_percent() -> None:
    side = 100
    pixels = torch.zeros(300, 1, side, side, dtype=torch.uint8)
    erased = Augment(erase=1.0)(pixels, torch.arange(300), seed=0, view=0)[:, 0]
    assert set(erased.unique().tolist()) == {0, 127}
    areas = []
    for image in erased:
        ys, xs = (image == 127).nonzero(as_tuple=True)
        height, width = int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1
        assert len(ys) == height * width
        assert abs(height - width) <= 1
        areas.append(len(ys) / side**2)
    # A pixel more or less on each side.
    assert min(areas) > (0.02**0.5 - 1 / side) ** 2
    assert max(areas) < (0.20**0.5 + 1 / side) ** 2
    assert min(areas) < 0.03
    assert max(areas) > 0.19


def test_boxes_reach_every_part_of_the_image() -> None:
    pixels = torch.zeros(2000, 1, 16, 16, dtype=torch.uint8)
    erased = Augment(erase=1.0)(pixels, torch.arange(2000), seed=0, view=0)
    assert bool((erased == 127).any(0).all())


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erasing_has_the_probability_that_was_asked_for(probability: float) -> None:
    pixels = torch.zeros(4000, 1, 16, 16, dtype=torch.uint8)
    erased = Augment(erase=probability)(pixels, torch.arange(4000), seed=0, view=0)
    share = float(erased.flatten(1).any(1).double().mean())
    assert abs(share - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_whether_a_box_is_erased_does_not_depend_on_where_the_zoom_looks() -> None:
    # A horizontal ramp without 127: its mean tells where the zoom looked, 127 whether it erased.
    ramp = (torch.arange(32) * 3).to(torch.uint8).expand(3000, 1, 32, 32)
    rows = torch.arange(3000)
    looked = Augment(zoom=0.3)(ramp, rows, seed=0, view=0).double().mean((1, 2, 3))
    both = Augment(zoom=0.3, erase=0.5)(ramp, rows, seed=0, view=0)
    erased = (both == 127).flatten(1).any(1).double()
    assert abs(float(torch.corrcoef(torch.stack([looked, erased]))[0, 1])) < 4 / 3000**0.5


def coloured(number: int = 500) -> Tensor:
    """Images whose colours lie mostly, and not evenly, along one direction."""
    generator = torch.Generator().manual_seed(8)
    mixing = torch.tensor([[40.0, 35.0, 30.0], [10.0, -2.0, -9.0], [3.0, -6.0, 4.0]])
    colours = 128 + torch.randn(number, 16, 3, generator=generator) @ mixing
    return colours.round().clamp(0, 255).byte().transpose(1, 2).reshape(number, 3, 4, 4)


@pytest.mark.parametrize("scale", ["eigenvalue", "sqrt"])
def test_a_tint_adds_the_same_whole_levels_to_every_pixel_of_an_image(scale: str) -> None:
    colours, rows = pca_colours(coloured()), torch.arange(200)
    augment = Augment.model_validate({"colour": 2.0, "colour_scale": scale})
    grey = torch.full((200, 3, 5, 6), 127, dtype=torch.uint8)
    levels = (augment.tints(rows, 3, 1, colours) * 255).round()
    inside = (levels.abs() < 127).all(1)
    assert int(inside.sum()) > 100
    added = augment(grey, rows, 3, 1, colours)[inside].double() - 127
    assert torch.equal(added, levels[inside][:, :, None, None].expand(added.shape))
    assert float(added.abs().max()) > 1


def test_a_tint_stops_at_black_and_white() -> None:
    colours, rows = pca_colours(coloured()), torch.arange(300)
    augment = Augment(colour=30.0, colour_scale="sqrt")
    pixels = coloured(300)
    levels = (augment.tints(rows, 0, 0, colours) * 255).round()
    expected = (pixels.double() + levels[:, :, None, None]).clamp(0, 255)
    assert float(levels.abs().max()) > 255
    assert torch.equal(augment(pixels, rows, 0, 0, colours).double(), expected)


def test_without_a_deviation_there_is_no_tint_and_no_need_of_colours() -> None:
    pixels, rows = coloured(20), torch.arange(20)
    assert torch.equal(Augment(colour=0.0)(pixels, rows, 0, 0), pixels)
    flipped = Augment(flip=True)(pixels, rows, 0, 0)
    colours = pca_colours(pixels)
    assert torch.equal(Augment(flip=True, colour=0.0)(pixels, rows, 0, 0, colours), flipped)
    # So little that no pixel reaches the next level.
    assert torch.equal(Augment(colour=1e-9)(pixels, rows, 0, 0, colours), pixels)
    with pytest.raises(ValueError, match="needs the colours"):
        Augment(colour=0.1)(pixels, rows, 0, 0)


@pytest.mark.parametrize(("scale", "power"), [("eigenvalue", 2), ("sqrt", 1)])
def test_tints_have_the_covariance_of_the_paper(scale: str, power: int) -> None:
    values, vectors = pca_colours(coloured())
    augment = Augment.model_validate({"colour": 0.1, "colour_scale": scale})
    number = 200_000
    tints = augment.tints(torch.arange(number), 5, 2, (values, vectors))
    expected = 0.01 * values**power
    # Along the components tints are independent and normal.
    along = tints @ vectors
    found = along.T @ along / number
    error = 5 * torch.outer(expected, expected).sqrt() * (2 / number) ** 0.5
    assert bool(((found - expected.diag()).abs() < error).all())
    whole = vectors @ expected.diag() @ vectors.T
    assert torch.allclose(tints.T @ tints / number, whole, atol=float(5 * error.max()))
    assert bool((along.mean(0).abs() < 5 * (expected / number).sqrt()).all())
    scaled = along / expected.sqrt()
    assert bool(((scaled.abs() < 1).double().mean(0) - 0.6827).abs().max() < 0.006)
    assert float(scaled.abs().max()) < 6.5


def test_pixels_that_are_tinted_have_the_covariance_of_the_paper_up_to_rounding() -> None:
    values, vectors = pca_colours(coloured())
    augment, number = Augment(colour=1.5), 50_000
    grey = torch.full((1, 3, 1, 1), 127, dtype=torch.uint8).expand(number, -1, -1, -1)
    tinted = augment(grey, torch.arange(number), 0, 0, (values, vectors)).double().flatten(1)
    found = torch.cov(tinted.T, correction=0)
    expected = 255**2 * 1.5**2 * vectors @ (values**2).diag() @ vectors.T
    # Rounding to whole levels adds a variance of 1/12 a channel (Sheppard).
    expected = expected + torch.eye(3) / 12
    assert float((found - expected).abs().max() / expected.max()) < 0.03


def test_grey_images_are_tinted_along_their_single_component() -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(60, 180, (400, 1, 4, 4), generator=generator, dtype=torch.uint8)
    colours = pca_colours(pixels)
    tints = Augment(colour=0.5, colour_scale="sqrt").tints(torch.arange(20_000), 0, 0, colours)
    assert tints.shape == (20_000, 1)
    deviation = float((pixels.double() / 255).std(correction=0))
    assert float(tints.std()) == pytest.approx(0.5 * deviation, rel=0.03)
    tinted = Augment(colour=0.5)(pixels, torch.arange(400), 0, 0, colours)
    assert tinted.shape == pixels.shape


def test_what_a_crop_pads_stays_black_under_a_tint() -> None:
    colours, rows = pca_colours(coloured()), torch.arange(50)
    pixels = torch.full((50, 3, 6, 6), 127, dtype=torch.uint8)
    augment = Augment(crop=3, colour=0.3, colour_scale="sqrt")
    tinted = augment(pixels, rows, 0, 0, colours)
    cut = Augment(crop=3)(pixels, rows, 0, 0)
    assert torch.equal(tinted == 0, cut == 0)
    assert int((cut == 0).sum()) > 0


def test_a_tint_of_a_sample_is_the_same_alone_in_company_and_in_any_order() -> None:
    colours, pixels, rows = pca_colours(coloured()), coloured(40), torch.arange(40) * 977 + 3
    augment = Augment(colour=1.0, colour_scale="sqrt", crop=1, flip=True)
    together = augment(pixels, rows, 7, 2, colours)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(pixels[order], rows[order], 7, 2, colours), together[order])
    tints = augment.tints(rows, 7, 2, colours)
    for i in range(40):
        one = slice(i, i + 1)
        assert torch.equal(augment(pixels[one], rows[one], 7, 2, colours), together[one])
        assert torch.equal(augment.tints(rows[one], 7, 2, colours), tints[one])
    for other in ((8, 2), (7, 3)):
        assert not torch.equal(augment.tints(rows, *other, colours), tints)


def test_a_tint_changes_nothing_else_that_is_drawn() -> None:
    pixels, rows = noise(64), torch.arange(64)
    colours = pca_colours(pixels)
    faint = EVERYTHING.model_copy(update={"colour": 1e-9})
    assert torch.equal(faint(pixels, rows, 1, 2, colours), EVERYTHING(pixels, rows, 1, 2))
    assert Augment(colour=0.1, views=3).distinct == 3
    assert Augment(colour=0.1).distinct is None


def test_uniforms_lie_in_the_unit_interval_and_fill_it_evenly() -> None:
    values = uniforms(torch.arange(10_000), 8, seed=3, view=1)
    assert values.shape == (10_000, 8)
    assert values.dtype == torch.float64
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    counts = torch.histc(values, 16, 0, 1)
    expected = values.numel() / 16
    # 99.99 % of a chi squared variable with 15 degrees of freedom lie below 44.3.
    assert float(((counts - expected) ** 2 / expected).sum()) < 44.3
    assert float((torch.corrcoef(values.T) - torch.eye(8)).abs().max()) < 5 / 100


def test_uniforms_of_neighbouring_samples_views_and_seeds_are_unrelated() -> None:
    rows = torch.arange(10_000)
    base = uniforms(rows, 1, seed=0, view=0).flatten()
    others = [
        uniforms(rows + 1, 1, seed=0, view=0).flatten(),
        uniforms(rows, 1, seed=0, view=1).flatten(),
        uniforms(rows, 1, seed=1, view=0).flatten(),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 5 / 100


def test_uniforms_exist_for_the_largest_identities_and_seeds() -> None:
    rows = torch.tensor([0, 2**31, 2**62, 2**63 - 1])
    values = uniforms(rows, 4, seed=2**63 - 1, view=2**31)
    assert bool(((values >= 0) & (values < 1)).all())
    assert len(values.unique()) == 16


def test_the_first_uniforms_do_not_depend_on_how_many_are_drawn() -> None:
    rows = torch.arange(50)
    few, many = uniforms(rows, 2, seed=0, view=0), uniforms(rows, 10, seed=0, view=0)
    assert torch.equal(few, many[:, :2])
    assert torch.equal(uniforms(rows, 3, seed=0, view=0, first=4), many[:, 4:7])


def black_on_white(augment: Augment, number: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """White images mixed with black partners, (N, H, W), and what share of them is their own."""
    white = torch.ones(number, 1, side, side)
    mixed, share = augment.mix(white, torch.zeros_like(white), torch.arange(number), 3, 1)
    return mixed[:, 0], share


@pytest.mark.parametrize("augment", MIXING, ids=str)
def test_a_mixture_is_the_same_alone_in_company_and_in_any_order(augment: Augment) -> None:
    images, partners = noise(41, height=7, width=9).float(), noise(41, height=7, width=9).float()
    partners, rows = partners.flip(0) / 255, torch.arange(41) * 977 + 3
    images = images / 255
    together, share = augment.mix(images, partners, rows, 7, 2)
    for chosen in [torch.randperm(41), *torch.arange(41).split(3), *torch.arange(41).split(1)]:
        part, part_share = augment.mix(images[chosen], partners[chosen], rows[chosen], 7, 2)
        assert torch.equal(part, together[chosen])
        assert torch.equal(part_share, share[chosen])


@pytest.mark.parametrize("augment", MIXING, ids=str)
def test_view_seed_and_sample_each_change_the_mixture_and_the_partner(augment: Augment) -> None:
    images, rows = torch.ones(64, 1, 4, 4), torch.arange(64)

    def drawn(rows: Tensor, seed: int, view: int) -> Tensor:
        share = augment.mix(images, 0 * images, rows, seed, view)[1]
        return torch.stack([share.double(), augment.partners(rows, 1000, seed, view).double()])

    first = drawn(rows, 0, 0)
    assert torch.equal(first, drawn(rows, 0, 0))
    for other in (drawn(rows, 1, 0), drawn(rows, 0, 1), drawn(rows + 64, 0, 0)):
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])


def test_every_position_of_the_split_is_a_partner_about_equally_often() -> None:
    rows = torch.arange(20_000) * 3
    partners = Augment(mixup=1.0).partners(rows, 25, seed=0, view=0)
    counts = torch.bincount(partners)
    assert len(counts) == 25
    # 99.99 % of a chi squared variable with 24 degrees of freedom lie below 58.6.
    assert float(((counts - 800) ** 2 / 800).sum()) < 58.6
    assert torch.equal(Augment(mixup=1.0).partners(rows[7:9], 25, 0, 0), partners[7:9])


def test_a_mixup_of_two_colours_lies_between_them_at_the_own_share() -> None:
    images, partners = torch.full((200, 3, 4, 5), 0.75), torch.full((200, 3, 4, 5), 0.25)
    mixed, share = Augment(mixup=0.5).mix(images, partners, torch.arange(200), 0, 0)
    expected = 0.25 + 0.5 * share.double()
    assert torch.allclose(mixed.double(), expected.view(-1, 1, 1, 1).expand(mixed.shape), atol=1e-7)
    assert share.shape == (200,)
    assert share.dtype == mixed.dtype == torch.float32
    assert float(share.min()) < 0.05
    assert float(share.max()) > 0.95


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_the_share_of_a_mixup_has_the_moments_of_its_beta_distribution(alpha: float) -> None:
    share = black_on_white(Augment(mixup=alpha), 20_000, side=1)[1].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(share.mean()) - 0.5) < 4 * (variance / 20_000) ** 0.5
    # The fourth central moment of a symmetric beta distribution is below the variance / 4.
    assert abs(float(share.var()) - variance) < 4 * (variance / 4 / 20_000) ** 0.5


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e6])
def test_an_extreme_alpha_gives_shares_from_0_to_1(alpha: float) -> None:
    for augment in (Augment(mixup=alpha), Augment(cutmix=alpha)):
        mixed, share = black_on_white(augment, 500)
        assert bool(((share >= 0) & (share <= 1)).all())
        assert bool(((mixed >= 0) & (mixed <= 1)).all())


def test_a_cutmix_is_one_box_whose_area_is_exactly_what_the_partner_gets() -> None:
    mixed, share = black_on_white(Augment(cutmix=1.0), 400)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    for image, own in zip(mixed, share, strict=True):
        assert float((image == 0).float().mean()) == 1 - float(own)
        ys, xs = (image == 0).nonzero(as_tuple=True)
        if len(ys):
            box = image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            assert float(box.max()) == 0
    assert float(share.min()) < 0.2
    assert float(share.max()) > 0.98


def test_a_cut_box_has_its_middle_anywhere_and_stops_at_the_border() -> None:
    # So large an alpha leaves no chance: every box has half the area before it is cut off.
    number, n = 20_000, 16
    mixed, _ = black_on_white(Augment(cutmix=1e8), number, side=n)
    covered = (mixed == 0).double().mean(0)
    side, middle = 0.5**0.5, (torch.arange(n, dtype=torch.float64) + 0.5) / n
    along = (middle + side / 2).clamp(max=1) - (middle - side / 2).clamp(min=0)
    assert float((covered - along[:, None] * along).abs().max()) < 5 * 0.5 / number**0.5


def test_either_way_of_mixing_is_taken_half_the_time() -> None:
    mixed, _ = black_on_white(Augment(mixup=8.0, cutmix=1.0), 4000)
    blended = ((mixed > 0) & (mixed < 1)).flatten(1)
    assert torch.equal(blended.any(1), blended.all(1))
    assert abs(float(blended.any(1).double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5


def test_without_a_number_of_views_each_seed_and_epoch_has_its_own() -> None:
    assert Augment(flip=True).distinct is None
    assert Augment(flip=True).shown(5, 9) == (5, 9)


@pytest.mark.parametrize("augment", [*EACH, *MIXING], ids=str)
def test_views_come_round_again_the_same_for_every_seed(augment: Augment) -> None:
    few = augment.model_copy(update={"views": 4})
    assert few.distinct == 4
    assert [few.shown(seed, 6) for seed in (0, 1, 2)] == [(0, 2)] * 3
    assert [few.shown(0, epoch)[1] for epoch in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_where_nothing_is_random_there_is_one_view_however_many_are_asked_for() -> None:
    for augment in (Augment(), Augment(views=7), Augment(rand_magnitude=20)):
        assert augment.distinct == 1
        assert augment.shown(3, 5) == (0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": -1},
        {"zoom": 0.0},
        {"zoom": 1.5},
        {"erase": 1.1},
        {"rotate": 3},
        {"views": 0},
        {"mixup": -0.1},
        {"mixup": float("inf")},
        {"cutmix": float("nan")},
        {"colour": -0.1},
        {"colour": float("nan")},
        {"colour_scale": "variance"},
        {"rand_ops": -1},
        {"rand_magnitude": 31},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Augment.model_validate(wrong)
