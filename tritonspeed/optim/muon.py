"""Muon as a ``torch.optim.Optimizer``: matrices by orthogonalised momentum, everything else by AdamW.

A group with ``use_muon`` holds matrices, with one state, ``momentum_buffer``; the others are AdamW's, with ``exp_avg``
and ``exp_avg_sq``. The rest is in ``elementwise.py``. What needs whole matrices stands between two elementwise halves:

    ``direct_flat_``     momentum of a flat chunk, and the direction that is to be orthogonalised
    ``orthogonalise_``   whole matrices
    ``step_matrix_``     decay and step of a piece of one matrix

Source   Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the maths stands in
         ``kernels/muon.py`` and ``kernels/newton_schulz.py``
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritonspeed.kernels import adamw_, newton_schulz
from tritonspeed.kernels.muon import muon_direction_, muon_step_
from tritonspeed.kernels.newton_schulz import COEFFICIENTS
from tritonspeed.optim.elementwise import ElementwiseOptimizer, Pass

NS_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPED_BY = ("original", "match_rms_adamw")
BATCH_ELEMS = 64 * 2**20  # of one batch of matrices of one shape: their five padded buffers stay below a GiB
NOT_HIDDEN = ("embed", "lm_head")  # in the name of a matrix that is a table, not a map: as DeepSpeed has it


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon takes this parameter if nobody says: its own ``use_muon``, else a matrix that is no embedding."""
    own = getattr(param, "use_muon", None)
    return bool(own) if own is not None else param.ndim == 2 and not any(part in name.lower() for part in NOT_HIDDEN)


