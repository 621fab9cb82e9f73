"""`python -m tools.demo`, the first thing that a new user runs."""

import re


def test_the_demo_checks_the_model_and_shows_both_modes_and_a_call(run_tool):
    result = run_tool("demo")
    assert (result.returncode, result.stderr) == (0, "")
    (difference,) = re.findall(r"token by token equals one pass within (\S+)\.\n", result.stdout)
    assert 0 < float(difference) < 1e-4
    assert result.stdout.count("with thinking") == result.stdout.count("| without") >= 7
    assert "(right)" in result.stdout
    assert "<think>" in result.stdout
    assert "assistant calls calculator: {'expression': '" in result.stdout
    (rate,) = re.findall(r"once compiled: (\S+) tokens/s", result.stdout)
    assert float(rate) > 0


def test_other_problems_are_shown_for_another_seed(run_tool):
    questions = [
        re.findall(r"user: (.*)", run_tool("demo", f"--seed={seed}").stdout) for seed in (1, 2)
    ]
    assert questions[0] != questions[1]
