"""The shortest useful program: what fps finds in a Wan transformer, and the model compiled with it.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from rich import print  # noqa: A004 - examples print tables

import fpscompile


def main(inner: str = "inductor") -> float:
    """Returns the relative difference between the compiled model at density 1 and eager."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, text_dim=64, ffn_dim=256, num_layers=2
    ).eval()
    call = {  # by name, as pipelines call: that is how the denoising step is known
        "hidden_states": torch.randn(1, 16, 5, 32, 32),
        "timestep": torch.tensor([600.0]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }

    with torch.no_grad():
        print(fpscompile.explain(model, **call))

        eager = model(**call)[0]
        differences = {}
        for density in (1.0, 0.4):
            options = {"density": density, "inner": inner}
            compiled = torch.compile(model, backend="fps", options=options)
            output = compiled(**call)[0]
            differences[density] = float((output - eager).norm() / eager.norm())
    for density, difference in differences.items():
        print(f"density {density}: relative L2 difference from eager {difference:.1e}")
    return differences[1.0]


if __name__ == "__main__":
    main()
