"""What a model is to an estimate: names and shapes of its tensors, and a stand-in on the meta device made of them.

    ModelShape.of(module)                     a torch module, on any device
    ModelShape.of("meta-llama/config.json")   a Hugging Face config: a file, the folder of it, a dict, a config object
    ModelShape.of("checkpoint/")              a folder of safetensors (or one file): headers only are read
    ModelShape.of("llama70b")                 a model of ``tritonspeed.tuning.MODELS``
    ModelShape.of("params=7e9")               only a count: a plausible transformer, and ``assumed`` says which

Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from tritonspeed.estimation.families import Sizes, Tensors, tensors_of
from tritonspeed.tuning.shapes import MODELS
from tritonspeed.zero.plan import LeafRules, repeated_blocks

MAX_HEADER_BYTES = 100 * 2**20  # the format's own bound
WIDTH_PER_LAYER = 128  # GPT-3 175B: 12288 / 96; Llama 7B: 4096 / 32; 70B: 8192 / 80
VOCABULARY = 32_000
MIN_PARAMS = 10_000


@dataclass(frozen=True)
class ModelShape:
    """A model without its numbers.

    Attributes:
        name: for tables.
        tensors: name → shape, a tied one once.
        tied: name → the tensor that it is.
        sizes: of the transformer; None where only tensors are known: activations are then not estimated.
        assumed: what was assumed of it, in words; empty where nothing was.
        module: the module that it was taken from, or its stand-in, if there is one.
        num_trainable: elements with a gradient.
    """

    name: str
    tensors: Tensors = field(repr=False)
    tied: dict[str, str] = field(default_factory=dict, repr=False)
    sizes: Sizes | None = None
    assumed: str = ""
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    num_trainable: int = -1

    def __post_init__(self) -> None:
        if self.num_trainable < 0:
            object.__setattr__(self, "num_trainable", self.num_params)

    @classmethod
    def of(cls, source: Any) -> ModelShape:
        """The shape of a model; the module's docstring lists what ``source`` may be.

        Raises:
            ValueError: there is no such file, or it does not describe a model.
        """
        if isinstance(source, ModelShape):
            return source
        if isinstance(source, nn.Module):
            return cls._of_module(source)
        if isinstance(source, Mapping):
            return cls._of_config(source, str(source.get("model_type") or "a config"))
        if hasattr(source, "to_dict"):
            return cls._of_config(source.to_dict(), type(source).__name__)
        text = str(source)
        if text.startswith("params="):
            return cls.of_count(_count(text.removeprefix("params=")))
        if text in MODELS:
            return cls._of_config(_as_config(text), text)
        return cls._of_path(Path(text))

    @classmethod
    def of_count(cls, num_params: float) -> ModelShape:
        """A plausible decoder of about ``num_params`` parameters (within 1 %), and what was assumed of it.

        Blocks as Llama's, hidden = 128 × layers, so that 12 · layers · hidden² is near the count; the inner width takes
        up the difference.

        Raises:
            ValueError: fewer than 10,000 parameters.
        """
        if not MIN_PARAMS <= num_params < float("inf"):
            raise ValueError(f"params={num_params:g}: a transformer has at least {MIN_PARAMS:,} parameters")
        layers = max(1, round((num_params / (12 * WIDTH_PER_LAYER**2)) ** (1 / 3)))
        hidden = max(16, round((num_params / (12 * layers)) ** 0.5 / 16) * 16)
        hidden = round(hidden / WIDTH_PER_LAYER) * WIDTH_PER_LAYER if hidden > 4 * WIDTH_PER_LAYER else hidden
        vocab = min(VOCABULARY, max(16, int(num_params / (6 * hidden))))
        others = 2 * vocab * hidden + layers * (4 * hidden**2 + 2 * hidden) + hidden
        per_width = 3 * hidden * layers
        multiple = 16 if hidden > 4 * WIDTH_PER_LAYER else 1
        ffn = max(1, round((num_params - others) / per_width / multiple)) * multiple
        head_dim = WIDTH_PER_LAYER if hidden % WIDTH_PER_LAYER == 0 else 16
        config = {
            "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn,
            "vocab_size": vocab, "num_attention_heads": hidden // head_dim, "head_dim": head_dim,
        }  # fmt: skip
        assumed = f"{layers} blocks like Llama's, hidden {hidden:,}, inner width {ffn:,}, vocabulary {vocab:,}"
        return cls._of_config(config, f"{num_params / 1e9:g} B parameters", assumed)

    @classmethod
    def _of_module(cls, module: nn.Module) -> ModelShape:
        tensors = {name: tuple(p.shape) for name, p in module.named_parameters()}
        config = getattr(module, "config", None)
        sizes = _sizes_or_none(config.to_dict() if hasattr(config, "to_dict") else None)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return cls(type(module).__name__, tensors, {}, sizes, module=module, num_trainable=trainable)

    @classmethod
    def _of_config(cls, config: Mapping[str, Any], name: str, assumed: str = "") -> ModelShape:
        sizes, tensors, tied = tensors_of(config)
        return cls(name, tensors, tied, sizes, assumed or sizes.assumed)

    @classmethod
    def _of_path(cls, path: Path) -> ModelShape:
        folder = path if path.is_dir() else path.parent
        name = folder.resolve().name if path.is_dir() or path.name == "config.json" else path.stem
        files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors")) if path.is_dir() else []
        file = folder / "config.json" if files or path.is_dir() else path
        config = _read_json(file) if file.is_file() else None
        if files:
            tensors = {k: v for each in files for k, v in _header(each).items()}
            return cls(name, tensors, {}, _sizes_or_none(config))
        if config is None:
            known = ", ".join(MODELS)
            raise ValueError(
                f"model {str(path)!r} is no file, no folder with config.json or safetensors, and no known model"
                f" ({known}): name one, or a size, params=7e9"
            )
        return cls._of_config(config, name)

    @property
    def num_params(self) -> int:
        """Elements in all, tied ones once."""
        return sum(prod(shape) for shape in self.tensors.values())

    @property
    def num_active_params(self) -> int:
        """Elements that one token meets: of routed experts only those that it is sent to."""
        if self.sizes is None or not self.sizes.experts:
            return self.num_params
        routed = sum(prod(shape) for name, shape in self.tensors.items() if ".experts." in name)
        return self.num_params - routed + routed * self.sizes.experts_used // self.sizes.experts

    def build(self) -> nn.Module:
        """A module of these parameters on the meta device, its repeated blocks in a ModuleList; or the module itself.

        It has shapes and names, and no ``forward``.
        """
        if self.module is not None:
            return self.module
        root = _Part()
        for name, shape in self.tensors.items():
            _place(root, name.split("."), Parameter(torch.empty(shape, device="meta")))
        for name, other in self.tied.items():
            _place(root, name.split("."), root.get_parameter(other))
        if self.sizes is not None:
            root.config = SimpleNamespace(hidden_size=self.sizes.hidden)
        return root

    def with_module(self) -> ModelShape:
        """The same, with its module at hand: building one of a hundred blocks takes a tenth of a second."""
        return self if self.module is not None else replace(self, module=self.build())

    @property
    def num_blocks(self) -> int:
        """Repeated blocks; 0 where there are none."""
        return self.sizes.layers if self.sizes is not None else len(repeated_blocks(self.build(), LeafRules()))

    def activation_bytes(self, num_tokens: int, checkpointing: bool = False, itemsize: int = 2) -> int | None:
        """About what one micro batch of ``num_tokens`` saves for backward, in bytes; None where sizes are not known.

        Per token and block, in elements: 6·hidden (inputs of two norms and of four products), 2·kv (keys, values) and
        the inner width four times where it is gated, twice else. No attention matrix: a fused attention is taken for
        granted, and a 16-bit model without dropout. With checkpointing a block leaves hidden, and one block is whole
        at a time. The head adds its logits in fp32 and their gradient, 8 bytes per token and word.

        Source   Korthikanti et al. 2022, arXiv:2205.05198, eq. 1 (34·s·b·h with dropout, without the attention
        matrix); Rajbhandari et al. 2021, arXiv:2104.07857, eq. 3 (2·bsz·seq·hidden per checkpoint)
        """
        s = self.sizes
        if s is None:
            return None
        gated = any("gate_proj" in name or "gate_up_proj" in name for name in self.tensors)
        width = s.expert_ffn * s.experts_used + s.shared_ffn if s.experts else s.ffn
        block = num_tokens * itemsize * (6 * s.hidden + 2 * s.kv_heads * s.head_dim + (4 if gated else 2) * width)
        head = 8 * num_tokens * s.vocab
        if not checkpointing:
            return s.layers * block + head
        return s.layers * num_tokens * itemsize * s.hidden + max(block, head)


class _Part(nn.Module):
    """A module of a stand-in; all are of this one class, so that a list of them is a list of blocks."""

    config: SimpleNamespace


def _place(root: nn.Module, path: list[str], parameter: Parameter) -> None:
    """Put ``parameter`` at ``path``, making the modules on the way; children with numbers stand in a ModuleList."""
    parent = root
    for i, name in enumerate(path[:-1]):
        child = parent._modules.get(name)
        if child is None:
            if path[i + 1].isdigit():
                child = nn.ModuleList()
            elif (
                i == len(path) - 2 and path[-1] == "weight" and re.search(r"emb|wte|wpe", name) and parameter.ndim == 2
            ):
                child = nn.Embedding(1, 1, _weight=torch.empty(1, 1, device="meta"))  # not initialised
            else:
                child = _Part()
            parent.add_module(name, child)
        parent = child
    parent.register_parameter(path[-1], parameter)


def _count(text: str) -> float:
    units = {"m": 1e6, "b": 1e9, "t": 1e12}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1.0)
    try:
        return float(number.replace("_", "")) * unit
    except ValueError as error:
        raise ValueError(f"params={text} is no number: write params=7e9 or params=7b") from error


def _as_config(name: str) -> dict[str, Any]:
    m = MODELS[name]
    family = "gpt2" if name == "gpt2" else "qwen3" if name.startswith("qwen") else "llama"
    return {
        "model_type": family, "hidden_size": m.hidden, "num_hidden_layers": m.layers, "intermediate_size": m.ffn,
        "vocab_size": m.vocab, "num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim, "n_positions": 1024, "tie_word_embeddings": name in ("gpt2", "qwen0.6b"),
    }  # fmt: skip


def _sizes_or_none(config: Mapping[str, Any] | None) -> Sizes | None:
    """Sizes for what is estimated besides the tensors, where the config gives them."""
    try:
        return None if config is None else Sizes.read(config)
    except ValueError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"model {path} holds a {type(found).__name__}, must be an object: a Hugging Face config.json")
    return found


def _header(path: Path) -> Tensors:
    """Names and shapes in a safetensors file, from its header alone; our fillers between pages are left out."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length:,} bytes")
            found = json.loads(file.read(length))
        return {
            name: tuple(entry["shape"])
            for name, entry in found.items()
            if name != "__metadata__" and not name.startswith("__pad__")
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
