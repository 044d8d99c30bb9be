from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from kdrl_pl.models.loading import stop_ids


@pytest.mark.parametrize(
    ("tokenizer_eos", "config_eos", "extra", "expected"),
    [
        (2, None, None, [2]),
        (2, 2, None, [2]),
        (151645, [151645, 151643], None, [151643, 151645]),  # Qwen: end of turn and end of text
        (128009, [128001, 128008, 128009], [13], [13, 128001, 128008, 128009]),
        (None, 7, None, [7]),
        (0, None, [0], [0]),  # id 0 is an id
        (None, None, None, []),
    ],
)
def test_stop_ids_are_the_union(tokenizer_eos, config_eos, extra, expected):
    tokenizer = SimpleNamespace(eos_token_id=tokenizer_eos)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=config_eos), extra) == expected


def test_a_model_without_generation_config():
    assert stop_ids(SimpleNamespace(eos_token_id=2), None) == [2]
