"""`clha-fast env`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

from clha_fast.cli.text import Parser
from clha_fast.version import __version__

PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "datasets", "flash-attn", "matplotlib")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def env(words: Sequence[str]) -> int:
    """Prints versions, devices and the backend that would run; returns the exit status."""
    Parser(prog="clha-fast env", description="Versions, devices, backend.").parse_args(words)
    import torch

    from clha_fast.cli.devices import backend_text, device_text
    from clha_fast.models import varlen

    lines = {"clha-fast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    lines |= {name: _version(name) for name in PACKAGES}
    lines["torch"] = torch.__version__  # the build, too: a package's own version may leave out +cu130
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines["device"] = device_text(device)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        lines[f"cuda:{number}"] = f"{name}, sm_{major}{minor}, {free >> 20:,} of {total >> 20:,} MiB free"
    lines["backend"] = backend_text("auto", device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    lines["two calls"] = varlen.text(device)
    print("\n".join(f"{name:<13} {text}" for name, text in lines.items()))
    return 0
