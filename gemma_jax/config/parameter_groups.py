"""Groups of parameters that are trained otherwise than the rest: `optimizer.groups`."""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence

from gemma_jax.config.serialization import suggestion
from gemma_jax.errors import UserError

SETTINGS = ("learning_rate_factor", "weight_decay")
FORM = "write 'PATTERN learning_rate_factor=0.1 weight_decay=0', with one setting or both"


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """What is set for the parameters whose dotted name matches `pattern` (with *, ? and [...])."""

    pattern: str
    settings: dict[str, float]


def parameter_groups(texts: Sequence[str]) -> list[ParameterGroup]:
    """The groups that `optimizer.groups` describes.

    Raises:
      UserError: a text that is no group; it is named.
    """
    groups = []
    for text in texts:
        pattern, *words = text.split() or [""]
        settings: dict[str, float] = {}
        for word in words:
            name, _, number = word.partition("=")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if name not in SETTINGS:
                hint = suggestion(name, SETTINGS) or f"; the settings are {' and '.join(SETTINGS)}."
                raise UserError(f"optimizer.groups: {text!r} sets {name!r}{hint}")
            if name in settings or not 0 <= value < math.inf:
                raise UserError(
                    f"optimizer.groups: {word!r} in {text!r} is not one number of at least 0; {FORM}."
                )
            settings[name] = value
        if not settings or "=" in pattern:
            raise UserError(f"optimizer.groups: {text!r} is no group of parameters; {FORM}.")
        groups.append(ParameterGroup(pattern, settings))
    return groups


def settings_by_parameter(
    groups: Sequence[ParameterGroup], defaults: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """What holds for each parameter, by name; where several groups match, the later one has the last word.

    Raises:
      UserError: a pattern that matches no parameter.
    """
    settings = {name: dict(default) for name, default in defaults.items()}
    for group in groups:
        matched = fnmatch.filter(settings, group.pattern)
        if not matched:
            raise UserError(
                f"optimizer.groups: no parameter is called {group.pattern!r}; "
                f"the names are {', '.join(sorted(settings))}."
            )
        for name in matched:
            settings[name] |= group.settings
    return settings
