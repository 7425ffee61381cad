"""GPU kernels of ``fps::attention``: rendering, device tables, offline compilation, configs and their ranking.

``render`` turns a :class:`~fpscompile.kernel_spec.KernelSpec` and a :class:`~fpscompile.gpu.config.KernelConfig` into
a Triton source file and imports it, ``call`` finds the spec of a call, ``tables`` and ``operands`` prepare what its
kernels read, ``interpreter`` repairs Triton's interpreter so that the same kernels give right numbers on a CPU,
``compilation`` compiles them for a target that need not be present, ``binary`` counts what came out, and ``cost_model``
ranks configs from those counts. Nothing here imports Triton before it is used: the package can be imported where Triton
is not installed.
"""
