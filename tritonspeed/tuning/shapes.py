"""The shapes of real models: what kernels are tuned and measured for, by name or from a JSON file.

    {"name": "mine", "hidden": 4096, "ffn": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128,
     "vocab": 32000, "tokens": [1, 512, 8192]}

A Hugging Face ``config.json`` is read as well.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TOKENS = (1, 16, 512, 8192)  # one sequence decoding, a batch of them, a short prompt, a training micro-batch


@dataclass(frozen=True)
class ModelShapes:
    """What a decoder's kernels see of it.

    Attributes:
        name: for tables.
        hidden: width of the residual stream.
        ffn: inner width of the feed-forward part (of each of gate and up, where it is gated).
        layers: number of blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocab: rows of the embedding.
        tokens: tokens in one call (batch × sequence) to tune for.
    """

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: tuple[int, ...] = TOKENS

    @property
    def num_block_params(self) -> int:
        """Parameters of one block with a gated feed-forward part, without norms and biases."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.ffn


_MODELS = (
    # config.json of openai-community/gpt2: n_embd, n_head, n_layer, vocab_size; the inner width is 4 · n_embd
    ModelShapes("gpt2", 768, 3072, 12, 12, 12, 64, 50257),
    # config.json of meta-llama/Llama-3.1-8B and -70B: hidden_size, intermediate_size, num_*_heads, vocab_size
    ModelShapes("llama8b", 4096, 14336, 32, 32, 8, 128, 128256),
    ModelShapes("llama70b", 8192, 28672, 80, 64, 8, 128, 128256),
    # config.json of Qwen/Qwen3-0.6B, -8B and -32B
    ModelShapes("qwen0.6b", 1024, 3072, 28, 16, 8, 128, 151936),
    ModelShapes("qwen8b", 4096, 12288, 36, 32, 8, 128, 151936),
    ModelShapes("qwen32b", 5120, 25600, 64, 64, 8, 128, 151936),
    # no model: a block that a CPU and the interpreter finish in seconds, with an odd vocabulary
    ModelShapes("tiny", 64, 160, 2, 4, 2, 16, 503, tokens=(1, 24)),
)
MODELS = {model.name: model for model in _MODELS}

_HUGGING_FACE = {  # ours → names in a config.json, the first that is there
    "hidden": ("hidden_size", "n_embd"),
    "ffn": ("intermediate_size", "n_inner"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
}


def load_shapes(name_or_path: str) -> ModelShapes:
    """A model of ``MODELS``, or a JSON file in the form above or of a Hugging Face ``config.json``.

    Raises:
        ValueError: neither a known name nor a readable file, or sizes are missing or not positive whole numbers.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"shapes {name_or_path!r} is neither a model ({', '.join(MODELS)}) nor a file: name one")
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"shapes {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"shapes {path} holds a {type(found).__name__}, must be an object of sizes")
    return _checked(path, _from_hugging_face(path, found) if "hidden" not in found else found)


def _from_hugging_face(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config)  # models of text and images keep the decoder's sizes one level down
    sizes: dict[str, Any] = {"name": path.parent.name if path.stem == "config" else path.stem}
    for ours, theirs in _HUGGING_FACE.items():
        value = next((text[key] for key in theirs if text.get(key) is not None), None)
        if value is not None:
            sizes[ours] = value
    if isinstance(sizes.get("hidden"), int):
        sizes.setdefault("ffn", 4 * sizes["hidden"])
        if isinstance(sizes.get("heads"), int) and sizes["heads"] > 0:
            sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    return sizes


def _checked(path: Path, sizes: dict[str, Any]) -> ModelShapes:
    known = [field.name for field in fields(ModelShapes)]
    unknown, missing = set(sizes) - set(known), set(known) - set(sizes) - {"name", "tokens"}
    if unknown or missing:
        raise ValueError(
            f"shapes {path}: unknown {sorted(unknown)}, missing {sorted(missing)}; known are {', '.join(known)}"
        )
    tokens = tuple(sizes.get("tokens", TOKENS))
    numbers = {name: size for name, size in sizes.items() if name not in ("name", "tokens")}
    for name, size in [*numbers.items(), *(("tokens", count) for count in tokens)]:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"shapes {path}: {name} is {size!r}, must be a whole number of at least 1")
    return ModelShapes(name=str(sizes.get("name", path.stem)), **numbers, tokens=tokens)
