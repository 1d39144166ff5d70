"""Groups of parameters that are trained otherwise than the rest: `optimizer.groups`."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence

from gemma_jax.config.serialization import suggestion
from gemma_jax.errors import UserError

FORM = "write 'PATTERN learning_rate_factor=0.1 weight_decay=0', with one setting or both"


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """How the parameters whose dotted name matches `pattern` (with *, ? and [...]) are trained."""

    pattern: str
    learning_rate_factor: float | None = None  # None leaves what held before
    weight_decay: float | None = None


def parameter_groups(texts: Sequence[str]) -> list[ParameterGroup]:
    """The groups that `optimizer.groups` describes.

    Raises:
      UserError: a text that is no group; it is named.
    """
    known = [field.name for field in dataclasses.fields(ParameterGroup)][1:]
    groups = []
    for text in texts:
        pattern, *settings = text.split() or [""]
        values: dict[str, float] = {}
        for setting in settings:
            name, _, number = setting.partition("=")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if name not in known:
                hint = suggestion(name, known) or f"; the settings are {' and '.join(known)}."
                raise UserError(f"optimizer.groups: {text!r} sets {name!r}{hint}")
            if name in values or not 0 <= value < math.inf:
                raise UserError(
                    f"optimizer.groups: {setting!r} in {text!r} is not one number of at least 0; {FORM}."
                )
            values[name] = value
        if not values or "=" in pattern:
            raise UserError(f"optimizer.groups: {text!r} is no group of parameters; {FORM}.")
        groups.append(ParameterGroup(pattern, **values))
    return groups


def group_of_each(groups: Sequence[ParameterGroup], names: Iterable[str]) -> dict[str, ParameterGroup]:
    """What the groups set for each parameter, by name; where several match, the later one has the last word.

    Raises:
      UserError: a pattern that matches no parameter.
    """
    of_each = {name: ParameterGroup(name) for name in names}
    for group in groups:
        matched = fnmatch.filter(of_each, group.pattern)
        if not matched:
            raise UserError(
                f"optimizer.groups: no parameter is called {group.pattern!r}; "
                f"the names are {', '.join(sorted(of_each))}."
            )
        settings = {
            field.name: value
            for field in dataclasses.fields(group)
            if (value := getattr(group, field.name)) is not None and field.name != "pattern"
        }
        for name in matched:
            of_each[name] = dataclasses.replace(of_each[name], **settings)
    return of_each
