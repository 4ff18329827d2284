"""Every way in which a config arrives, and what is refused on the way."""

import base64
import json

import pytest

from tritonspeed.config import Config, load
from tritonspeed.config.read import read

TREE = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}

COMMENTED = """
{
  // hjson: comments, unquoted keys, trailing commas
  "train_batch_size": 8,
  zero_optimization: {
    # a stage
    stage: 2,
  },
  /* and
     blocks */
}
"""


def test_path_string_text_dict_and_none(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(COMMENTED, encoding="utf-8")
    assert read(path) == read(str(path)) == read(COMMENTED) == read(TREE) == TREE
    assert read(None) == {}
    assert load(None) == Config()


def test_infinity_as_python_writes_it():
    text = json.dumps({"steps_per_print": float("inf"), **TREE})
    assert read(text) == {"steps_per_print": float("inf"), **TREE}


def test_a_config_passes_through():
    config = load(TREE)
    assert load(config) is config


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64(encode):
    tree = {**TREE, "_comment": "ÿ?>~¿ÿ?>~"}  # its encoding has + and /, or - and _
    text = encode(json.dumps(tree, ensure_ascii=False).encode()).decode()
    assert any(sign in text for sign in "+/-_")
    assert read(text) == tree


def test_the_callers_dict_is_not_shared():
    tree = {"zero_optimization": {"cpu_offload": False}, "fp32_allreduce": True}
    before = json.dumps(tree)
    load(tree)
    assert json.dumps(tree) == before
    read(tree)["zero_optimization"]["stage"] = 3
    assert json.dumps(tree) == before


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"train_batch_size": 8, "train_batch_size": 16}', ("train_batch_size", "8", "16")),
        ('{"zero_optimization": {"stage": 2, "overlap_comm": true, "stage": 3}}', ("stage", "2", "3")),
        ('{"fp16": {"enabled": true}, "fp16": {"enabled": false}}', ("fp16", "True", "False")),
    ],
)
def test_duplicate_keys_are_refused_with_both_values(text, values):
    for source in (text, base64.b64encode(text.encode()).decode()):
        with pytest.raises(ValueError, match="stands twice") as caught:
            load(source)
        assert all(value in str(caught.value) for value in values)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_file.json", "neither an existing file nor base64"),
        ("{unclosed: 1", "not valid JSON"),
        (base64.b64encode(b"[1, 2]").decode(), "holds list"),
        (base64.b64encode(b"\xff\xfe").decode(), "neither an existing file nor base64"),
        ("A" * 5000, "neither an existing file nor base64|holds str|not valid"),
        (3, "not int"),
    ],
)
def test_what_is_no_config_says_so(source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match="no config file at .*missing.json"):
        load(tmp_path / "missing.json")
