"""`unisd doctor`: what is installed, what can run here and why, and whether its numbers are right."""

from __future__ import annotations

import platform
import time
from importlib import metadata

import torch

import unisd_kernels
from unisd.cli.device import choose_device
from unisd.cli.parser import CommandParser
from unisd_kernels import LMHead, available, explain, unisd_loss
from unisd_kernels.backends import engine, extension

_PACKAGES = (
    "unisd-kernels",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "liger-kernel",
)
# Of a float32 loss and its gradient against float64, relative to the largest entry.
_TOLERANCE = 1e-4


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="unisd doctor", description=__doc__)
    parser.add_argument("--device", default="auto", help="device to check; auto: CUDA if there is one, else the CPU")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)

    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        print(f"  {name:<14} {_version(name)}")
    print("\ndevices:")
    print(f"  cpu            {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index}         {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        print(f"  cuda           none (torch was built {built})")
    print("\ncompiled libraries:")
    reason = extension.cpu_unavailable()
    print("  cpu            " + (f"not loaded: {reason}" if reason else f"loaded, runs with {extension.cpu_isa()}"))
    reason = extension.cuda_unavailable()
    print("  cuda           " + (f"not loaded: {reason}" if reason else "loaded"))
    print("\n" + explain(device))
    held, with_weight = (engine.default_workspace_bytes(device, trainable) >> 20 for trainable in (False, True))
    print(f"logits held at a time: {held} MiB, {with_weight} MiB with a trainable head (`workspace_bytes` changes it)")

    print(f"\nself-test on {device}: UniSD* loss and gradient, float32 against the float64 reference")
    failed = False
    for name, usable in available(device).items():
        if not usable:
            print(f"  {name:<15} skipped (unavailable, see above)")
            continue
        if name.startswith("triton") and device.type == "cpu":
            print(f"  {name:<15} skipped (takes minutes under the interpreter; the test suite does it)")
            continue
        start = time.perf_counter()
        error = self_test(name, device)
        first = time.perf_counter() - start
        verdict = "ok" if error <= _TOLERANCE else f"WRONG, more than {_TOLERANCE:g}"
        failed |= not error <= _TOLERANCE
        print(f"  {name:<15} largest relative error {error:.1e}: {verdict}{_compile_time(name, device, first)}")
    print("\nall well" if not failed else "\nthe self-test failed: do not train with this installation")
    return int(failed)


def self_test(impl: str, device: torch.device) -> float:
    """Largest relative error of loss and gradient over three divergences."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, hidden = normal(503, 32) / 2, normal(24, 32)
    views = [hidden + normal(24, 32) * 0.3 for _ in range(5)]
    target_ids = torch.randint(0, 503, (24,), generator=generator)
    worst = 0.0
    for beta in (0.0, 0.5, 1.0):
        results = []
        for dtype, name in ((torch.float64, "reference"), (torch.float32, impl)):
            student = hidden.to(device, dtype).requires_grad_()
            teacher, negative, *auxiliary = (view.to(device, dtype) for view in views)
            result = unisd_loss(
                student,
                LMHead(weight.to(device, dtype)),
                teacher,
                LMHead(weight.to(device, dtype)),
                target_ids.to(device),
                torch.tensor([0, 10, 24], device=device),
                auxiliary_hidden=auxiliary,
                negative_hidden=negative,
                feature_weight=0.1,
                beta=beta,
                impl=name,
            )
            (gradient,) = torch.autograd.grad(result.loss, student)
            results.append((result.loss.detach().double(), gradient.double()))
        for exact, ours in zip(*results, strict=True):
            worst = max(worst, float((ours - exact).abs().max() / exact.abs().max()))
    return worst


def _compile_time(impl: str, device: torch.device, first: float) -> str:
    """Time of compiling kernels when they are used: by how much their first call took longer than the second."""
    if not impl.startswith("triton"):
        return ""
    from triton import knobs

    start = time.perf_counter()
    self_test(impl, device)
    again = time.perf_counter() - start
    return f"; first call {first:.1f} s with compiling, then {again:.2f} s (compiled code is kept in {knobs.cache.dir})"


def _version(name: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    if name == "unisd-kernels" and version != unisd_kernels.__version__:
        return f"{version} (but the code imported is {unisd_kernels.__version__})"
    return version
