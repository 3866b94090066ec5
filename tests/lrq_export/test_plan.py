"""What is decided for each linear layer before tracing, and the progress that stages report."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphs.ops import hadamard
from lrq_export.errors import CheckFailed, UsageError
from lrq_export.plan import _choose_block, plan_layers
from lrq_export.progress import Bar, JsonLines, Silent, stage
from lrq_export.recipe import load_recipe
from lrq_export.source import open_source

HADAMARD = load_recipe(overrides={"rotation.kind": "hadamard"})


@pytest.fixture(scope="module")
def planned(tiny):
    source = open_source(tiny.source)
    return lambda **changes: plan_layers(source.model(), source.family, tiny.recipe(**changes))


def test_every_linear_but_the_kept_is_planned_in_module_order(planned):
    plans = planned()
    assert len(plans) == 20
    assert plans[0].name == "transformer_blocks.0.attn1.to_q"
    assert all(plan.name.startswith("transformer_blocks.") for plan in plans)
    assert {plan.group_size == plan.cols for plan in plans} == {True}
    assert all(plan.reason for plan in plans)


def test_an_attention_output_is_rotated_per_head_so_that_it_folds(planned):
    blocks = {plan.name: plan.block for plan in planned()}
    assert blocks["transformer_blocks.1.attn2.to_out.0"] == 12
    assert blocks["transformer_blocks.1.attn2.to_q"] == 24
    assert blocks["transformer_blocks.1.ff.net.2"] == 96


def test_a_recipe_decides_rotation_bits_groups_and_signs(planned):
    changed = planned(rotation__block="8", rotation__signs="true", rotation__seed="3", weights__group_size="12")
    for plan in changed:
        assert plan.block == (12 if ".to_out." in plan.name else 8)
        assert (plan.signs_seed, plan.group_size) == (3, 12)
    assert {(plan.block, plan.signs_seed) for plan in planned(rotation__kind='"none"')} == {(0, None)}


def test_keep_is_the_recipes_when_it_says_so(planned):
    assert len(planned(keep="[]")) > 20
    assert {plan.name.split(".")[2] for plan in planned(keep='["*.attn?.*", "adaln*", "caption*", "proj_out"]')} == {
        "ff"
    }
    with pytest.raises(UsageError, match="matches none"):
        planned(keep='["*.attn9.*"]')
    with pytest.raises(CheckFailed, match="nothing was left"):
        planned(keep='["*"]')


@given(cols=st.integers(1, 5000))
def test_every_width_gets_a_block_that_divides_it_and_has_a_matrix(cols):
    block, reason = _choose_block("layer", cols, None, HADAMARD)
    assert cols % block == 0
    assert hadamard.supported(block)
    assert str(cols) in reason
    assert (block == cols) == hadamard.supported(cols)


@given(cols=st.integers(8, 400), block=st.integers(1, 400))
def test_a_block_is_taken_or_refused_with_blocks_that_would_do(cols, block):
    recipe = load_recipe(overrides={"rotation.kind": "hadamard", "rotation.block": str(block)})
    if cols % block == 0 and hadamard.supported(block):
        assert _choose_block("layer", cols, None, recipe)[0] == block
        return
    with pytest.raises(UsageError) as caught:
        _choose_block("layer", cols, None, recipe)
    assert f"rotation.block is {block}" in str(caught.value)
    offered = json.loads(caught.value.hint[caught.value.hint.index("[") : caught.value.hint.index("]") + 1])
    assert all(cols % each == 0 and hadamard.supported(each) for each in offered)


def test_a_head_width_without_a_matrix_falls_back_to_the_width():
    assert _choose_block("layer", 24, 3, HADAMARD) == (24, "full width 24")
    assert _choose_block("layer", 24, 6, HADAMARD) == (2, "2 of 6 channels of a head: folds into the value projection")


def test_linears_of_an_unknown_family_need_no_head_width():
    class Family:
        keep = ()

        def head_width(self, model, layer):
            return None

        def shares_attention(self, layer):
            return False

    (plan,) = plan_layers(nn.Sequential(nn.Linear(20, 5)), Family(), HADAMARD)
    assert (plan.name, plan.rows, plan.cols, plan.block) == ("0", 5, 20, 20)


# --- progress


def test_json_lines_count_the_work(capsys):
    timings = {}
    shown = JsonLines()
    with stage(shown, "paint", timings, 2):
        shown.advance("wall")
        shown.advance()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["begin", "advance", "advance", "end"]
    assert (events[1]["done"], events[1]["total"], events[1]["what"]) == (1, 2, "wall")
    assert timings["paint"] >= 0


def test_a_bar_is_silent_where_nobody_watches(capsys):
    shown = Bar()
    with stage(shown, "paint", {}, 0):
        shown.advance("wall")
    shown.stop()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_bar_on_a_terminal_shows_the_stage_and_its_time(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    shown = Bar()
    with stage(shown, "paint", {}, 3):
        shown.advance("wall")
    shown.stop()
    assert "paint" in terminal.getvalue()
    assert "ETA" in terminal.getvalue()


def test_a_stage_done_in_two_parts_adds_its_time():
    timings = {"paint": 10.0}
    with stage(Silent(), "paint", timings):
        pass
    assert timings["paint"] > 10


def test_auto_leaves_rotations_open_and_refuses_what_only_hadamard_has(planned):
    assert {plan.block for plan in planned(rotation__kind="auto")} == {0}
    for key, value in (("rotation__signs", "true"), ("rotation__block", "12")):
        with pytest.raises(UsageError, match=f"{key.replace('__', '.')}: got .* needed hadamard"):
            planned(rotation__kind="auto", **{key: value})
