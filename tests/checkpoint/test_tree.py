"""Values as JSON and tensors: types and bits come back, code never does."""

import collections
import dataclasses
import datetime as dt
import enum
import json
import math
import pathlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from tritonspeed.checkpoint.tree import MOST_LEVELS, TORCH_DTYPES, decode, encode
from tritonspeed.offload.page_file import DTYPES


def again(value):
    content, tensors = encode(value, "state")
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    text.encode()  # nothing that UTF-8 cannot hold
    assert all(t.dtype in DTYPES and t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())
    return decode(json.loads(text), tensors)


def same(a, b):
    """Type for type and bit for bit; equality takes 1, 1.0 and True for the same, and no NaN for itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        is_same = a.dtype == b.dtype and a.shape == b.shape
        return is_same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)  # in order, too
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, set | frozenset):
        return sorted(map(typed, a)) == sorted(map(typed, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def typed(value):
    inner = sorted(map(typed, value)) if isinstance(value, frozenset) else value
    return f"{type(value).__name__} {list(map(typed, inner)) if isinstance(value, tuple | frozenset) else inner!r}"


NUMBERS = st.sampled_from(
    ["?", "i1", "u1", "<i2", ">u2", "<u4", "<i8", "<u8", "<f2", "<f4", ">f4", "<f8", "<c8", "<c16"]
)
FLOATS = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", struct.pack(">Q", bits))[0])
TEXTS = st.text(st.characters()) | st.text(st.characters(categories=["Cs"]), min_size=1) | st.just("$tuple")
SIMPLE = st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | FLOATS | TEXTS | st.binary()
HASHABLE = st.recursive(SIMPLE, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TENSORS = st.builds(
    lambda dtype, shape: (
        torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        .mul(173 if dtype is not torch.bool else 1)
        .view(dtype)
        .reshape(shape)
    ),
    st.sampled_from(
        [
            torch.bool,
            torch.bfloat16,
            torch.float16,
            torch.float32,
            torch.float64,
            torch.int64,
            torch.uint8,
            torch.uint16,
            torch.uint64,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.float8_e5m2fnuz,
        ]
    ),
    SHAPES,
)
ARRAYS = NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
OTHERS = (
    TENSORS
    | ARRAYS
    | NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, ())).map(lambda x: x[()])
    | st.sampled_from(sorted(TORCH_DTYPES.values(), key=str))
    | st.sampled_from(["cpu", "cuda", "cuda:7", "meta"]).map(torch.device)
    | st.datetimes(timezones=st.none() | st.just(dt.timezone.utc) | st.just(dt.timezone(dt.timedelta(minutes=-210))))
    | st.dates()
    | st.timedeltas()
    | st.text(st.characters(exclude_characters="\0/")).map(pathlib.Path)
    | st.text().map(pathlib.PureWindowsPath)
    | st.lists(st.integers(0, 9)).map(torch.Size)
)
VALUES = st.recursive(
    HASHABLE | OTHERS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXTS, inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=4).map(collections.OrderedDict)
        | st.sets(HASHABLE, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(VALUES)
@example(-0.0)
@example({"$tuple": [1]})
@example({"a": {"b": torch.ones(1)}, "a']['b": torch.zeros(1)})
@example(2**5000)
@example(dt.datetime(2020, 1, 1, 2, 30, fold=1))
@example(collections.Counter({30: 1, 60: 2}))
@example({1, 1.5, "1"})
def test_a_value_comes_back_as_it_was(value):
    assert same(again(value), value)


def test_plain_values_stay_readable():
    value = {"epoch": 3, "best": {"loss": 0.25, "tag": "global_step7"}, "seen": [1, None, True]}
    assert encode(value, "client_state") == (value, {})


def test_tensors_are_copies_under_the_path_that_leads_to_them():
    x = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    content, tensors = encode({"a": [x.t(), x]}, "client_state")
    with torch.no_grad():
        x.zero_()
    assert list(tensors) == ["client_state['a'][0]", "client_state['a'][1]"]
    first, second = decode(content, tensors)["a"]
    assert torch.equal(first, torch.arange(6.0).reshape(2, 3).t()) and torch.equal(second, first.t())
    assert type(second) is torch.Tensor and not second.requires_grad
    assert tensors["client_state['a'][0]"].untyped_storage().nbytes() == 24


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Settings:
    x: int = 1


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"callbacks": [0, 1, len]}, r"client_state\['callbacks'\]\[2\] is a builtin_function_or_method: a checkpoint"),
        ({"callbacks": (lambda: 0,)}, r"client_state\['callbacks'\]\[0\] is a function: "),
        (Colour.RED, "client_state is a Colour: keep its .value"),
        (Settings(), r"is a Settings: keep dataclasses.asdict\(\)"),
        (Settings, "is a type: "),
        (Point(1, 2), r"is a Point: keep its ._asdict\(\)"),
        ([1j], r"client_state\[0\] is a complex: keep \[x.real, x.imag\]"),
        (collections.defaultdict(list), r"keep dict\(\) of it"),
        (type("Text", (str,), {})("a"), "is a Text: keep the plain str"),
        (torch.Generator(), "keep its .get_state"),
        (nn.Linear(1, 1), "keep its .state_dict"),
        (torch.ones(2).to_sparse(), "is a sparse_coo tensor: keep a dense one"),
        (torch.ones(2, device="meta"), "is a meta tensor"),
        (np.array([object()]), r"array of object: keep numbers .* or x.tolist\(\)"),
        (np.array(["a"]), "array of <U1"),
        (np.longdouble(1), "is a longdouble"),
        ({Colour.RED: 1}, "key or member .* a Colour"),
        ({torch.ones(1)}, "key or member .* a Tensor"),
        ({(1, (len,)): 1}, "is a builtin_function"),
    ],
)
def test_what_is_no_data_is_refused_by_path_with_a_remedy(value, says):
    with pytest.raises(ValueError, match=says):
        encode(value, "client_state")


def test_a_value_that_contains_itself_is_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match=f"deeper than {MOST_LEVELS} levels, or contains itself"):
        encode(endless, "client_state")


def deep(levels):
    return [deep(levels - 1)] if levels else []


@pytest.mark.parametrize(
    "content",
    [
        {"$eval": "1"},
        {"$": 1},
        {"$tuple": [], "other": 1},
        {"$tuple": 3},
        {"a": [{"$tuple": {"b": 1}}]},
        {"$dict": [1, 2]},
        {"$dict": [[1, 2, 3]]},
        {"$dict": [[1, 2], [True, 3]]},
        {"$dict": [[[], 2]]},
        {"$dict": {"a": 1}},
        {"$set": [1, 1]},
        {"$set": [[]]},
        {"$tensor": "absent"},
        {"$tensor": ["x", "float32", [3]]},
        {"$tensor": ["x", "float32", [-1]]},
        {"$tensor": ["x", "float32", [1.0]]},
        {"$tensor": ["x", "load", [1]]},
        {"$tensor": []},
        {"$tensor": None},
        {"$array": ["x", "|O8", [1]]},
        {"$array": ["x", "<M8", [1]]},
        {"$array": ["x", "<f3", [1]]},
        {"$array": ["x", "<f16", [1]]},
        {"$array": ["x", "<f4", [2**70]]},
        {"$array": ["x", "<f4", [-1]]},
        {"$array": 7},
        {"$number": ["<f4", "00"]},
        {"$number": ["<f4", "zz"]},
        {"$number": ["<f4", ""]},
        {"$dtype": "load"},
        {"$dtype": ["float32"]},
        {"$device": "cuda:-1"},
        {"$device": "nothing"},
        {"$device": 3},
        {"$date": "x"},
        {"$datetime": ["2020-01-01", 2]},
        {"$timedelta": [10**18, 0, 0]},
        {"$timedelta": [1.5]},
        {"$bytes": "*"},
        {"$bytes": 3},
        {"$int": "x"},
        {"$int": 3},
        {"$float": "nan"},
        {"$float": 1.0},
        {"$str": "0"},
        {"$path": "a\0b", "$str": "a"},
        {"$path": 3},
        {"$path": {"$dict": []}},
        {"$size": [1.5]},
        {"$size": [-(2**70)]},
        deep(MOST_LEVELS + 1),
    ],
)
def test_what_encode_does_not_write_is_an_error_that_says_where(content):
    with pytest.raises(ValueError, match="^state"):
        decode(content, {"x": torch.zeros(4, dtype=torch.uint8)})


def test_nesting_up_to_the_bound_is_fine():
    assert again(deep(MOST_LEVELS)) == deep(MOST_LEVELS)


TAGS = [
    "$str",
    "$int",
    "$float",
    "$bytes",
    "$date",
    "$datetime",
    "$timedelta",
    "$number",
    "$dtype",
    "$device",
    "$path",
    "$posixpath",
    "$windowspath",
    "$tuple",
    "$size",
    "$set",
    "$frozenset",
    "$dict",
    "$ordereddict",
    "$counter",
    "$tensor",
    "$array",
    "$x",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.just("x"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(TAGS),
            inner,
            min_size=1,
            max_size=1,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=600, deadline=None)
@given(JSON)
def test_any_json_is_a_value_or_a_value_error(content):
    try:
        decode(content, {"x": torch.zeros(4, dtype=torch.uint8)})
    except ValueError as error:
        assert str(error).startswith("state")
