"""What the user's model calls its tensors and modules, while these are moved elsewhere."""

from torch import nn


class UserNames:
    """The names of a model's tensors and modules, whatever they are called later."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, tuple[object, list[str]]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._add(tensor, name)
        for name, module in model.named_modules():
            self._add(module, name)

    def _add(self, thing: object, name: str) -> None:
        # Holding on to it: the identity of a deleted object may become another's.
        self._found.setdefault(id(thing), (thing, []))[1].append(name)

    def of(self, thing: object) -> tuple[str, ...]:
        """Its names; none if it is new."""
        return tuple(self._found.get(id(thing), (thing, ()))[1])

    def of_tensors(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Those of all tensors of a model, by the names that they have there."""
        state = model.state_dict(keep_vars=True)
        return {name: self.of(tensor) for name, tensor in state.items()}
