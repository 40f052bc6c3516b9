"""Being taken for peft's by libraries that ask `isinstance(model, peft.PeftModel)`: transformers' Trainer, TRL,
accelerate.

`Recognised` gives a model a `__class__` that is peft's class of the same name, as unittest.mock's `spec` does: where
peft is imported, isinstance is true of both libraries' classes, and type(model) stays ours. peft is only ever looked up
in sys.modules. Layers are registered with peft's abstract class of layers, abc's own way of saying so: TRL refuses an
adapter on a model's head by it, whose training would be lost without a word.
"""

import sys
from typing import Any


def theirs(ours: type) -> type | None:
    """Real peft's class of the name that `ours` has, or that the nearest of its bases has; None while peft is not
    imported, or where what goes by that name is peft_fast (install_as_peft)."""
    peft = sys.modules.get("peft")
    for kind in ours.__mro__:
        if kind.__module__.partition(".")[0] != "peft_fast":
            continue
        found = vars(peft).get(kind.__name__) if peft is not None else None
        if isinstance(found, type):
            return None if found in ours.__mro__ else found
    return None


def register_layers() -> None:
    """Have peft's BaseTunerLayer, where it is imported, know ours."""
    from peft_fast.tuners.layer import BaseTunerLayer

    known = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if known is not None and known is not BaseTunerLayer and not issubclass(BaseTunerLayer, known):
        known.register(BaseTunerLayer)


def _seen(model: Any) -> type:
    found = theirs(type(model))
    if found is None:
        return type(model)
    register_layers()
    return found


def _become(model: Any, cls: type) -> None:
    """`model.__class__ = cls`, as torch's fully_shard does it with a subclass that it made of what `__class__` said."""
    seen, own = theirs(type(model)), type(model)
    if seen is not None and not issubclass(cls, own) and issubclass(cls, seen):
        bases = tuple(own if base is seen else base for base in cls.__bases__)
        namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        cls = type(cls.__name__, bases, namespace)
    _class_of_objects.__set__(model, cls)


_class_of_objects: Any = vars(object)["__class__"]


class Recognised:
    """The first base of a class that is to be taken for peft's class of the same name."""

    __class__: Any = property(_seen, _become)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """pickle's own way refuses an object whose `__class__` is not its type."""
        reduced: Any = super(Recognised, self).__reduce_ex__(max(2, protocol))  # noqa: UP008 (__class__ is taken)
        return (_new, (type(self),), *reduced[2:])


def _new(cls: Any) -> Any:
    return cls.__new__(cls)
