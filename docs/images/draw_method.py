"""Draws docs/images/method.svg: pre-training above, fine-tuning below, the same encoder in both.

``python docs/images/draw_method.py`` writes the file; a test compares it with what this module draws. The slice
is a drawing, not a real scan.
"""

from pathlib import Path

WIDTH, HEIGHT = 1240, 604
INK, GREY, LINE, PAPER = "#22303c", "#5d6b78", "#b8c2cc", "#ffffff"
VISIBLE, HIDDEN, TOKEN = "#2f7ebc", "#e3e7eb", "#f2b134"
ENCODER, TRANSFORMER, REBUILDING, SEGMENTING = "#d6e6f4", "#9fc5e4", "#fde8bf", "#d9efda"
TILES, SIDE = 6, 22  # mask units on an edge of the drawn patch, and their size
PATCH = TILES * SIDE
# a quarter of the 36 mask units, by row and column
KEPT = ((0, 3), (1, 1), (1, 4), (2, 0), (2, 2), (3, 5), (4, 1), (4, 3), (5, 4))
TOP, BOTTOM = 92, 404  # upper edges of the patches in the two rows

# an axial slice of a chest on a square of 100
SLICE = """
  <symbol id="slice" viewBox="0 0 100 100">
    <rect width="100" height="100" fill="#12161a"/>
    <ellipse cx="50" cy="52" rx="46" ry="36" fill="#6a7078"/>
    <ellipse cx="50" cy="52" rx="43" ry="33" fill="#9aa1aa"/>
    <ellipse cx="28" cy="51" rx="16" ry="23" fill="#23282e"/>
    <ellipse cx="72" cy="51" rx="16" ry="23" fill="#23282e"/>
    <path d="M24 44 l6 8 m-2 -10 l-3 16 M76 44 l-6 8 m2 -10 l3 16" stroke="#7d858e" stroke-width="1.2" fill="none"/>
    <ellipse cx="53" cy="43" rx="13" ry="12" fill="#b9c0c8"/>
    <circle cx="56" cy="61" r="4.4" fill="#c9d0d7"/>
    <ellipse cx="50" cy="72" rx="8" ry="6.5" fill="#eef1f4"/>
    <circle cx="50" cy="80" r="3" fill="#9aa1aa"/>
  </symbol>
  <symbol id="labels" viewBox="0 0 100 100">
    <ellipse cx="28" cy="51" rx="16" ry="23" fill="#66bb6a" fill-opacity="0.85"/>
    <ellipse cx="72" cy="51" rx="16" ry="23" fill="#66bb6a" fill-opacity="0.85"/>
    <ellipse cx="53" cy="43" rx="13" ry="12" fill="#ef6c5a" fill-opacity="0.9"/>
    <ellipse cx="50" cy="72" rx="8" ry="6.5" fill="#f2b134" fill-opacity="0.95"/>
  </symbol>"""


