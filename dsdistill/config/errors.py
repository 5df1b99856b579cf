"""Define the errors that users read: their own mistakes, and why a run cannot go on."""

LONGEST = 500  # most characters of a value in a message


class UserError(ValueError):
    """Something that the user gave cannot be used.

    Its message is one line that names the place (file, key, column), what was got and what is expected.
    The command line prints that line and exits with code 2; anything else that escapes is a bug of ours.
    """

    def __init__(self, place: str, got: object, expected: str):
        got, expected = (
            text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in (str(got), expected)
        )
        super().__init__(" ".join(f"{place}: got {got}, expected {expected}".splitlines()))

    def within(self, origin: str) -> "UserError":
        """Return the same error with its place inside `origin`, such as the config file that it comes from."""
        located = UserError.__new__(UserError)
        ValueError.__init__(located, f"{origin}: {self}")
        return located


class RunError(RuntimeError):
    """A run that was accepted cannot go on; its checkpoints are unchanged. One line says why."""


class SharedError(RunError):
    """Every rank raises this RunError, so that only the first prints it."""


class Stopped(BaseException):
    """A run was told to stop, by a signal or by its launcher's end; `code` is the exit code of its process.

    Like KeyboardInterrupt it is no subclass of Exception, so that no handler takes it for a fault. Its message says in
    one line what happened to the run.
    """

    def __init__(self, told: str, code: int):
        super().__init__(told)
        self.code = code
