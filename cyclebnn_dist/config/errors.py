"""The error a user caused and can mend."""

from __future__ import annotations

from typing import Any


class RecipeError(ValueError):
    """Something the user asked for cannot be done; the command line prints it and exits with status 2.

    Args:
        key: dotted recipe key (``optim.lr``), command-line flag or file the problem belongs to.
        problem: what is wrong, with the offending value.
        cure: how to mend it: the nearest valid key, the valid range, the command to run.
        file: recipe or profile the key came from, where known.
    """

    def __init__(self, key: str, problem: str, cure: str = "", file: str = "") -> None:
        self.key = key
        self.problem = problem
        self.cure = cure
        self.file = file
        lines = [f"{key}: {problem}"]
        if cure:
            lines.append(f"  {cure}")
        if file:
            lines.append(f"  in {file}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.key, self.problem, self.cure, self.file)


def quoted(value: Any) -> str:
    """A setting's value as a message shows it: text in quotes."""
    return f"'{value}'" if isinstance(value, str) else str(value)