def text(x: float, y: float, words: str, size: int = 15, colour: str = INK, bold: bool = False) -> str:
    """A line of text around its middle."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="middle"{weight}>{words}</text>'


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through points, with a head at the last."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="2"{dash} marker-end="url(#head)"/>'


def scan(x: float, y: float, blurred: bool = False) -> str:
    """The slice on the square of a patch."""
    soft = ' filter="url(#soft)"' if blurred else ""
    drawn = f'<use href="#slice" x="{x}" y="{y}" width="{PATCH}" height="{PATCH}"{soft}/>'
    return drawn + frame(x, y)


def frame(x: float, y: float) -> str:
    return f'<rect x="{x}" y="{y}" width="{PATCH}" height="{PATCH}" fill="none" stroke="{INK}" stroke-width="1.2"/>'


def units(x: float, y: float, kept: str | None, hidden: str) -> str:
    """The mask units of a patch: hidden ones in a colour, visible ones in another or left as they are."""
    squares = []
    for row in range(TILES):
        for column in range(TILES):
            colour = kept if (row, column) in KEPT else hidden
            if colour is not None:
                place = f'x="{x + column * SIDE}" y="{y + row * SIDE}" width="{SIDE}" height="{SIDE}"'
                squares.append(f'<rect {place} fill="{colour}" stroke="{PAPER}" stroke-width="1"/>')
    return "".join(squares)


def blocks(x: float, y: float) -> str:
    """The visible units alone, one above the other in three columns."""
    parts = []
    for number, (row, column) in enumerate(KEPT):
        left, upper = x + number % 3 * (SIDE + 5), y + number // 3 * (SIDE + 5)
        window = f"{column * SIDE * 100 / PATCH} {row * SIDE * 100 / PATCH} {SIDE * 100 / PATCH} {SIDE * 100 / PATCH}"
        place = f'x="{left}" y="{upper}" width="{SIDE}" height="{SIDE}"'
        parts.append(f'<svg {place} viewBox="{window}"><use href="#slice" width="100" height="100"/></svg>')
        parts.append(f'<rect {place} fill="none" stroke="{VISIBLE}" stroke-width="2"/>')
    return "".join(parts)


def stages(x: float, middle: float, heights: list[int], fill: str, last: str | None = None) -> str:
    """Bars of a network, one per stage; the ViT in another colour."""
    bars = []
    for number, height in enumerate(heights):
        colour = last if last and number == len(heights) - 1 else fill
        place = f'x="{x + number * 30}" y="{middle - height / 2}" width="22" height="{height}"'
        bars.append(f'<rect {place} rx="4" fill="{colour}" stroke="{INK}" stroke-width="1.2"/>')
    return "".join(bars)


def draw() -> str:
    """The whole picture as SVG."""
    upper, lower = TOP + PATCH / 2, BOTTOM + PATCH / 2
    shrinking, growing = [124, 98, 72, 48, 30], [52, 76, 100, 124]
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>',
        f'<rect x="12" y="12" width="{WIDTH - 24}" height="276" rx="8" fill="#f6f8fa"/>',
        f'<rect x="12" y="{BOTTOM - 76}" width="{WIDTH - 24}" height="260" rx="8" fill="#f6f8fa"/>',
        text(94, 50, "Pre-training", 19, bold=True),
        text(92, BOTTOM - 40, "Fine-tuning", 19, bold=True),
        # pre-training
        scan(36, TOP),
        units(36, TOP, None, HIDDEN),
        frame(36, TOP),
        text(102, TOP + PATCH + 24, "mask", bold=True),
        text(102, TOP + PATCH + 43, "three quarters hidden", 13),
        arrow((174, upper), (206, upper)),
        blocks(214, upper - 38),
        text(252, TOP + PATCH + 24, "visible blocks", bold=True),
        text(252, TOP + PATCH + 43, "only these are computed", 13),
        arrow((300, upper), (336, upper)),
        stages(346, upper, shrinking, ENCODER, TRANSFORMER),
        text(420, TOP + PATCH + 24, "encoder", bold=True),
        text(420, TOP + PATCH + 43, "MedNeXt stages, then a ViT", 13),
        arrow((500, upper), (536, upper)),
        arrow((417, upper - 40), (417, 62), (590, 62), (590, TOP - 5), dashed=True),
        text(504, 54, "all stages except the first", 13, GREY),
        units(546, TOP, VISIBLE, TOKEN),
        text(612, TOP + PATCH + 24, "densify", bold=True),
        text(612, TOP + PATCH + 43, "tokens at hidden units", 13),
        arrow((686, upper), (722, upper)),
        arrow((634, TOP - 2), (634, 62), (803, 62), (803, upper - 56), dashed=True),
        text(718, 54, "skips", 13, GREY),
        stages(732, upper, growing, REBUILDING),
        text(792, TOP + PATCH + 24, "decoder", bold=True),
        text(792, TOP + PATCH + 43, "discarded after pre-training", 13),
        arrow((856, upper), (892, upper)),
        scan(902, TOP, blurred=True),
        text(968, TOP + PATCH + 24, "reconstruction", bold=True),
        text(1142, upper - 22, "loss", bold=True),
        text(1142, upper + 2, "squared error of", 14),
        text(1142, upper + 21, "the hidden blocks,", 14),
        text(1142, upper + 40, "each standardised", 14),
        # the transfer of weights
        arrow((357, 296), (357, BOTTOM - 2)),
        text(612, 313, "same encoder class and weights, no conversion", 15, VISIBLE, bold=True),
        # fine-tuning
        scan(36, BOTTOM),
        text(102, BOTTOM + PATCH + 24, "patch", bold=True),
        text(102, BOTTOM + PATCH + 43, "nothing hidden", 13),
        arrow((174, lower), (336, lower)),
        stages(346, lower, shrinking, ENCODER, TRANSFORMER),
        text(420, BOTTOM + PATCH + 24, "encoder", bold=True),
        text(420, BOTTOM + PATCH + 43, "pre-trained, dense", 13),
        arrow((500, lower), (722, lower)),
        arrow((417, lower - 40), (417, BOTTOM - 30), (803, BOTTOM - 30), (803, lower - 56), dashed=True),
        text(612, BOTTOM - 38, "skips", 13, GREY),
        stages(732, lower, growing, SEGMENTING),
        text(792, BOTTOM + PATCH + 24, "decoder", bold=True),
        text(792, BOTTOM + PATCH + 43, "new, random weights", 13),
        arrow((856, lower), (892, lower)),
        scan(902, BOTTOM),
        f'<use href="#labels" x="902" y="{BOTTOM}" width="{PATCH}" height="{PATCH}"/>',
        text(968, BOTTOM + PATCH + 24, "segmentation", bold=True),
        text(1142, lower - 10, "loss", bold=True),
        text(1142, lower + 14, "nnU-Net's, with labels", 14),
    ]
    body = "\n  ".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
  font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif">
  <title>HySparK: masked pre-training above, fine-tuning of the same encoder below</title>
  <defs>
  <marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">
    <path d="M0 0 L10 5 L0 10 z" fill="{GREY}"/>
  </marker>
  <filter id="soft" x="0" y="0" width="1" height="1"><feGaussianBlur stdDeviation="1.3"/></filter>{SLICE}
  </defs>
  {body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(draw(), encoding="utf-8")