def hidden_matrices(model: nn.Module) -> dict[int, bool]:
    """id of each parameter → whether Muon takes it; a table under one of its names or modules is one under all."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    hidden: dict[int, bool] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        is_hidden = is_hidden_matrix(name, param) and (hasattr(param, "use_muon") or id(param) not in tables)
        hidden[id(param)] = hidden.get(id(param), True) and is_hidden
    return hidden


def mark_hidden_matrices(model: nn.Module) -> None:
    """Set ``use_muon`` on every parameter that has none, by ``hidden_matrices``: an optimizer sees no names."""
    hidden = hidden_matrices(model)
    for param in model.parameters():
        param.use_muon = hidden[id(param)]  # type: ignore[attr-defined]


class Muon(ElementwiseOptimizer):
    """Muon with AdamW beside it; a drop-in for ``torch.optim.Muon``, and for DeepSpeed's.

    A group of parameters may say ``use_muon``, and then is one or the other. Any other is split: a parameter's own
    attribute ``use_muon`` decides, and without one, whether it has two dimensions. Embeddings and heads are matrices,
    but not for Muon: mark them, or use ``mark_hidden_matrices(model)``, which ``initialize`` does.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, weight_decay: of both kinds.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in ``torch.optim.Muon``.
        muon_lr, adam_lr: learning rate of one kind, instead of lr.
        betas, adam_eps: of AdamW.
        ns_dtype: "bf16", "fp16" or "fp32": what matrices are orthogonalised in.

    Raises:
        ValueError: a coefficient out of range, a parameter of another type, or ``use_muon`` for what is no matrix.

    Example:
        >>> ts.optim.mark_hidden_matrices(model)
        >>> optimizer = Muon(model.parameters(), muon_lr=0.02, adam_lr=3e-4)
    """

    NOT_NEGATIVE = ("lr", "weight_decay", "eps", "adam_eps")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-10,
        ns_dtype: str = "bf16",
    ) -> None:
        self._lr_of = {True: muon_lr, False: adam_lr}
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "betas": betas,
                "adam_eps": adam_eps,
                "ns_dtype": ns_dtype,
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lr_of = {True: None, False: None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split in two where it has both kinds; each of its values overrides the constructor's.

        Raises:
            ValueError: a coefficient out of range, a parameter of another type, ``use_muon`` for what is no matrix.
        """
        given = dict(param_group)
        params = [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
        wanted = given.pop("use_muon", None)
        rates = {True: given.pop("muon_lr", None), False: given.pop("adam_lr", None)}
        for use_muon in (True, False):
            chosen = [p for p in params if (is_hidden_matrix("", p) if wanted is None else wanted) == use_muon]
            if not chosen and (params or use_muon):
                continue
            rate = rates[use_muon] if rates[use_muon] is not None else given.get("lr", self._lr_of[use_muon])
            rate = self.defaults["lr"] if rate is None else rate
            super().add_param_group({**given, "params": chosen, "lr": rate, "use_muon": use_muon})
            self._check(self.param_groups[-1])

    def _check(self, group: dict[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"Muon: momentum is {group['momentum']}, must be in [0, 1)")
        if group["adjust_lr_fn"] not in (None, *SHAPED_BY):
            raise ValueError(f"Muon: adjust_lr_fn is {group['adjust_lr_fn']!r}, must be one of {', '.join(SHAPED_BY)}")
        if group["ns_dtype"] not in NS_DTYPES:
            raise ValueError(f"Muon: ns_dtype is {group['ns_dtype']!r}, must be one of {', '.join(NS_DTYPES)}")
        if group["ns_dtype"] != self.defaults["ns_dtype"]:
            raise ValueError(
                f"Muon: ns_dtype is {group['ns_dtype']!r} in a group and {self.defaults['ns_dtype']!r} in the"
                " constructor, must be one for all: set it there alone"
            )
        for param in group["params"] if group["use_muon"] else ():
            if param.ndim != 2:
                raise ValueError(
                    f"Muon: a parameter of shape {tuple(param.shape)} is no matrix: set use_muon to False on it, and"
                    " AdamW will take it"
                )

    def uses_muon(self, param: Tensor) -> bool:
        """Whether this tensor's group is one of matrices."""
        return self.param_groups[self._place_of(param)[0]]["use_muon"]

    @property
    def ns_dtype(self) -> torch.dtype:
        """What directions are kept and orthogonalised in."""
        return NS_DTYPES[self.defaults["ns_dtype"]]

    @torch.no_grad()
    def direct_flat_(self, param: Tensor, grad: Tensor, grad_scale: Tensor | None, out: Tensor) -> None:
        """The first half: momentum of one flat fp32 master, (n,), and its direction into ``out``, (n,)."""
        group, state = self.param_groups[self._place_of(param)[0]], self.state_of(param)
        state["step"] += 1
        muon_direction_(
            state["momentum_buffer"].view(-1), grad, out, beta=group["momentum"], nesterov=group["nesterov"],
            grad_scale=grad_scale,
        )  # fmt: skip

    @torch.no_grad()
    def orthogonalise_(self, group: dict[str, Any], matrices: Sequence[Tensor]) -> None:
        """Whole matrices, in place, with the settings of a group; those of one shape go together."""
        for batch in batches_of([tuple(matrix.shape) for matrix in matrices]):
            together = torch.stack([matrices[i] for i in batch])
            done = newton_schulz(together, group["ns_steps"], group["ns_coefficients"], group["eps"])
            for i, matrix in zip(batch, done, strict=True):
                matrices[i].copy_(matrix)

    @torch.no_grad()
    def step_matrix_(
        self, param: Tensor, piece: slice, update: Tensor, shape: tuple[int, ...], param_out: Tensor | None
    ) -> None:
        """The second half: elements ``piece`` of a flat master, which belong to a matrix of ``shape``.

        Args:
            update: (n,): these elements of the orthogonalised matrix.
            param_out: (n,), receives the rounded weights.
        """
        group = self.param_groups[self._place_of(param)[0]]
        self._step_flat_(group, param[piece], update, shape, param_out)

    def _step_flat_(
        self, group: dict[str, Any], master: Tensor, update: Tensor, shape: tuple[int, ...], param_out: Tensor | None
    ) -> None:
        lr = float(group["lr"])
        step_size = lr * shape_factor(shape, group["adjust_lr_fn"])
        muon_step_(master, update, decay=lr * group["weight_decay"], step_size=step_size, param_out=param_out)

    def _new_state(self, group: dict[str, Any], param: Tensor, first_element: int = 0) -> dict[str, Tensor]:
        names = ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros(param.shape, dtype=torch.float32, device=param.device) for name in names}

    def _step_params_(self) -> None:
        for group in self.param_groups:
            stepped = [param for param in group["params"] if param.grad is not None]
            if not group["use_muon"]:
                for param in stepped:
                    self._step_param_(param, param.grad)
                continue
            for batch in batches_of([tuple(param.shape) for param in stepped]):
                self._step_matrices_(group, [stepped[i] for i in batch])

    def _step_matrices_(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One unsharded step of matrices of one shape."""
        shape = params[0].shape
        directions = torch.empty(len(params), *shape, dtype=self.ns_dtype, device=params[0].device)
        for param, direction in zip(params, directions, strict=True):
            grad = param.grad
            assert grad is not None, "only parameters with gradients are stepped"
            self._check_dense(param, grad)
            self.direct_flat_(param, grad.contiguous().view(-1), None, direction.view(-1))
        self.orthogonalise_(group, list(directions))
        for param, update in zip(params, directions, strict=True):
            flat, state = param.detach().reshape(-1), self.state[param]
            master = state["master"].view(-1) if "master" in state else flat
            out = flat if "master" in state else None
            self._step_flat_(group, master, update.view(-1), tuple(shape), out)
            if not param.is_contiguous():
                param.copy_(flat.view(shape))

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        adamw_(
            at.master,
            at.flat("exp_avg"),
            at.flat("exp_avg_sq"),
            at.grad,
            step=at.step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["adam_eps"],
            weight_decay=group["weight_decay"],
            grad_scale=at.grad_scale,
            param_out=at.param_out,
        )


def shape_factor(shape: tuple[int, ...], adjust_lr_fn: str | None) -> float:
    """What the learning rate of a matrix is multiplied with: its update's size goes with its sides."""
    rows, cols = shape
    return 0.2 * math.sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1.0, rows / cols))


def batches_of(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Places of equal shapes, in batches of ``BATCH_ELEMS`` at most, or of one."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    found = []
    for shape, places in by_shape.items():
        size = max(1, BATCH_ELEMS // max(1, math.prod(shape)))
        found += [places[at : at + size] for at in range(0, len(places), size)]
    return found
