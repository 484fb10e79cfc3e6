"""Joins the heat maps of a run in one picture, the first image of each defect: README.md shows that of the demo.

``python -m benchmarks.heatmaps results/VTFusion/DemoParts/washer/latest/images docs/heatmaps.png``
"""

import argparse
from pathlib import Path

from PIL import Image


def join_pictures(folder: Path, output: Path) -> Path:
    """Write the first picture of every subfolder of ``folder``, one below the other.

    Args:
        folder: What Anomalib's visualizer wrote: a folder for each kind of defect, and one for good parts.
        output: PNG to write.

    Raises:
        FileNotFoundError: If there are no pictures.
    """
    firsts = [sorted(kind.glob("*.png"))[0] for kind in sorted(folder.iterdir()) if any(kind.glob("*.png"))]
    if not firsts:
        raise FileNotFoundError(f"{folder} holds no folders with pictures; give the images folder of a run.")
    pictures = [Image.open(path).convert("RGB") for path in firsts]
    width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
    joined = Image.new("RGB", (width, height), "white")
    top = 0
    for picture in pictures:
        joined.paste(picture, (0, top))
        top += picture.height
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}")
    joined.resize((width * 3 // 4, height * 3 // 4)).save(temporary, format="PNG")
    return temporary.replace(output)


def main() -> None:
    """Join the pictures of the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    join_pictures(args.folder, args.output)


if __name__ == "__main__":
    main()
