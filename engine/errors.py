"""The errors a user can meet. Each names the value, the limit and the remedy."""


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A configuration key or value that cannot be used."""


class InputError(EngineError, ValueError):
    """A prompt, sample or parameter that the engine cannot take. The engine stays usable."""


class CheckpointError(EngineError):
    """A checkpoint that is missing, truncated, does not match the model, or cannot be written (a full disk)."""


class CapacityError(EngineError):
    """More than the KV pool or the context can hold."""


class ExactnessError(EngineError):
    """Sampled and trained log-probabilities differ, or no exact backend is available."""


class ParallelError(EngineError):
    """A collective that failed or took too long, a rank that died, or ranks that did not make the same call."""


class NumericsError(EngineError):
    """Weights, logits or gradients that are not finite."""


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean "x"?)' for the closest known name, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
