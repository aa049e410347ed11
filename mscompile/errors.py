"""Every error a user can meet, and the exit code each one ends a command with.

MsCompileError                 exit code 2: bad usage or input
├── UsageError                 an option or argument that cannot work
├── CheckpointError            a checkpoint that is missing, damaged, unsafe or does not fit its family
├── ConfigError                a model configuration with impossible values
├── Refusal                    a model that cannot be streamed exactly, with the reason
├── ExportError                a graph that does not keep what its GraphSpec promises
├── BundleError                a bundle that is damaged, tampered with or from a newer version
├── InputError                 tokens or shapes outside what an engine was built for
├── GateFailed                 exit code 1: parity or latency outside its limits
└── EngineError                exit code 3: an engine failed while building or running
    └── EngineUnavailable      exit code 3: that engine cannot be built or run on this machine
"""


class MsCompileError(Exception):
    """Base of all expected errors. Its text says what was wanted, what came and what to do."""

    exit_code = 2

    def __str__(self) -> str:
        """One line of printable characters, whatever names from a file stand in it."""
        return "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in super().__str__()
        )


class UsageError(MsCompileError):
    """An option or argument that cannot work."""


class CheckpointError(MsCompileError):
    """A checkpoint that is missing, damaged, unsafe or does not fit its family."""


class ConfigError(MsCompileError):
    """A model configuration with impossible values."""


class Refusal(MsCompileError):
    """A model that cannot be streamed exactly, with the reason."""


class ExportError(MsCompileError):
    """A graph that does not keep what its GraphSpec promises."""


class BundleError(MsCompileError):
    """A bundle that is damaged, tampered with or from a newer version."""


class InputError(MsCompileError, ValueError):
    """Tokens or shapes outside what an engine was built for."""


class GateFailed(MsCompileError):
    """Parity or latency outside its limits."""

    exit_code = 1


class EngineError(MsCompileError):
    """An engine failed while building or running."""

    exit_code = 3


class EngineUnavailable(EngineError):
    """That engine cannot be built or run on this machine; the text says what is missing."""
