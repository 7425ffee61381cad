"""A compiled model trains the same alone and in two processes (DDP, FSDP2), with and without gradient checkpointing.

Each test compares gradients with those of the same model in one process, whose attention is computed eagerly from the
oracle's formulas (``lowering="reference"``) or by the generic lowering ("gather").
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
from torch import Tensor

pytest.importorskip("diffusers")

SHIFT = 2.0
OPTIONS = {"schedule": "paper", "tile": (2, 2, 2), "timestep": {"shift": SHIFT}, "inner": "aot_eager", "strict": True}
FP8 = {**OPTIONS, "quant": "fp8", "lowering": "gather"}

CONSTANT = {"density": 0.2, "grid": (4, 8, 8), **{k: v for k, v in FP8.items() if k not in ("schedule", "timestep")}}


def make() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        in_channels=4,
        out_channels=4,
    ).train()


def inputs() -> dict[str, Tensor]:
    """Four samples, whose timesteps lie in all three phases."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(4, 4, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([980.0, 700.0, 500.0, 40.0]),
        "encoder_hidden_states": torch.randn(4, 3, 16, generator=generator),
    }


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, return_dict=False)[0].square().mean()
    return loss


def gradients(model: torch.nn.Module, run: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(run, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled(model: torch.nn.Module, options: dict[str, Any] = FP8, **more: Any) -> Any:
    from fpscompile.backend import fps

    torch._dynamo.reset()
    return torch.compile(model, backend=fps, dynamic=False, options={**options, **more})


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert got.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        error = float((got[name] - value).norm() / value.norm().clamp(min=1e-6))
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    model = make()
    return gradients(model, compiled(model), inputs())


def test_eager_oracle_with_fake_quantization(alone: dict[str, Tensor]) -> None:
    """The same gradients from the slow lowering; FP8 and sparsity do change them, so the agreement means something."""
    model = make()
    close(gradients(model, compiled(model, lowering="reference"), inputs()), alone)
    dense = gradients(model, model, inputs())
    name = "blocks.0.attn1.to_q.weight"
    assert float((dense[name] - alone[name]).norm() / dense[name].norm()) > 1e-2


def test_gradient_checkpointing_replays_phase_and_rounding(alone: dict[str, Tensor]) -> None:
    model = make()
    model.enable_gradient_checkpointing()
    close(gradients(model, compiled(model), inputs()), alone)


def test_autocast_trains_close_to_float32(alone: dict[str, Tensor]) -> None:
    model = make()
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(run, inputs())
    loss.backward()
    for name, p in model.named_parameters():
        if name.endswith("attn1.to_v.weight"):
            assert p.grad is not None
            assert p.grad.dtype == torch.float32
            assert float((p.grad - alone[name]).norm() / alone[name].norm()) < 0.1


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _ddp(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model = make()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)  # must outlive the backward: it holds the reducer
    loss_of(compiled(wrapped), batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _fsdp2(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, mesh = make(), init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Sharding hooks break the graph at each block: neither timestep nor grid is in the blocks' graphs.
    loss_of(compiled(model, CONSTANT), batch).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


KINDS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {"ddp": _ddp, "fsdp2": _fsdp2}


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs().items()}
        for kind, train in KINDS.items():
            grads = train(half)
            if rank == 0:
                torch.save(grads, Path(folder) / f"{kind}.pt")
        dist.barrier()  # gloo may abort a process that leaves while another still talks to it
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gradients of each kind; the processes, whose imports take most of the time, start once."""
    folder = tmp_path_factory.mktemp("ranks")
    start: Callable[..., Any] = mp.spawn
    start(_rank, args=(_port(), str(folder)), nprocs=2, join=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind: str, alone: dict[str, Tensor], two_processes: Path) -> None:
    if kind == "fsdp2":
        model = make()
        alone = gradients(model, compiled(model, CONSTANT), inputs())
    # Sums in another order make a few FP8 weights round the other way.
    close(torch.load(two_processes / f"{kind}.pt"), alone, 1e-3 if kind == "fsdp2" else 1e-4)
