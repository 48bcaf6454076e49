"""Every error that Gapless raises on purpose, and who has to act on it.

GaplessError
├── ConfigError             an option of the engine or the command line is wrong      (also a ValueError)
├── InvalidRequestError     one request is wrong; nothing was queued                  (also a ValueError)
│   ├── EmptyPromptError    there is no token to start from
│   ├── PromptTooLongError  the prompt leaves no room within the context limit
│   └── RequestTooLargeError  the request can never fit in the whole KV cache
├── ModelError              the model can not be used
│   ├── ModelNotFoundError  there is nothing at that path or hub id
│   ├── UnsupportedModelError  the architecture or a feature of it is not implemented
│   └── CorruptModelError   a file of the model is damaged or incomplete
├── InputFileError          an input file of prompts can not be read
├── OutOfMemoryError        the weights, the KV cache or a step of even one token do not fit on the device
├── EngineDeadError         the engine failed earlier; every waiting request gets this
└── InternalError           a broken invariant: our bug, never the caller's
"""


class GaplessError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(GaplessError, ValueError):
    """An engine option is out of range or contradicts another one."""


class InvalidRequestError(GaplessError, ValueError):
    """A request is refused before anything is queued."""


class EmptyPromptError(InvalidRequestError):
    """The prompt has no tokens."""


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for a new token within the context limit."""


class RequestTooLargeError(InvalidRequestError):
    """The request needs more KV blocks than the whole cache has."""


class ModelError(GaplessError):
    """The model can not be used as given."""


class ModelNotFoundError(ModelError):
    """Nothing usable at that path or hub id."""


class UnsupportedModelError(ModelError):
    """The architecture, or a feature of it, is not implemented."""


class CorruptModelError(ModelError):
    """A file of the model is damaged, truncated or contradicts another one."""


class InputFileError(GaplessError):
    """A file of prompts can not be read."""


class OutOfMemoryError(GaplessError):
    """The device has too little memory for what was asked."""


class EngineDeadError(GaplessError):
    """The engine has failed or was closed and takes no more work."""


class InternalError(GaplessError):
    """A broken invariant. Please report it with the text of the error."""
