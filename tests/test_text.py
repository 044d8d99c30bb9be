from kdrl_pl.text import printable


def test_control_characters_become_escapes():
    assert printable("\x1b[2J\x1b]0;owned\x07 12\r\n\tok") == "\\x1b[2J\\x1b]0;owned\\x07 12\\r\n\tok"
    assert printable("a\x00\x7f\x9b") == "a\\x00\\x7f\\x9b"


def test_characters_that_turn_or_hide_text_become_escapes():
    assert printable("\u202eevil\u2028\u200b") == "\\u202eevil\\u2028\\u200b"
    assert printable("\ud800") == "\\ud800"  # half of a surrogate pair, which no terminal's encoding can hold


def test_other_text_stays():
    text = "π ≈ 3.14, 数学, é, 👍\n\t<b>&amp;"
    assert printable(text) == text
