"""Registries, where the package is extended: folders whose every module is one entry, so a new file is a new entry."""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from lamini_jax.errors import UserError


class Registry:
    """The modules of a package by name. A module is imported when it is first used.

    `flag` is the field of the config that names one. Folders, and modules whose names begin with an underscore, are not
    entries.
    """

    def __init__(self, package: str, flag: str):
        self._package, self._flag = package, flag

    def names(self) -> list[str]:
        """The names of all entries."""
        folders = importlib.util.find_spec(self._package).submodule_search_locations
        modules = pkgutil.iter_modules(folders)
        return [module.name for module in modules if not module.ispkg and not module.name.startswith("_")]

    def __getitem__(self, name: str) -> ModuleType:
        """The entry of this name. Raises UserError, with the flag and all names, if there is none."""
        if name not in self.names():
            raise UserError(f"--config.{self._flag}={name}: must be one of {', '.join(self.names())}")
        return importlib.import_module(f"{self._package}.{name}")
