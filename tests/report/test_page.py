"""What stands in report.html: literal numbers, runs at every stage, texts that mean harm."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from run_folders import HOSTILE, config, metrics_row, stored_row, write_long_run, write_run

from kdrl_pl.files import JSONLines, json_line
from kdrl_pl.report.completions import best_and_worst, changes, most_disputed
from kdrl_pl.report.page import report, write_report
from kdrl_pl.report.run import read_run

TROUBLESHOOTING = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def page_of(folder):
    return report(read_run(folder), folder)


def test_a_finished_run(tmp_path):
    folder = write_run(tmp_path / "made" / "2026-01-31_12-00-00")
    output = write_report(folder)
    assert output == folder / "report.html"
    page = output.read_text()
    assert "Finished after 4 rollouts, 16 s, 4,000 sampled tokens." in page
    assert '<span class="big">25.0% → 50.0%</span>sums: correct before → after' in page
    assert '<th scope="row">sums, before</th><td>25.0%</td><td>37.5%</td><td>20</td><td>0.0%</td><td>1.5</td>' in page
    assert '<th scope="row">sums, after</th><td>50.0%</td><td>62.5%</td><td>21</td><td>0.0%</td><td>0.5</td>' in page
    assert "correct: 10 % at rollout 1, 40 % at rollout 4, from 10 % to 40 %" in page
    assert "of the tokens that are distilled: 1 at rollout 1, 0.25 at rollout 4" in page
    assert "sums: 25 % at rollout 0, 50 % at rollout 4" in page  # the validation before training is its first point
    assert "rollout 25 % on average; teacher 12.5 % on average; update 50 % on average; other 12.5 %" in page
    assert f"kdrl fit --config {folder}/config.yaml" in page
    assert '<th scope="row">torch</th><td>2.13.0</td>' in page and "vllm" not in page
    assert "Alarms" not in page and '<li><a href="#tokens">Tokens</a></li>' in page and '<section id="tokens">' in page
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_tokens_of_the_rows_in_dispute(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert page.count('class="t n3 clash" title="d -2.00 nats (student -0.50, teacher -2.50)') == 4
    assert '<th scope="row">2: ‹6›</th><td>-2.00</td><td>-0.50</td><td>-2.50</td><td>+0.75</td><td>-2.00</td>' in page


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_model_wrote_is_markup(tmp_path, text):
    """Neither a response, nor its tokens, nor a setting."""
    folder = write_run(tmp_path / "run", texts=[text, text], settings={**config(), "evil": text[:200]})
    page = report(read_run(folder), folder, lambda ids: text * len(ids))
    assert not re.search(r"<script|<img|<a [^>]*javascript|<[^>]* on\w+=", page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert page.count("<style>") == page.count("</style>") == 1
    page.encode()


def test_what_a_model_wrote_can_be_read(tmp_path):
    for text, expected in (
        ("<script>a</script>", "<pre>&lt;script&gt;a&lt;/script&gt;</pre>"),
        ("\x1b[2J", "<pre>\\x1b[2J</pre>"),
        ("\u202egnp.exe", "<pre>\\u202egnp.exe</pre>"),
        ("x" * 30_000, f"<pre>{'x' * 1500}\n… 27,000 characters …\n{'x' * 1500}</pre>"),
    ):
        assert expected in page_of(write_run(tmp_path / "run", texts=[text]))


def test_before_the_first_rollout(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, rollouts=0, finished=False)
    shutil.rmtree(folder / "validation")
    page = page_of(folder)
    assert "No rollout is finished yet." in page and "<svg" not in page and "model.<wbr>normaliser" in page
    (folder / "metrics.jsonl").write_text("")
    assert "No rollout is finished yet." in page_of(folder)


def test_a_run_under_way(tmp_path):
    folder = write_run(tmp_path / "run", finished=False, rollouts=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"rollout":3,"reward/correct":0.9')  # half written
    with open(folder / "rollouts" / "000002.jsonl", "a") as file:
        file.write('{"rollout":2,"uid":"su')
    page = page_of(folder)
    assert "Under way, or stopped: 3 of 4 rollouts are in metrics.jsonl." in page
    assert "25.0% → 50.0%" in page  # before: of validation/000000.json
    assert "30 % at rollout 3" in page and "90 %" not in page


def test_a_resumed_run_has_every_rollout_once(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics = JSONLines(folder / "metrics.jsonl")
    metrics.truncate_after("rollout", 2)
    metrics.append(*({**metrics_row(k), "reward/correct": 0.75} for k in (2, 3)))
    page = page_of(folder)
    assert "correct: 10 % at rollout 1, 75 % at rollout 4, from 10 % to 75 %" in page


def test_a_run_of_sft_is_counted_in_steps(tmp_path):
    settings = config()
    del settings["rollout"]
    folder = tmp_path / "run"
    write_run(folder, rollouts=0, finished=False, settings=settings)
    shutil.rmtree(folder / "validation")
    rows = [{"global_step": 50, "train/loss": 2.0}, {"global_step": 100, "train/loss": 1.0}]
    JSONLines(folder / "metrics.jsonl").append(*rows, {"global_step": 100, "val/loss": 1.5})
    page = page_of(folder)
    assert "Under way, or stopped: 100 steps" in page and "kdrl sft --config" in page
    assert "all: 2 at step 50, 1 at step 100" in page and "Validation: loss" in page


def test_metrics_that_were_not_finite(tmp_path):
    folder = write_run(tmp_path / "run")
    JSONLines(folder / "metrics.jsonl").append({**metrics_row(4), "train/grad_norm": float("nan"), "train/loss": None})
    assert "before clipping: 1 values were not finite" in page_of(folder)


def test_rows_without_teacher_or_with_damaged_numbers(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [
        stored_row(3, 0, teacher_logprobs=None, kd_weights=None, token_weight=None),
        stored_row(3, 1, behavior_logprobs=None, teacher_logprobs=None),
        stored_row(3, 2, reward=None, advantage=None, behavior_logprobs=[None] * 3),
        stored_row(3, 3, response_ids=[], behavior_logprobs=[], teacher_logprobs=[], kd_weights=[], completion=""),
    ]
    (folder / "rollouts" / "000003.jsonl").write_bytes(b"".join(map(json_line, rows)))
    assert "Best of rollout 4" in page_of(folder)


def test_alarms_come_with_their_cure(tmp_path):
    folder = write_run(tmp_path / "run")
    alarm = {"rollout": 1, "code": "KL-UP", "message": "KL <rises>", "cure": "a smaller step"}
    JSONLines(folder / "alarms.jsonl").append(alarm, {**alarm, "rollout": 3})
    page = page_of(folder)
    assert "<h3>KL-UP: KL &lt;rises&gt;</h3><p>a smaller step</p>" in page and "rollout 4, 2 times; " in page
    assert "docs/troubleshooting.md" in page


def test_alarms_link_to_their_section(tmp_path):
    folder = write_run(tmp_path / "run")
    alarm = {"rollout": 1, "code": "K001", "message": "no signal", "cure": "easier prompts"}
    JSONLines(folder / "alarms.jsonl").append(alarm)
    (file, anchor) = re.search(r'href="([^"#]+)#([^"]+)"', page_of(folder).partition("K001")[2]).groups()
    assert (folder / file).resolve() == TROUBLESHOOTING
    (heading,) = [line for line in TROUBLESHOOTING.read_text().splitlines() if line.startswith("## K001: ")]
    assert anchor == heading[3:].lower().replace(" ", "-").replace(":", "")


def test_settings_that_differ_come_first(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    changed, _, usual = page.partition("settings left at their default")
    row = '<th scope="row">model.<wbr>distillation.<wbr>coef</th><td>0.5</td><td>0.002</td>'
    assert row in changed and '<th scope="row">model.<wbr>normaliser</th><td>token</td><td>group</td>' in changed
    assert '<th scope="row">model.<wbr>distillation.<wbr>estimator</th>' in usual and "default_root_dir" not in page


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), FileNotFoundError, "no run folder at"),
        (lambda f: (f / "config.yaml").unlink(), FileNotFoundError, "holds no config.yaml, so it is not the folder"),
        (lambda f: (f / "config.yaml").write_text("- a"), ValueError, "config.yaml holds no settings"),
        (lambda f: (f / "config.yaml").write_text("a: [", ), ValueError, "not readable as YAML"),
        (lambda f: (f / "summary.json").write_text("{"), ValueError, "summary.json is damaged"),
        (lambda f: (f / "metrics.jsonl").write_text("{}\nx\n{}\n"), ValueError, r"metrics.jsonl, line 2"),
    ],
)  # fmt: skip
def test_one_clear_error(tmp_path, spoil, error, message):
    folder = write_run(tmp_path / "run")
    spoil(folder)
    with pytest.raises(error, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_folder_above_a_run_is_not_one(tmp_path):
    write_run(tmp_path / "made" / "2026-01-31_12-00-00")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*made/2026-01-31_12-00-00"):
        read_run(tmp_path / "made")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "env.json", "rollouts", "validation"])
def test_any_other_file_may_be_missing(tmp_path, name):
    folder = write_run(tmp_path / "run")
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "</html>" in page_of(folder)


def test_a_long_run_makes_a_small_page(tmp_path):
    page = page_of(write_long_run(tmp_path / "run"))
    assert 0.5e6 < len(page.encode()) < 3e6
    assert "rollouts 995 to 1000" in page and "1,400 more tokens" in page


def test_best_and_worst():
    rows = [stored_row(0, 0, reward=1.0), stored_row(0, 0, reward=0.0), stored_row(0, 1, reward=0.5)]
    rows.append(stored_row(0, 2, reward=0.5, teacher_logprobs=[0.0, 0.0, 0.0]))
    best, worst = best_and_worst(rows, 2)
    assert best == [rows[0], rows[3]]  # of equal reward the one that the teacher finds likelier
    assert worst == [rows[1], rows[2]]


def test_what_changed_most(tmp_path):
    folder = write_run(tmp_path / "run")
    early = [stored_row(-1, i, text, correct=False) for i, text in enumerate(["abc", "abcd", "same", "aaaa"])]
    late = [stored_row(-1, 0, "abd", correct=False), stored_row(-1, 1, "abce", correct=True)]
    late += [stored_row(-1, 2, "same", correct=False), stored_row(-1, 3, "bbbb", correct=False)]
    for done, rows in ((0, early), (4, late)):
        content = {"rollouts": done, "results": {}, "rows": rows}
        (folder / "validation" / f"{done:06d}.json").write_text(json.dumps(content))
    made = changes(read_run(folder))
    assert [change.late["uid"] for change in made] == [
        "sums/1",
        "sums/3",
        "sums/0",
    ]  # the verdict changed; then least alike
    assert [piece for piece in made[2].pieces if piece[0]] == [("ab", False), ("d", True)]
    assert made[0].when == (0, 4)


def test_what_changed_in_stored_rollouts_without_validation(tmp_path):
    folder = write_run(tmp_path / "run", texts=["early"])
    shutil.rmtree(folder / "validation")
    (folder / "rollouts" / "000003.jsonl").write_bytes(json_line(stored_row(3, 0, "late")))
    (change,) = changes(read_run(folder))
    assert (change.early["completion"], change.late["completion"], change.when) == ("early", "late", (2, 3))


def test_rows_in_dispute_are_right_and_wrong_ones():
    def row(number, correct, gap):
        return stored_row(0, number, correct=correct, teacher_logprobs=[-0.25 - gap, -0.5, -1.0])

    rows = [row(0, True, 1), row(1, False, 9), row(2, False, 8), row(3, False, 7), row(3, True, 2), row(1, False, 10)]
    assert most_disputed(rows, 4) == [5, 2, 4, 0]


def test_rows_of_all_ranks_are_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "rollouts" / "000003-rank1.jsonl").write_bytes(json_line(stored_row(3, 9, "of rank one")))
    assert [row["uid"] for row in read_run(folder).rows(3)] == ["sums/0", "sums/1", "sums/9"]
    assert read_run(folder).stored() == [2, 3]
