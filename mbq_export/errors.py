"""Every error a user can meet, and the exit status it leads to.

    MbqError
    ├── GateError          E1...  exit 1    the work was done, a check said no
    ├── UsageError         E2...  exit 2    wrong option, combination, or a resume that does not match
    ├── MachineError       E3...  exit 3    missing library, driver, compiler, provider
    ├── FormatError        E4...  exit 4    an artifact given to us is bad
    ├── ResourceError      E5...  exit 5    disk, memory, time, lock, permission
    ├── BuildError         E6...  exit 6    TensorRT, ONNX Runtime or a compiler refused a valid request
    ├── IncompatibleError  E7...  exit 7    a good artifact for another version or device
    └── InternalError      E9...  exit 70   a bug of ours

The first digit of a code is the exit status (9 means 70). Codes and their explanations are listed in
``codes.toml``; a test holds the two together. Deep code does not know which layer it works on: callers
add the place on the way up with `located`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Final

EXIT_OK: Final = 0
EXIT_INTERRUPTED: Final = 130


class MbqError(Exception):
    """An error with its four parts: what, where, why, and what to type.

    Attributes:
        code: ``E`` and four digits; the first is the class.
        message: One sentence with the offending value.
        why: What was expected.
        fix: Commands or options that mend it, most likely first.
        where: Places from the outside in, filled by `located`.
        context: Values for machines (``--json``).
    """

    first_digit: ClassVar[str] = ""
    exit_status: ClassVar[int] = 70
    kind: ClassVar[str] = "internal"

    def __init__(
        self,
        code: str,
        message: str,
        *,
        why: str = "",
        fix: str | tuple[str, ...] = (),
        context: Mapping[str, object] | None = None,
    ) -> None:
        """Keep the parts.

        Raises:
            ValueError: If the code does not belong to this class.
        """
        if not code.startswith(f"E{self.first_digit}") or len(code) != 5:
            raise ValueError(f"{code} is not a code of {type(self).__name__}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.why = why
        self.fix = (fix,) if isinstance(fix, str) else fix
        self.where: list[str] = []
        self.context = dict(context or {})

    def __str__(self) -> str:
        """Render the four parts, one line each."""
        lines = [f"MBQ-{self.code}: {self.message}"]
        if self.where:
            lines.append(f"  where   {', '.join(self.where)}")
        if self.why:
            lines.append(f"  why     {self.why}")
        lines.extend(f"  fix     {fix}" for fix in self.fix)
        return "\n".join(lines)


class GateError(MbqError):
    """The work was done and a check said no."""

    first_digit, exit_status, kind = "1", 1, "gate"


class UsageError(MbqError):
    """A wrong option, combination of options, or a resume that does not match."""

    first_digit, exit_status, kind = "2", 2, "usage"


class MachineError(MbqError):
    """Something this machine lacks."""

    first_digit, exit_status, kind = "3", 3, "environment"


class FormatError(MbqError):
    """An artifact given to us is bad."""

    first_digit, exit_status, kind = "4", 4, "input"


class ResourceError(MbqError):
    """Disk, memory, time, lock or permission."""

    first_digit, exit_status, kind = "5", 5, "resources"


class BuildError(MbqError):
    """A builder refused, or died on, a valid request."""

    first_digit, exit_status, kind = "6", 6, "build"


class IncompatibleError(MbqError):
    """A good artifact for another version, device or schema."""

    first_digit, exit_status, kind = "7", 7, "incompatible"


class InternalError(MbqError):
    """A bug of ours."""

    first_digit, exit_status, kind = "9", 70, "internal"


@contextmanager
def located(place: str) -> Iterator[None]:
    """Add a place to every `MbqError` that passes, outermost first."""
    try:
        yield
    except MbqError as error:
        error.where.insert(0, place)
        raise
