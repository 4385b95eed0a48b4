"""Draws the app's icons: a layer's neurons, of which some are kept.

python apps/menubar/resources/draw.py  (needs Pillow)
"""

from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
KEPT = ("101", "110", "011")  # of the nine neurons
SCALE = 8  # drawn larger and made smaller, for smooth edges


def dots(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], kept: tuple, faint: tuple, small: float):
    """A grid of neurons: those kept are large, the others small."""
    left, top, right, bottom = box
    step = (right - left) / 3
    for row, line in enumerate(KEPT):
        for column, on in enumerate(line):
            radius = step * (0.4 if on == "1" else small)
            x, y = left + step * (column + 0.5), top + step * (row + 0.5)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=kept if on == "1" else faint)


def app_icon(size: int = 1024) -> Image.Image:
    """The icon of the app: the grid on a pane, within the margins that macOS icons have."""
    side = size * 2
    pane = Image.new("RGB", (1, side))
    for y in range(side):
        t = y / side
        pane.putpixel((0, y), tuple(round(a + (b - a) * t) for a, b in zip((94, 176, 239), (32, 76, 160))))
    mask = Image.new("L", (side, side))
    margin = side * 0.098
    ImageDraw.Draw(mask).rounded_rectangle((margin, margin, side - margin, side - margin), side * 0.18, fill=255)
    image = Image.new("RGBA", (side, side))
    image.paste(pane.resize((side, side)), mask=mask)
    grid = Image.new("RGBA", (side, side))
    inner = side * 0.22
    box = (inner, inner, side - inner, side - inner)
    dots(ImageDraw.Draw(grid), box, (255, 255, 255, 255), (255, 255, 255, 110), 0.17)
    return Image.alpha_composite(image, grid).resize((size, size), Image.Resampling.LANCZOS)


def menu_icon(attention: bool = False, size: int = 44) -> Image.Image:
    """The icon in the menu bar, a template: black, and only its shape counts."""
    side = size * SCALE
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    inner = side * 0.11
    dots(draw, (inner, inner, side - inner, side - inner), (0, 0, 0, 255), (0, 0, 0, 255), 0.15)
    if attention:  # an exclamation mark in place of the last column
        draw.rectangle((side * 0.63, 0, side, side), fill=(0, 0, 0, 0))
        draw.rounded_rectangle((side * 0.69, side * 0.12, side * 0.82, side * 0.66), side * 0.065, fill=(0, 0, 0, 255))
        draw.ellipse((side * 0.68, side * 0.74, side * 0.83, side * 0.89), fill=(0, 0, 0, 255))
    return image.resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon = app_icon()
    icon.save(HERE / "glass.icns")
    icon.resize((512, 512), Image.Resampling.LANCZOS).save(HERE / "glass.png", optimize=True)
    menu_icon().save(HERE / "menu.png", optimize=True)
    menu_icon(attention=True).save(HERE / "menu-attention.png", optimize=True)
