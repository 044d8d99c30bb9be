import math

from kdrl_pl.study.tables import arms_table, differences_table


def entry(seeds, pass1, seconds, teacher, **more):
    n = len(seeds)
    return {
        "digest": "d",
        "rollouts": 120,
        "seeds": seeds,
        "pass@1": pass1,
        "pass@8": [0.5] * n,
        "length": [24.04] * n,
        "seconds": seconds,
        "teacher_seconds": teacher,
        "tokens": [736_854] * n,
        "curve": [
            {"rollouts": [0, 120], "seconds": [0, s], "pass@1": [0.125, p]} for s, p in zip(seconds, pass1, strict=True)
        ],
        "machine": ["CPU A"] * (n - 1) + ["CPU B"],
        **more,
    }


KDRL = entry([0, 1, 2], [0.60, 0.62, 0.64], [1000.0, 1100.0, 1200.0], [250.0, 275.0, 300.0])
GRPO = entry([2, 1], [0.54, 0.50], [900.0, 900.0], [0.0, 0.0], machine=["CPU B", "CPU A"])


def test_means_with_intervals():
    """pass@1 of KDRL: s = 2 points, 4.3027 · 2 / √3 = 4.97; of GRPO: s = 2.83, 12.7062 · 2.83 / √2 = 25.4."""
    lines = arms_table({"kdrl": KDRL, "grpo": GRPO}).splitlines()
    assert lines == [
        "| arm | seeds | pass@1 [%] | pass@8 [%] | length [tokens] | seconds [s] | tokens [1,000] | teacher's share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| kdrl | 3 | 62.0 ± 5.0 | 50.0 ± 0.0 | 24.0 ± 0.0 | 1,100 ± 248 | 737 ± 0 | 25% |",
        "| grpo | 2 | 52.0 ± 25.4 | 50.0 ± 0.0 | 24.0 ± 0.0 | 900 ± 0 | 737 ± 0 | 0% |",
        "",
        "Mean over seeds ± half of the 95 % t-interval; 120 rollouts. The student starts at 12.5 %. "
        "Made on CPU A; CPU B.",
    ]


def test_differences_pair_the_seeds_that_both_have():
    """Seeds 1 and 2: 62 − 50 = 12 and 64 − 54 = 10, so 11 ± 12.7062 · √2 / √2 = 12.7: a tie."""
    (row,) = differences_table({"kdrl": KDRL, "grpo": GRPO}, [("kdrl", "grpo")]).splitlines()[2:]
    assert row == (
        "| kdrl − grpo | 2 | tie: +11.0 (−1.7 … +23.7) | tie: 0.0 (0.0 … 0.0) | tie: 0.0 (0.0 … 0.0) "
        "| tie: +250 (−385 … +885) | tie: 0 (0 … 0) |"
    )


def test_seconds_of_two_machines_are_not_compared():
    elsewhere = {**GRPO, "machine": ["CPU A", "CPU A"]}  # seed 2 of KDRL ran on CPU B
    (row,) = differences_table({"kdrl": KDRL, "grpo": elsewhere}, [("kdrl", "grpo")]).splitlines()[2:]
    assert row == (
        "| kdrl − grpo | 2 | tie: +11.0 (−1.7 … +23.7) | tie: 0.0 (0.0 … 0.0) | tie: 0.0 (0.0 … 0.0) |  "
        "| tie: 0 (0 … 0) |"
    )


def test_a_difference_that_is_none():
    better = entry([0, 1, 2], [0.70, 0.73, 0.75], [1000.0, 1100.0, 1200.0], [0.0] * 3)
    half = 4.302653 * math.sqrt(((10 - 10.666667) ** 2 + 2 * (11 - 10.666667) ** 2) / 2) / math.sqrt(3)
    (row,) = differences_table({"new": better, "kdrl": KDRL}, [("kdrl", "new")]).splitlines()[2:]
    assert f"| **−10.7** (−{10.666667 + half:.1f} … −{10.666667 - half:.1f}) |" in row


def test_one_seed_has_no_interval_and_no_verdict():
    one = entry([1], [0.7], [10.0], [0.0])
    assert "| one | 1 | 70.0 |" in arms_table({"one": one})
    (row,) = differences_table({"one": one, "kdrl": KDRL}, [("one", "kdrl")]).splitlines()[2:]
    assert "| +8.0 (one seed) |" in row


def test_pairs_without_results_are_left_out():
    other = entry([7], [0.7], [10.0], [0.0])
    pairs = [("kdrl", "grpo"), ("kdrl", "gone"), ("kdrl", "other")]
    assert len(differences_table({"kdrl": KDRL, "grpo": GRPO, "other": other}, pairs).splitlines()) == 3
    assert differences_table({}, pairs) == arms_table({}) == "No results yet."


def test_an_arm_with_more_samples_has_its_own_column():
    sixteen = {**entry([0], [0.7], [10.0], [0.0]), "pass@16": [0.9]}
    del sixteen["pass@8"]
    lines = arms_table({"kdrl": KDRL, "x": sixteen}).splitlines()
    assert "pass@8 [%] | pass@16 [%]" in lines[0]
    assert lines[2].startswith("| kdrl | 3 | 62.0 ± 5.0 | 50.0 ± 0.0 |  |")
    assert lines[3].startswith("| x | 1 | 70.0 |  | 90.0 |")


def test_the_course_is_the_mean_over_the_run():
    """Validated at 0, 30, 120: (30 · (10 + 50)/2 + 90 · (50 + 70)/2) / 120 = 52.5; then 62.5."""
    curve = {"rollouts": [0, 30, 120], "seconds": [0, 1, 2]}
    slow = entry([0], [0.7], [10.0], [0.0], curve=[{**curve, "pass@1": [0.1, 0.5, 0.7]}])
    fast = entry([0], [0.7], [10.0], [0.0], curve=[{**curve, "pass@1": [0.1, 0.7, 0.7]}])
    head, _, row, *_ = arms_table({"slow": slow, "fast": fast}).splitlines()
    assert head.split(" | ")[2:5] == ["pass@1 [%]", "pass@8 [%]", "on the way [%]"]
    assert row.split(" | ")[4] == "52.5"
    (row,) = differences_table({"slow": slow, "fast": fast}, [("fast", "slow")]).splitlines()[2:]
    assert row.split(" | ")[4] == "+10.0 (one seed)"
