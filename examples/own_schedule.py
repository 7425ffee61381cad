"""A schedule of one's own, a loop of one's own: the step is told by hand, and no step recompiles.

python examples/own_schedule.py
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from rich import print  # noqa: A004 - examples print tables

import fpscompile
from fpscompile import Phase


def main(inner: str = "inductor", steps: int = 10) -> list[float]:
    """Returns each step's relative difference from eager: 0 to rounding while the phase is dense."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=128, num_layers=1
    ).eval()
    latents, text = torch.randn(1, 16, 4, 32, 32), torch.randn(1, 16, 64)

    schedule = [
        Phase(0.0, 0.3, density=1.0),  # the layout of the video is decided here
        Phase(0.3, 0.7, window=(2, 2, 2)),  # tiles seen along (t, h, w)
        Phase(0.7, 1.0, window=(2, 1, 1)),
    ]
    options = {"schedule": schedule, "tile": (2, 4, 4), "inner": inner}
    compiled = torch.compile(model, backend="fps", options=options)

    differences = []
    with torch.no_grad(), fpscompile.attach(compiled) as attachment:
        for index in range(steps):
            attachment.step(index, steps)
            inputs = {
                "hidden_states": latents,
                "timestep": torch.tensor([1000.0 * (1 - index / steps)]),
                "encoder_hidden_states": text,
            }
            with torch._dynamo.config.patch(error_on_recompile=index > 0):
                output = compiled(**inputs, return_dict=False)[0]
            eager = model(**inputs, return_dict=False)[0]
            differences.append(float((output - eager).norm() / eager.norm()))
            print(f"step {index}: relative L2 difference from eager {differences[-1]:.1e}")
    return differences


if __name__ == "__main__":
    main()
