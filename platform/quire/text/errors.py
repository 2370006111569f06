"""What can go wrong between text and tokens.

    TextError
    ├── BadTokenizer       the checkpoint's tokenizer files are missing or cannot be read
    ├── BadTemplate        the checkpoint's chat template does not compile
    ├── NoChatTemplate     a conversation came, the checkpoint has no chat template
    ├── TemplateRefused    the template itself said no (`raise_exception`); its words are for the user
    ├── TemplateFailed     rendering broke, or ran over its bounds of time and size
    └── ParamRefused       a parameter asks for what this model cannot give; `param` names it

Messages never carry text of the libraries below; that is chained as the cause, for the log.
"""

from __future__ import annotations


class TextError(Exception):
    """Base of all errors of `quire.text`."""


class BadTokenizer(TextError):
    """The tokenizer files are missing or unreadable."""


class BadTemplate(TextError):
    """The chat template does not compile."""


class NoChatTemplate(TextError):
    """There is no chat template to render a conversation with."""


class TemplateRefused(TextError):
    """The template called `raise_exception`: these messages are not a conversation it can express."""


class TemplateFailed(TextError):
    """The template could not render these messages."""


class ParamRefused(TextError):
    """A parameter that this model cannot honour. `param` is its name."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
