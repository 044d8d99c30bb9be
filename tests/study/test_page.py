import pytest

from kdrl_pl.study.page import fill

PAGE = """# Evidence

Prose <!-- study:a table near --> in a line is prose.

<!-- study:a table near -->
old

old
<!-- end -->

Between.

<!-- study:b table near -->
not mine
<!-- end -->
<!-- study:a plot -->
<!-- end -->
After.
"""


def test_only_blocks_of_the_study_are_replaced_and_again_gives_the_same():
    blocks = {"table near": "| 1 |\n\\1 \\g<0>", "plot": "![](a.svg)"}
    filled = fill(PAGE, "a", blocks)
    assert filled == PAGE.replace("old\n\nold\n", "| 1 |\n\\1 \\g<0>\n").replace(
        "a plot -->\n", "a plot -->\n![](a.svg)\n"
    )
    assert fill(filled, "a", blocks) == filled


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("prose", "no block of study a to fill; expected lines like\n<!-- study:a table near -->\n<!-- end -->"),
        ("<!-- study:a table nera -->\n<!-- end -->\n", "no block 'table nera'; did you mean table near?"),
        (
            "<!-- study:a table near -->\n\n<!-- study:a table near -->\n<!-- end -->\n",
            "has no <!-- end --> of its own",
        ),
        ("<!-- study:a table near -->\nprose that must not be lost\n", "has no <!-- end --> of its own"),
    ],
)
def test_a_page_that_cannot_be_filled(page, message):
    with pytest.raises(ValueError) as error:
        fill(page, "a", {"table near": "x"})
    assert message in str(error.value)
