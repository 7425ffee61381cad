"""Ulysses on two GPUs: diffusers' context parallelism over NCCL, through the Triton kernels, equals one GPU."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models.zoo import wan, wan_inputs

diffusers = pytest.importorskip("diffusers")
if torch.cuda.device_count() < 2 or not hasattr(diffusers, "ContextParallelConfig"):
    pytest.skip("needs two GPUs and a diffusers with context parallelism", allow_module_level=True)

GRID = (4, 8, 12)
OPTIONS = {"schedule": "paper", "tile": (2, 4, 4), "quant": "fp8", "granularity": "tile", "lowering": "triton"}


def output(device: torch.device, *, parallel: bool) -> torch.Tensor:
    import fpscompile

    model = wan(layers=2).to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in wan_inputs(GRID).items()}
    if parallel:
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    backend = fpscompile.Backend(fpscompile.Settings.from_options(OPTIONS))
    model = torch.compile(model, backend=backend)  # torch 2.11 breaks the graph at the end
    with torch.no_grad(), fpscompile.attach(model, grid=GRID):
        out = model(**inputs)[0].cpu()
    sites = [site for graph in backend.graphs for site in graph.sites if site.kind == "3d"]
    assert len(sites) == 2
    assert all(site.rewritten for site in sites), [site.reason for site in sites]
    return out


def _rank(rank: int, port: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(output(torch.device("cuda", rank), parallel=True), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_gpus_compute_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2, join=True)
    alone = output(torch.device("cuda", 0), parallel=False)
    for rank in (0, 1):
        assert float((torch.load(tmp_path / f"{rank}.pt") - alone).norm() / alone.norm()) < 2e-3
