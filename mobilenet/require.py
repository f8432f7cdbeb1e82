"""Optional packages: here, or one error that says how to get them."""

import importlib.util
from importlib import import_module
from types import ModuleType


def require(*names: str, extra: str, purpose: str) -> ModuleType:
    """Import optional packages, and give the first of them.

    Args:
        names: Of the packages, as they are imported.
        extra: That brings them.
        purpose: What needs them.

    Raises:
        ImportError: One is missing; the message says how to install it.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"{purpose} needs {', '.join(missing)}: in a clone of this project, "
            f'pip install -c constraints.txt -e ".[{extra}]"'
        )
    return import_module(names[0])
