"""Clips from the same noise with the small trained Wan, dense and with fpscompile, side by side as a moving picture.

    python examples/small_wan_video.py            # out/demo/side_by_side.gif

The model is tiny and briefly trained, so its clips are moving blobs of colour, and at 512 tokens attention is too small
for sparsity to save time: what the picture shows is how close the two runs stay, step by step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import fpscompile

sys.path.insert(0, str(Path(__file__).parent))
from small_wan import checkpoint, flow
from small_wan.model import Size, build
from small_wan.report import psnr
from train_small_wan import WEIGHTS

ZOOM, MARGIN = 6, 44


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--schedule", default="training_free")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    size = Size()
    model = build(size).eval()
    checkpoint.load_weights(args.weights, model, size.as_dict())
    options = {"schedule": args.schedule, "tile": (2, 2, 2), "timestep": {"shift": flow.SHIFT}, "inner": "aot_eager"}
    sparse = torch.compile(model, backend="fps", dynamic=False, options=options)
    shape = (args.clips, 3, size.frames, size.pixels, size.pixels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    call = {
        "hidden_states": noise,
        "timestep": torch.full((args.clips,), 500.0),
        "encoder_hidden_states": torch.zeros(args.clips, size.text_tokens, size.text_dim),
    }
    record = next(s for s in fpscompile.explain(model, **call, options=options).sites if s.rewritten)
    flow.sample(sparse, noise, size, 1)  # compiles

    def timed(run: Any) -> tuple[Tensor, float]:
        started = time.perf_counter()
        return flow.sample(run, noise, size, args.steps), time.perf_counter() - started

    dense, dense_s = timed(model)
    fps, fps_s = timed(sparse)
    result = {"psnr_db": psnr(fps, dense), "dense_s": dense_s, "fps_s": fps_s}
    kept = " / ".join(f"{d:.2f}" for d in record.density)
    caption = f"density {kept}\nPSNR of fps to dense {result['psnr_db']:.1f} dB"
    args.out.mkdir(parents=True, exist_ok=True)
    write_gif(args.out / "side_by_side.gif", {f"dense {dense_s:.1f} s": dense, f"fps {fps_s:.1f} s": fps}, caption)
    print(f"wrote {args.out}/side_by_side.gif; {caption}".replace("\n", "; "))
    return result


def write_gif(path: Path, runs: dict[str, Tensor], caption: str) -> None:
    """Clips of each run, f32[N, 3, T, h, w] in [-1, 1], in a row of their own, moving together."""
    frames = []
    rows = list(runs.items())
    count, _, length, height, width = rows[0][1].shape
    for frame in range(length):
        page = Image.new("RGB", (count * width * ZOOM, len(rows) * (height * ZOOM + 16) + MARGIN), "white")
        draw = ImageDraw.Draw(page)
        for row, (name, clips) in enumerate(rows):
            top = row * (height * ZOOM + 16)
            draw.text((4, top + 2), name, fill="black")
            strip = torch.cat(list(clips[:, :, frame]), dim=-1).permute(1, 2, 0)
            pixels = ((strip.clamp(-1, 1) + 1) * 127.5).byte().numpy()
            picture = Image.fromarray(pixels).resize((count * width * ZOOM, height * ZOOM), Image.Resampling.BICUBIC)
            page.paste(picture, (0, top + 16))
        draw.text((4, page.height - MARGIN + 6), f"{caption}\nframe {frame + 1} of {length}", fill="black")
        frames.append(page)
    frames[0].save(path, save_all=True, append_images=frames[1:] + frames[-2:0:-1], duration=150, loop=0)


if __name__ == "__main__":
    main()
