"""Regular pictures, drawn by formulas: what a camera uncovers of them goes on as what it saw before.

A photograph does not tell what lies outside the first frame; a plaid or a wall of bricks does. So a model that looks
at the first frame can get the uncovered part right, pixel by pixel, and one that does not cannot.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from wanlab.heldout.clips import COLOUR_RGB

SIZE_PX = (576, 768)
"""Height and width of a texture as clips use it: room for every camera motion at 256x384 pixels and 33 frames."""

PERIOD_PX = (12.0, 60.0)
"""Of a cell, which is the smallest part that repeats or alternates."""

RELIEF_PX = 14.0

LEAST_COLOUR_DISTANCE = 0.2
"""Of a texture's colours to those of shapes, root mean square, so that a shape can be seen on every texture."""


def texture(
    generator: np.random.Generator,
    size: tuple[int, int] = SIZE_PX,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A random regular picture: plaid, checks, tiles, bricks, dots, stripes, chevrons, a weave, scales or hexagons.

    Colours, period (12 to 60 pixels), angle and phase are random, and so is a slight, smooth shading. Nearly the same
    values come out on every device.

    Args:
        generator: source of the parameters; the same state gives the same picture.
        size: height and width in pixels.

    Returns:
        `[3, H, W]` float32 in [0, 1].
    """
    kind = KINDS[int(generator.integers(len(KINDS)))]
    height, width = size
    y, x = torch.meshgrid(
        torch.arange(height, device=device).float() - height / 2,
        torch.arange(width, device=device).float() - width / 2,
        indexing="ij",
    )
    angle = float(generator.uniform(0, math.pi))
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    u, v = (axis + float(generator.uniform(0, 500)) for axis in (u, v))
    period = math.exp(float(generator.uniform(*np.log(PERIOD_PX))))
    image = kind(generator, u, v, period)
    # Light from one side, and a swell much longer than the period: both go on smoothly beyond the first frame.
    slope, swell = generator.uniform(-0.12, 0.12, 2), float(generator.uniform(0, 0.06))
    wave = torch.sin(2 * math.pi * (u / float(generator.uniform(300, 700)) + float(generator.random())))
    light = 1 + float(slope[0]) * x / width + float(slope[1]) * y / height + swell * wave
    # A fine relief that fits into the period, so that no part is flat.
    pitch, depth = period / max(1, round(period / RELIEF_PX)), float(generator.uniform(0.05, 0.1))
    relief = 1 + depth * (torch.cos(2 * math.pi * u / pitch) + torch.cos(2 * math.pi * v / pitch))
    return (image * light * relief).clamp(0, 1)


def _palette(generator: np.random.Generator, count: int, u: torch.Tensor) -> torch.Tensor:
    """Colours `[count, 3]` on the device of `u`, far from one another and from those of shapes."""
    shapes = np.array(list(COLOUR_RGB.values()))
    candidates = generator.uniform(0.04, 0.96, (96, 3))
    # Pale and dark colours beside strong ones, as in cloth and stone.
    grey = candidates.mean(axis=1, keepdims=True)
    candidates = grey + (candidates - grey) * generator.uniform(0.2, 1.0, (96, 1))
    far = _distances(candidates, shapes).min(axis=1) > LEAST_COLOUR_DISTANCE
    candidates = candidates[far]
    chosen = [candidates[0]]
    for i in range(1, count):
        few, others = candidates[8 * i : 8 * i + 8], np.array(chosen)
        # Brightness counts most: motion is measured on grey pictures.
        brightness = np.abs(few.mean(axis=1)[:, None] - others.mean(axis=1))
        chosen.append(few[np.argmax((_distances(few, others) + 2 * brightness).min(axis=1))])
    return torch.tensor(np.array(chosen), dtype=torch.float32, device=u.device)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(a[:, None] - b).mean(axis=-1))


def _mix(under: torch.Tensor, over: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """Colours `[3]` or `[3, H, W]` over others, by a coverage `[H, W]`."""
    under, over = (each.view(3, 1, 1) if each.dim() == 1 else each for each in (under, over))
    return under * (1 - coverage) + over * coverage


def _covered(distance: torch.Tensor) -> torch.Tensor:
    """Coverage of a pixel by a shape, from its signed distance in pixels, negative inside."""
    return (0.5 - distance).clamp(0, 1)


def _band(x: torch.Tensor, centre: float, width: float, period: float) -> torch.Tensor:
    """Coverage by stripes that repeat."""
    return _covered(((x - centre + period / 2) % period - period / 2).abs() - width / 2)


def _to_edge(x: torch.Tensor, period: float) -> torch.Tensor:
    """Distance to the nearest edge of a row of cells, in pixels."""
    return period / 2 - (x % period - period / 2).abs()


def _bands(
    generator: np.random.Generator, x: torch.Tensor, cell: float, colours: torch.Tensor
) -> torch.Tensor:
    """Stripes of different widths that repeat, `[3, H, W]`; `cell` is their mean width."""
    count = len(colours) + int(generator.integers(3))
    widths = generator.uniform(0.35, 1.65, count)
    widths *= cell * count / widths.sum()
    starts, period = np.cumsum(widths) - widths, float(widths.sum())
    image = torch.zeros(3, *x.shape, device=x.device)
    for i, (start, width) in enumerate(zip(starts, widths, strict=True)):
        coverage = _band(x, float(start + width / 2), float(width), period)
        image += colours[i % len(colours)].view(3, 1, 1) * coverage
    return image


def _cells(
    generator: np.random.Generator, column: torch.Tensor, row: torch.Tensor, colours: torch.Tensor
) -> torch.Tensor:
    """A colour for each cell of a grid, `[3, H, W]`, from a small table that repeats."""
    across, down = (int(generator.integers(2, 4)) for _ in range(2))
    table = torch.as_tensor(
        (np.arange(across) + np.arange(down)[:, None] * int(generator.integers(1, 3))) % len(colours),
        device=column.device,
    )
    return colours[table[row.long() % down, column.long() % across]].permute(2, 0, 1)


def _stripes(generator, u, v, period):
    colours = _palette(generator, 4, u)
    image = _bands(generator, u, period / 2, colours[:3])
    # Dashes, for plain stripes do not tell how far they move along themselves.
    pitch, dash = period * float(generator.uniform(1, 2)), period * float(generator.uniform(0.15, 0.4))
    every = period * float(generator.integers(1, 3))
    coverage = _band(u, 0.0, dash, every) * _band(v, 0.0, pitch * float(generator.uniform(0.4, 0.7)), pitch)
    return _mix(image, colours[3], coverage)


def _plaid(generator, u, v, period):
    colours = _palette(generator, 4, u)
    warp, weft = (_bands(generator, x, period / 2, colours) for x in (u, v))
    # A twill: threads of one direction lie above the others in diagonal lines.
    pitch = max(period / 4, 6.0)
    above = 0.5 + 0.2 * torch.sin(2 * math.pi * (u + v) / pitch)
    return _mix(warp, weft, above)


def _checks(generator, u, v, period):
    colours = _palette(generator, 3, u)
    across, down = (_band(x, 0.0, period, 2 * period) for x in (u, v))
    if generator.random() < 0.5:
        image = _mix(colours[0], colours[1], (across + down) / 2)  # gingham
    else:
        image = _mix(colours[0], colours[1], across * down + (1 - across) * (1 - down))
    line = float(generator.uniform(1.5, 3))
    lines = torch.maximum(_band(u, period / 4, line, 2 * period), _band(v, period / 4, line, 2 * period))
    return _mix(image, colours[2], lines)


def _tiles(generator, u, v, period):
    colours = _palette(generator, 5, u)
    image = _cells(generator, (u / period).floor(), (v / period).floor(), colours[:3])
    edge = torch.minimum(_to_edge(u, period), _to_edge(v, period))
    if generator.random() < 0.6:
        # A motif in each tile: a diamond or a disc.
        x, y = ((axis % period - period / 2).abs() for axis in (u, v))
        size = period * float(generator.uniform(0.2, 0.38))
        distance = (x + y - size) / math.sqrt(2) if generator.random() < 0.5 else torch.hypot(x, y) - size
        image = _mix(image, colours[3], _covered(distance))
    return _mix(image, colours[4], _covered(edge - float(generator.uniform(1, 2))))


def _bricks(generator, u, v, period):
    colours = _palette(generator, 4, u)
    length = period * float(generator.uniform(1.6, 2.4))
    row = (v / period).floor()
    along = u + row * length * float(generator.choice([0.5, 1 / 3]))
    image = _cells(generator, (along / length).floor(), row, colours[:3])
    edge = torch.minimum(_to_edge(along, length), _to_edge(v, period))
    # Bricks are rounded: darker towards one side.
    image = image * (0.8 + 0.35 * ((v % period) / period))
    return _mix(image, colours[3], _covered(edge - float(generator.uniform(1, 2.2))))


def _dots(generator, u, v, period):
    colours = _palette(generator, 4, u)
    row_height = period * (math.sqrt(3) / 2 if generator.random() < 0.5 else 1.0)
    row = (v / row_height).floor()
    along = u + row * period / 2 if row_height < period else u
    dots = _cells(generator, (along / period).floor(), row, colours[1:3])
    distance = torch.hypot(along % period - period / 2, v % row_height - row_height / 2)
    radius = row_height * float(generator.uniform(0.25, 0.45))
    image = _mix(colours[0], dots, _covered(distance - radius))
    return _mix(image, colours[3], _covered(distance - radius * float(generator.uniform(0.3, 0.6))))


def _chevrons(generator, u, v, period):
    colours = _palette(generator, 4, u)
    width = period * float(generator.uniform(1.5, 2.5))
    if generator.random() < 0.5:
        bend = (u % width - width / 2).abs() * float(generator.uniform(0.6, 1.2))
    else:
        bend = torch.sin(2 * math.pi * u / width) * width * float(generator.uniform(0.1, 0.2))
    return _bands(generator, v + bend, period / 2, colours)


def _weave(generator, u, v, period):
    colours = _palette(generator, 3, u)
    column, row = (u / period).floor(), (v / period).floor()
    upright = ((column + row) % 2 == 0).float()
    gap = period * float(generator.uniform(0.04, 0.14))
    strands = []
    for across, along, colour in ((u, v, colours[0]), (v, u, colours[1])):
        round_ = torch.cos(math.pi * (across % period / period - 0.5))
        # A strand sinks where it goes below the other.
        dip = torch.cos(math.pi * (along % period / period - 0.5)).clamp(min=0).sqrt()
        lit = colour.view(3, 1, 1) * (0.55 + 0.3 * round_ + 0.2 * dip)
        strands.append(_mix(colours[2] * 0.5, lit, _covered(gap - _to_edge(across, period))))
    return _mix(strands[1], strands[0], upright)


def _scales(generator, u, v, period):
    colours = _palette(generator, 3, u)
    image = colours[0].view(3, 1, 1).expand(3, *u.shape)
    row_height, radius = period / 2, period * 0.58
    base = (v / row_height).floor()
    ring = float(generator.uniform(0.55, 0.8))
    # From the row above to the row below: each covers the one before it.
    for back in (-1, 0, 1, 2):
        row = base - 1 + back
        dx = (u + row * period / 2) % period - period / 2
        distance = torch.hypot(dx, v - row * row_height)
        parity = (row % 2)[None]
        fill = colours[0].view(3, 1, 1) * (1 - parity) + colours[1].view(3, 1, 1) * parity
        fill = fill * (1.1 - 0.4 * (distance / radius).clamp(0, 1))
        scale = _mix(colours[2], fill, _covered(distance - radius + 1.5))
        scale = _mix(scale, fill * 0.75, _covered((distance - radius * ring).abs() - 1.0))
        image = _mix(image, scale, _covered(distance - radius))
    return image


def _hexagons(generator, u, v, period):
    colours = _palette(generator, 4, u)
    # The nearest of two interlaced grids of centres is the centre of the hexagon.
    tall = period * math.sqrt(3)
    (first, first_row), (second, second_row) = (
        [((axis / step - shift).round() + shift) * step for axis, step in ((u, period), (v, tall))]
        for shift in (0.0, 0.5)
    )
    nearer = torch.hypot(u - first, v - first_row) < torch.hypot(u - second, v - second_row)
    x, y = torch.where(nearer, first, second), torch.where(nearer, first_row, second_row)
    number = ((x / (period / 2)).round() + 3 * (y / (tall / 2)).round()) / 2
    image = colours[(number.round().long() % 3)].permute(2, 0, 1)
    dx, dy = (u - x).abs(), (v - y).abs()
    edge = period / 2 - torch.maximum(dx, dx / 2 + dy * math.sqrt(3) / 2)
    image = image * (0.8 + 0.3 * (edge / (period / 2)))
    return _mix(image, colours[3], _covered(edge - float(generator.uniform(0.8, 1.8))))


KINDS = (_stripes, _plaid, _checks, _tiles, _bricks, _dots, _chevrons, _weave, _scales, _hexagons)
