"""Operations counted against closed forms: a Llama's products and attention, recomputation, opaque operations."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tritonspeed.kernels import linear_cross_entropy
from tritonspeed.profiling.flops_count import ModuleWatch

ROWS, LENGTH, VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 2, 16, 64, 32, 64, 2, 4
TOKENS = ROWS * LENGTH


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **changes))


def run(model, loss_of):
    watch = ModuleWatch(model)
    with watch.count():
        loss_of().backward()
    watch.remove()
    return watch


def matrices(model):
    """Elements that every token is multiplied with: all linear layers, the head too."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


DEEPSPEEDS_MACS = 786_432  # get_model_profile of DeepSpeed 0.19.8, of this Llama, either attention
ATTENTION = LAYERS * 2 * 2 * ROWS * LENGTH**2 * WIDTH  # scores, and what they weigh


@pytest.mark.parametrize(("how", "backward_products"), [("eager", 4), ("sdpa", 5)])
@pytest.mark.parametrize("recompute", [False, "plain", "reentrant"])
def test_a_llama_costs_6_n_tokens_and_its_attention(how, backward_products, recompute):
    model = llama(attn_implementation=how)
    if recompute:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
        if recompute == "reentrant":
            model.enable_input_require_grads()
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    counts = run(model, lambda: model(input_ids=tokens, labels=tokens).loss).counts
    linear = 2 * matrices(model) * TOKENS
    assert counts.num_forward == linear + ATTENTION == 2 * DEEPSPEEDS_MACS
    assert counts.num_backward == 2 * linear + ATTENTION * backward_products // 2
    blocks = linear - 2 * model.lm_head.weight.numel() * TOKENS + ATTENTION
    last = blocks if recompute else 0  # the head and what is around the blocks run once
    if recompute == "plain":  # which stops when the last tensor that is wanted has come: before down_proj's product
        last -= LAYERS * 2 * WIDTH * INNER * TOKENS
    assert counts.num_recompute == last
    assert not counts.opaque


def test_each_operation_belongs_to_the_module_that_ran_it():
    model = llama(attn_implementation="eager")
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    counts = run(model, lambda: model(input_ids=tokens, labels=tokens).loss).counts
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            cost = 2 * module.weight.numel() * TOKENS
            assert counts.forward[name] == cost, name
            assert counts.backward[name] == 2 * cost, name
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        assert counts.forward[name] == ATTENTION // LAYERS and counts.backward[name] == 2 * ATTENTION // LAYERS
    assert not counts.backward[""]


def test_a_frozen_layer_has_no_weight_gradient():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model[1].requires_grad_(False)
    counts = run(model, lambda: model(torch.randn(5, 4)).sum()).counts
    assert counts.backward == {"0": 2 * 4 * 8 * 5, "1": 2 * 8 * 3 * 5}  # the weight's alone; the input's alone


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 4))

    def forward(self, x, target):
        return linear_cross_entropy(x, self.weight, target)


def test_our_opaque_operations_are_counted():
    model, x = Fused(), torch.randn(5, 4, requires_grad=True)
    counts = run(model, lambda: model(x, torch.randint(7, (5,)))).counts
    assert counts.forward == {"": 3 * 2 * 5 * 4 * 7}  # its gradients are made in its forward
    assert not counts.num_backward and not counts.opaque


def test_quantised_products_are_counted():
    from tritonspeed.profiling.flops_formulas import flops_of

    ops, x = torch.ops.tritonspeed, torch.randn(5, 64)
    codes, scales = torch.zeros(7, 64, dtype=torch.int8), torch.ones(7)
    packed = torch.zeros(7, 32, dtype=torch.uint8)
    cost = 2 * 5 * 64 * 7
    assert flops_of(ops.matmul_w8a16, (x, codes, scales, None), {}, None) == cost
    assert flops_of(ops.matmul_w4a16, (x, packed, scales, None, None), {}, None) == cost
    rows = torch.ones(5)
    assert flops_of(ops.matmul_w8a8, (codes[:5], rows, codes, scales, None, torch.float32), {}, None) == cost


def test_what_cannot_be_counted_is_named():
    library = torch.library.Library("somebody", "FRAGMENT")
    library.define("attention(Tensor x) -> Tensor")
    library.impl("attention", lambda x: x.clone(), "CPU")

    class Model(nn.Module):
        def forward(self, x):
            return torch.ops.somebody.attention(x)

    watch = ModuleWatch(Model())
    model = Model()
    with watch.count():
        model(torch.randn(3))
    assert watch.counts.opaque == {"somebody::attention"}


def test_flexible_attention_is_one_operation():
    from torch.nn.attention.flex_attention import flex_attention

    class Model(nn.Module):
        def forward(self, q):
            return flex_attention(q, q, q)

    model = Model()
    watch = ModuleWatch(model)
    with warnings.catch_warnings(), torch.no_grad(), watch.count():
        warnings.simplefilter("ignore")  # that it is slow where it is not compiled
        model(torch.randn(2, 3, 16, 8))
    assert watch.counts.forward == {"": 4 * 2 * 3 * 16 * 16 * 8} and not watch.counts.opaque


def test_what_is_compiled_is_counted_uncompiled():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    counts = run(compiled, lambda: compiled(torch.randn(5, 4)).sum()).counts
    assert counts.num_forward == 2 * 5 * (32 + 24) and not counts.opaque


def test_nested_tensors_and_fused_networks_are_named_as_not_counted():
    linear, lstm = nn.Linear(4, 8), nn.LSTM(3, 5)
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    assert run(linear, lambda: linear(nested).values().sum()).counts.opaque == {"aten::linear"}
    watch = ModuleWatch(lstm)
    with watch.count():
        lstm(torch.randn(7, 2, 3))
    assert watch.counts.opaque == {"aten::mkldnn_rnn_layer"} or watch.counts.num_forward, "where there is no mkldnn"


def test_inference_mode_and_convolutions_count_as_well():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 6 * 6, 2))
    watch = ModuleWatch(model)
    with torch.inference_mode(), watch.count():
        model(torch.randn(1, 3, 8, 8))
    assert watch.counts.forward == {"0": 2 * 36 * 5 * 27, "2": 2 * 180 * 2}


def test_a_module_that_raises_is_left():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("x")

    model = nn.Sequential(nn.Linear(2, 2), Raises())
    watch = ModuleWatch(model)
    with watch.count():
        with pytest.raises(KeyError):
            model(torch.randn(1, 2))
        F.linear(torch.ones(1, 2), torch.ones(3, 2))
    assert watch.counts.forward == {"0": 8, "": 12}
    assert set(watch.seconds()) == {"", "0", "1"}


def test_nothing_changes_by_being_counted():
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    gradients = []
    for counted in (False, True):
        model = llama(attn_implementation="sdpa", attention_dropout=0.1).train()

        def loss_of(model=model):
            hidden = checkpoint(model.model.embed_tokens, tokens, use_reentrant=False)
            return model(inputs_embeds=hidden, labels=tokens).loss

        torch.manual_seed(1)
        run(model, loss_of) if counted else loss_of().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
