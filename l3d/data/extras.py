"""Import packages that only some features need; an extra of l3d installs them."""

import importlib
from typing import Any


def import_extra(module: str, extra: str, without: str) -> Any:
    """Import and return a module.

    extra: the extra of l3d that installs it. without: says what is missing. Raises ImportError that begins with it if
    the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{without}: pip install 'l3d[{extra}]'") from error
