"""Models and memories for other programs: llama.cpp, Ollama, MLX, servers of adapters, the hub.

The names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_cl.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_cl.export.adapters import write_adapters
    from lightning_cl.export.callback import Export
    from lightning_cl.export.gguf import export_gguf
    from lightning_cl.export.handover import export_model
    from lightning_cl.export.memory import save_memory
    from lightning_cl.export.mlx import export_mlx
    from lightning_cl.export.modelfile import write_modelfile
    from lightning_cl.export.push import push_folder

_HOME = {
    "Export": "callback",
    "export_gguf": "gguf",
    "export_mlx": "mlx",
    "export_model": "handover",
    "push_folder": "push",
    "save_memory": "memory",
    "write_adapters": "adapters",
    "write_modelfile": "modelfile",
}

__all__ = [
    "Export",
    "export_gguf",
    "export_mlx",
    "export_model",
    "push_folder",
    "save_memory",
    "write_adapters",
    "write_modelfile",
]


__getattr__ = lazy_names(__name__, _HOME)
