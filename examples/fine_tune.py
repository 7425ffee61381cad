"""Fine-tune with sparse attention switched on: the compiled model has a backward, so training is the same line.

python examples/fine_tune.py
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from rich import print  # noqa: A004 - examples print tables

SHIFT = 3.0


def main(inner: str = "inductor", steps: int = 4) -> list[float]:
    """Returns the rectified-flow loss of each step, on one batch that is learnt by heart."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=128, num_layers=1
    ).train()
    options = {
        "schedule": "paper",  # the phase of each sample is read from its timestep
        "timestep": {"shift": SHIFT},
        "tile": (2, 4, 4),
        "inner": inner,
    }
    compiled = torch.compile(model, backend="fps", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    clean, noise, text = torch.randn(2, 16, 4, 16, 16), torch.randn(2, 16, 4, 16, 16), torch.randn(2, 8, 64)
    work = torch.tensor([0.9, 0.3])  # remaining share of the steps: an early and a late sample
    sigma = SHIFT * work / (1 + (SHIFT - 1) * work)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
    losses = []
    for step in range(steps):
        velocity = compiled(noisy, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
