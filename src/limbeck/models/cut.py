"""A student made of some of its teacher's layers: which weight comes from where."""

from collections.abc import Sequence

from torch import nn

from limbeck.core.errors import RecipeError
from limbeck.models.taps import decoder_layers, name_of


def origins(student: nn.Module, teacher: nn.Module, kept: Sequence[int]) -> dict[str, str]:
    """The teacher's name of each of the student's weights; both may be on the device `meta`.

    Raises:
        RecipeError: not all of the student's can be had, or not all of a kept layer be used.
    """
    mine, theirs = student.state_dict(), teacher.state_dict()
    layers = name_of(teacher, decoder_layers(teacher)) + "."
    found: dict[str, str] = {}
    for name, weight in mine.items():
        source = name
        if name.startswith(layers):
            place, _, rest = name.removeprefix(layers).partition(".")
            source = f"{layers}{kept[int(place)]}.{rest}"
        if source not in theirs or theirs[source].shape != weight.shape:
            raise _refused(name.startswith(layers), source)
        found[name] = source
    used = set(found.values())
    wanted = tuple(f"{layers}{index}." for index in kept)
    for name in theirs:
        if name.startswith(wanted) and name not in used:
            raise _refused(True, name)
    return found


def _refused(in_layer: bool, name: str) -> RecipeError:
    if in_layer:
        why = (
            f"a layer would be of another kind at its new place than the teacher's is ({name}),"
            " because this architecture goes by a layer's number; keep layers that stay where their"
            " kind is, such as the first ones, or give the student a `name` or a `config`"
        )
    else:
        why = (
            f"{name} is not in the teacher, or has another size there, so a student cannot be cut"
            " from it; give the student a `name` or a `config`"
        )
    return RecipeError("student.layers", why)
