"""The line of a rollout."""

from kdrl_pl.view.plain import rollout_line, shares


def test_shares_add_up_to_the_step() -> None:
    # 2 + 1 + 0.5 of 5 seconds are accounted for; a phase under half a per cent is not worth a word.
    metrics = {
        "time/rollout": 2.0,
        "time/reward": 0.001,
        "time/teacher": 1.0,
        "time/update": 0.5,
        "perf/rollout_tokens_per_s": 12345.6,
        "perf/update_tokens_per_s": 800.0,
    }
    assert shares(metrics, 5.0) == ("rollout 40% (12,346 tokens/s), teacher 20%, update 10% (800 tokens/s), other 30%")


def test_the_line_shows_what_the_run_has() -> None:
    metrics = {"reward/mean": 0.5, "teacher/reverse_kl": 0.25, "time/update": 1.0}
    assert rollout_line(7, metrics, 2.0) == "rollout    7  reward 0.500  KL 0.250  2.0 s: update 50%, other 50%"
