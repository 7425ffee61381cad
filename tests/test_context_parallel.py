"""diffusers' context parallelism (``enable_parallelism`` with Ulysses) on two gloo processes: the same as one process.

Each rank runs a WanTransformer3DModel whose tokens are shared out; what it returns is compared with one process that
computes the same windows by the slow lowering.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "ContextParallelConfig"):
    pytest.skip("this diffusers has no context parallelism", allow_module_level=True)

BASE = {"tile": (2, 2, 2), "inner": "eager"}
"""Not strict: torch 2.11 breaks the graph behind the blocks, where the tokens are gathered."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "schedule": ("whole", {"schedule": "paper", "quant": "fp8", "granularity": "tile"}),
    "heads": ("whole", {"density": 0.3, "heads": {"0": "dense", "3": {"family": "sliding", "density": 0.2}}}),
    "layers": ("blocks", {"density": 0.3, "layers": {"blocks.1": {"density": 0.6}}}),
}
"""What is compiled, and with which options."""


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        in_channels=4,
        out_channels=4,
    ).eval()


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 6, 16, 16, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 16, generator=generator),
        "return_dict": False,
    }


def run(how: str, options: dict[str, Any], parallel: bool) -> torch.Tensor:
    """One forward; ``how`` compiles the model "whole" or its "blocks"."""
    import fpscompile
    from fpscompile.backend import fps

    torch._dynamo.reset()
    model: Any = make()
    if parallel:
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    if how == "whole":
        model = torch.compile(model, backend=fps, options={**BASE, **options})
    attachment = fpscompile.attach(model)
    if how == "blocks":
        model.compile_repeated_blocks(backend=fps, options={**BASE, **options})
    with torch.no_grad():
        out: torch.Tensor = model(**inputs())[0]
    attachment.detach()
    return out


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # diffusers asks for the number of accelerators even on CPUs.
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results = {name: run(how, options, parallel=True) for name, (how, options) in CASES.items()}
        torch.save(results, Path(folder) / f"{rank}.pt")
        dist.barrier()  # gloo may abort a process that leaves while another still talks to it
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two ranks computed; the processes, whose imports take most of the time, start once."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    start: Callable[..., Any] = mp.spawn
    start(_rank, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(case: str, ranks: list[dict[str, torch.Tensor]]) -> None:
    alone = run("whole", {**CASES[case][1], "lowering": "reference"}, parallel=False)
    with torch.no_grad():
        dense = make()(**inputs())[0]
    assert float((alone - dense).norm() / dense.norm()) > 1e-3, "the window must change something"
    for results in ranks:
        assert float((results[case] - alone).norm() / alone.norm()) < 1e-5
