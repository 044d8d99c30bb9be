"""The line of a rollout."""

from kdrl_pl.view.plain import shares


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
