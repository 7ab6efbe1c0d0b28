"""A filter of system calls alone: a program computes and cannot open any file, not even to import a module."""

from __future__ import annotations

import sys

from opd.sandbox import filters
from opd.sandbox.base import Confinement


class Seccomp(Confinement):
    """For machines with nothing better. Modules that programs ask for most are loaded before."""

    kind = "seccomp"
    modules = (
        *("abc", "argparse", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc"),
        *(
            "contextlib",
            "copy",
            "csv",
            "dataclasses",
            "datetime",
            "decimal",
            "difflib",
            "enum",
            "fractions",
            "functools",
        ),
        *("gc", "hashlib", "heapq", "io", "itertools", "json", "locale", "math", "numbers", "operator", "pprint"),
        *("queue", "random", "re", "secrets", "statistics", "string", "struct", "textwrap", "threading", "time"),
        *("traceback", "types", "typing", "unicodedata", "uuid", "zlib", "_strptime", "encodings.idna", "doctest"),
    )

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return "needs Linux"
        return None if filters.supported() else "no list of system calls for this processor"

    @property
    def filter(self) -> bytes:
        return filters.compiled(files=False)
