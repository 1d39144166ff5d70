"""Groups of parameters as they are written."""

import pytest

from gemma_jax.config import PretrainConfig as Config
from gemma_jax.config import parameter_groups, parse, settings_by_parameter, validate
from gemma_jax.errors import UserError

NAMES = ["embedding", "blocks.attention.q", "blocks.attention_norm", "final_norm"]


def test_groups_are_read_from_a_command_line() -> None:
    words = [
        "--optimizer.groups",
        "embedding learning_rate_factor=0.1  weight_decay=0",
        "*norm weight_decay=1e-3",
    ]
    config = parse(Config(), words, "gemma pretrain")
    validate(config)
    assert [(group.pattern, group.settings) for group in parameter_groups(config.optimizer.groups)] == [
        ("embedding", {"learning_rate_factor": 0.1, "weight_decay": 0.0}),
        ("*norm", {"weight_decay": 1e-3}),
    ]


def test_the_later_group_has_the_last_word_setting_by_setting() -> None:
    groups = parameter_groups(
        [
            "blocks.* learning_rate_factor=0.5 weight_decay=0.2",
            "*norm weight_decay=0",
            "final_* weight_decay=3",
        ]
    )
    defaults = {name: {"learning_rate_factor": 1.0, "weight_decay": 0.1} for name in NAMES}
    settings = settings_by_parameter(groups, defaults)
    assert {name: (s["learning_rate_factor"], s["weight_decay"]) for name, s in settings.items()} == {
        "embedding": (1.0, 0.1),
        "blocks.attention.q": (0.5, 0.2),
        "blocks.attention_norm": (0.5, 0.0),
        "final_norm": (1.0, 3.0),
    }
    assert defaults["final_norm"]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is no group of parameters"),
        ("embedding", "'embedding' is no group of parameters"),
        ("weight_decay=0", "'weight_decay=0' is no group of parameters"),
        ("weight_decay=0 learning_rate_factor=1", "is no group of parameters"),
        ("embedding weight_decay", "'weight_decay' in 'embedding weight_decay' is not one number"),
        ("embedding weight_decay=-1", "'weight_decay=-1' in"),
        ("embedding weight_decay=inf", "'weight_decay=inf' in"),
        ("embedding weight_decay=nan", "'weight_decay=nan' in"),
        ("embedding weight_decay=0 weight_decay=1", "'weight_decay=1' in"),
        ("embedding learning_rate=0.1", "sets 'learning_rate'; did you mean learning_rate_factor?"),
        ("embedding frozen", "sets 'frozen'; the settings are learning_rate_factor and weight_decay."),
        ("embedding pattern=a", "sets 'pattern'"),
    ],
)
def test_what_is_no_group_is_named(text: str, told: str) -> None:
    with pytest.raises(UserError, match=r"^optimizer\.groups: ") as error:
        parameter_groups(["embedding weight_decay=0", text])
    assert told in str(error.value)
