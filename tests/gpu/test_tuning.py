"""Tuning on a GPU: what is measured there, and that it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpscompile import Backend, Settings, autotune
from fpscompile.gpu.call import has_fp8_tensor_cores
from fpscompile.tuning.signature import device_name

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")

OPTIONS = {"density": 0.3, "tile": (2, 8, 8), "inner": "eager"}


class Model(nn.Module):
    """One attention over a video of 8 x 16 x 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 128, 1)
        self.qkv = nn.Linear(128, 384)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.embed(latent).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("quant", "more"), [("none", {}), ("fp8", {}), ("fp8", {"window": "topk"})])
def test_a_gpu_is_tuned_once_and_the_compilation_uses_it(quant: str, more: dict[str, str], tmp_path: Path) -> None:
    device = torch.device("cuda")
    if quant == "fp8" and not has_fp8_tensor_cores(device):
        pytest.skip("no FP8 tensor cores")
    model = Model().eval().to(device, torch.bfloat16)
    latent = torch.randn(1, 4, 8, 16, 32, device=device, dtype=torch.bfloat16)
    options, path = OPTIONS | {"quant": quant} | more, tmp_path / "tuning.json"
    report = autotune(model, latent, options=options, path=path)
    (group,) = report.groups
    assert group.tuned is not None, group.problem
    assert group.signature.device == device_name(device)
    assert torch.cuda.get_device_name() in group.signature.device
    assert sum(name.startswith("triton(") for name, _ in group.tuned.tried) > 1, group.tuned.notes
    assert group.tuned.error <= (0.12 if quant == "fp8" else 2e-2)
    assert group.tuned.seconds <= 1.1 * group.tuned.default_seconds
    assert autotune(model, latent, options=options, path=path).measurements == 0

    outputs = []
    for extra in ({"tuning": str(path)}, {"autotune": "off"}):
        torch._dynamo.reset()
        backend = Backend(Settings.from_options(options | extra))
        with torch.no_grad():
            outputs.append(torch.compile(model, backend=backend)(latent).float())
        tuned = [note for note in backend.graphs[0].notes if note.code == "tuned"]
        assert len(tuned) == ("tuning" in extra)
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < (0.05 if quant == "fp8" else 1e-2)
