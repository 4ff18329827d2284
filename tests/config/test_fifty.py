"""Fifty configs as people write them: each loads, is answered key by key, and, where nothing is refused, trains."""

from __future__ import annotations

import warnings

import pytest
import torch
from fifty_configs import FILES, TABLE, for_one_rank, leaves, resolved, rows_of, table
from models import Net, batch

import tritonspeed as ts
from tritonspeed.config import ConfigWarning
from tritonspeed.config.read import read


def test_the_outcome_of_every_file_is_the_committed_table():
    assert len(FILES) == 50
    remedy = "if the change was meant, run: python tests/config/fifty_configs.py"
    assert TABLE.read_text(encoding="utf-8") == table(), remedy


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_has_an_answer_with_a_sentence(path):
    config, _ = resolved(path)
    answers = rows_of(config)
    assert {each.key for each in answers} == set(leaves(read(path)))
    assert all(len(each.note) > 3 for each in answers)
    assert not any(each.resolved == "auto" for each in answers)
    for each in answers:
        if each.verdict == "mapped":
            assert each.note.startswith("now "), each


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_trains_a_step_or_says_why_not(path, tmp_path):
    given = for_one_rank(path, tmp_path)
    refused = [each.key for each in resolved(path)[0].answers() if each.verdict == "refused"]
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        if refused:
            with pytest.raises(ValueError) as caught:
                ts.initialize(model=model, config=given)
            assert all(key in str(caught.value) for key in refused)
            return
        own = None if "optimizer" in given else torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine = ts.initialize(model=model, optimizer=own, config=given)[0]
    loss = engine(*batch(0, 0))
    engine.backward(loss)
    engine.step()
    assert torch.isfinite(loss)
    assert engine.global_steps == 1
    assert engine.zero_optimization_stage() == resolved(path)[0].zero_optimization.stage
    engine.destroy()
