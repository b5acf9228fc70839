"""Errors that a user sees.

A client's error travels to the server, and the server must not learn which classes a client holds. So every
error of this project carries two texts: `str(error)` for the machine it happens on, and `public`, which is what
may leave it.
"""

from __future__ import annotations

_MOST_PROBLEMS = 50  # that one message lists


class FBLError(Exception):
    """An error with a cause that the user can mend.

    Args:
        message: What was got, what was wanted, which client or file, and the way out. Stays on this machine.
        public: The same without anything about a client's data; defaults to the bare name of the error.
    """

    def __init__(self, message: str, *, public: str | None = None) -> None:
        super().__init__(message)
        self.public = public or type(self).__name__


class ConfigError(FBLError):
    """One or more settings are wrong; all problems are listed together.

    Args:
        problems: One sentence for each problem: key, what was got, what is allowed.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        shown = self.problems[:_MOST_PROBLEMS]
        if len(shown) < len(problems):
            shown.append(f"... and {len(problems) - len(shown)} more")
        text = f"{len(problems)} {noun} in the configuration:\n" + "\n".join(f"  - {p}" for p in shown)
        super().__init__(text, public=text)  # the configuration comes from the server: nothing in it is a secret


class DataError(FBLError):
    """A data set is missing, damaged, or does not fit the configuration."""


class GeneratorError(FBLError):
    """A generator is missing, damaged, or made for other images."""


class StateError(FBLError):
    """A checkpoint or a client's state on disk is missing, damaged, or belongs to another run."""


class RunFailed(FBLError):
    """The federation could not go on (for example, a round in which no client succeeded)."""
