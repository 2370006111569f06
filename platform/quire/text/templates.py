"""Chat templates: a checkpoint's Jinja program turns messages into the prompt its model was trained on.

A template is code from wherever the weights came from, so it runs in Jinja's immutable sandbox, and under bounds
of our own, because a sandbox keeps a template from our objects but not from our time and memory:

- every pass of a loop and every call of a macro takes one of `MAX_TICKS`, and now and then the processor time that
  the thread has spent on the rendering is looked at (`MAX_CPU_SECONDS`);
- every operation that can make a long string out of short ones (`+ * ~ %`, padding, `replace`, `join`, `format`,
  `indent`, `range`) is checked before it runs against `MAX_CHARS` or `MAX_RANGE`;
- the output is read piece by piece and cut off at `MAX_CHARS`.

The counting is put into the program when it is compiled: the syntax tree gets a call at the head of each loop and
macro, and each `~` becomes a call. What a template may use besides is what the Hugging Face convention offers:
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, `namespace`, `dict`, loop controls, and the
`generation` block, which marks the assistant's part for training and is transparent here.
"""

from __future__ import annotations

import datetime
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.visitor
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.text.errors import BadTemplate, TemplateFailed, TemplateRefused

MAX_CHARS: Final = 16 * 1024 * 1024
MAX_RANGE: Final = 100_000
MAX_BITS: Final = 4096
MAX_TICKS: Final = 2_000_000
MAX_CPU_SECONDS: Final = 1.0
RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "raise_exception", "strftime_now"}
    | {"namespace", "dict", "range", "bos_token", "eos_token", "unk_token", "pad_token"}
    | {"self", "continue_final_message"}
)
"""Names that `chat_template_kwargs` of a request may not set."""
_PERCENT: Final = re.compile(r"%[-+ #0]*(\d*)(?:\.(\d*))?")
_DIGITS: Final = re.compile(r"\d+")
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class _Refused(jinja2.TemplateError):
    """`raise_exception` was called."""


class _OverBudget(SecurityError):
    """The template ran over one of its bounds."""


class _Budget:
    """What one rendering has left."""

    __slots__ = ("deadline", "ticks")

    def __init__(self) -> None:
        self.ticks = MAX_TICKS
        self.deadline = time.thread_time() + MAX_CPU_SECONDS

    def tick(self) -> None:
        self.ticks -= 1
        if self.ticks < 0 or (self.ticks % 256 == 0 and time.thread_time() > self.deadline):
            raise _OverBudget("the template runs too long")


_budget: ContextVar[_Budget] = ContextVar("quire_template_budget")


def _tick() -> str:
    _budget.get().tick()
    return ""


def _bounded(size: int) -> None:
    if size > MAX_CHARS:
        raise _OverBudget("the template makes a text that is too long")


def _bounded_number(bits: int) -> None:
    if bits > MAX_BITS:
        raise _OverBudget("the template makes a number that is too large")


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _concat(*parts: object) -> str:
    texts = [str(part) for part in parts]
    _bounded(sum(map(len, texts)))
    return "".join(texts)


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_RANGE:
        raise _OverBudget(f"range() is bounded to {MAX_RANGE} items")
    return made


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(str(form)[:256])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int):
        _bounded(indent * 1024)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sized(plain: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    """The filter `plain`, called only when the bound on its result holds."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        _bounded(size(*args, **kwargs))
        return plain(*args, **kwargs)

    return checked


def _replaced_size(text: object, old: object, new: object, *_: object, **__: object) -> int:
    whole = str(text)
    return len(whole) + whole.count(str(old)) * len(str(new))


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else MAX_CHARS + 1


def _percent_size(form: object, *args: object, **_: object) -> int:
    """An upper bound of the padding a `%` format can ask for: widths in it, and in `args` where it has `*`."""
    widths = sum(_number(run) for found in _PERCENT.findall(str(form)) for run in found if run)
    if "*" in str(form):
        widths += sum(abs(arg) for arg in args if isinstance(arg, int))
    return widths


def _format_size(form: str, args: Iterable[object]) -> int:
    """The same for `str.format`: digits in the format specs, and in `args` where a spec has a field of its own."""
    specs = [spec for _, _, spec, _ in string.Formatter().parse(form) if spec]
    texts = [*specs, *(map(str, args) if any("{" in spec for spec in specs) else ())]
    return sum(_number(run) for text in texts for run in _DIGITS.findall(text))


class _TemplateDict:
    """`dict` as templates see it: it makes dictionaries and shows nothing of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders its body and nothing else."""

    tags = {"generation"}  # noqa: RUF012 (the attribute's type is Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Instrument(jinja2.visitor.NodeTransformer):
    """Puts the calls of the module's docstring into a template's syntax tree."""

    @staticmethod
    def _call(name: str, args: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
        target = jinja2.nodes.Name(name, "load", lineno=line)
        return jinja2.nodes.Call(target, args, [], None, None, lineno=line)

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(self._call("_quire_tick", [], node.lineno), lineno=node.lineno))
        return node

    visit_For = _with_tick
    visit_Macro = _with_tick
    visit_CallBlock = _with_tick

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("_quire_concat", list(node.nodes), node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds; see the module's docstring."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
        )
        self.filters["tojson"] = _tojson
        self.filters["center"] = _sized(jinja2.filters.do_center, lambda _, width=80: int(width))
        self.filters["indent"] = _sized(
            jinja2.filters.do_indent,
            lambda s, width=4, *_, **__: (
                len(s) + (s.count("\n") + 1) * (width if isinstance(width, int) else len(width))
            ),
        )
        self.filters["format"] = _sized(jinja2.filters.do_format, _percent_size)
        self.filters["replace"] = _sized(
            lambda text, old, new, count=-1: str(text).replace(old, new, -1 if count is None else count),
            _replaced_size,
        )
        self.filters["join"] = self._join
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_TemplateDict(),
            range=_range,
            _quire_tick=_tick,
            _quire_concat=_concat,
        )
        for name in ("cycler", "joiner", "lipsum"):
            self.globals.pop(name, None)

    @staticmethod
    def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = [str(_member(item, attribute)) for item in value]
        _bounded(sum(map(len, items)) + len(str(d)) * len(items))
        return str(d).join(items)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bounded(_length(left) + _length(right))
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _bounded(_length(text) * times)
            if isinstance(left, int) and isinstance(right, int):
                _bounded_number(left.bit_length() + right.bit_length())
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _bounded_number(left.bit_length() * max(right, 0))
        elif isinstance(left, str):
            _bounded(_percent_size(left, *(right if isinstance(right, tuple) else (right,))))
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            if name in {"center", "ljust", "rjust", "zfill", "expandtabs"}:
                width = next((a for a in (*args, *kwargs.values()) if isinstance(a, int)), 0)
                _bounded(width * (owner.count("\t") if name == "expandtabs" else 1))
            elif name == "replace" and len(args) >= 2:
                _bounded(_replaced_size(owner, args[0], args[1]))
            elif name == "join" and args and isinstance(args[0], list | tuple):
                _bounded(len(owner) * len(args[0]) + sum(map(_length, args[0])))
            elif name in {"format", "format_map"}:
                _bounded(_format_size(owner, [*args, *kwargs.values()]))
            elif name == "translate":
                raise SecurityError("str.translate is not offered to templates")
        return super().call(context, obj, *args, **kwargs)


def _member(item: Any, attribute: str | int | None) -> Any:
    """`item`, or its entry `attribute`: templates see plain dictionaries and lists only."""
    if attribute is None:
        return item
    try:
        return item[attribute]
    except (TypeError, LookupError):
        return ""


_environment = _Environment()


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    return _environment.from_string(source)


class ChatTemplate:
    """One compiled chat template.

    `special_tokens` are the names a template may use for the model's special tokens (`bos_token`, …).
    Raises `BadTemplate` when the source does not compile.
    """

    __slots__ = ("_special_tokens", "_template", "source")

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compiled(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            raise BadTemplate(f"the chat template does not compile{f' (line {line})' if line else ''}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. `variables` are further names the template may look at, such as `enable_thinking`.

        With `continue_final_message` the text ends inside the last message, so that the model goes on with it.
        Messages are plain JSON values; `content` of the last one is a string when it is to be continued.
        Raises `TemplateRefused` and `TemplateFailed`.
        """
        plain = [_with_reasoning(message) for message in messages]
        mark = "\x02quire-continue\x03"
        if continue_final_message:
            plain[-1] = {**plain[-1], "content": f"{plain[-1].get('content') or ''}{mark}"}
        text = self._run(
            {
                **self._special_tokens,
                **variables,
                "messages": plain,
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if continue_final_message:
            head, found, _ = text.rpartition(mark)
            if not found:
                raise TemplateFailed("this model's chat template leaves out the final message to be continued")
            return head
        return text

    def _run(self, variables: dict[str, Any]) -> str:
        token = _budget.set(_Budget())
        try:
            pieces: list[str] = []
            size = 0
            for piece in self._template.generate(variables):
                size += len(piece)
                _bounded(size)
                pieces.append(piece)
            return "".join(pieces)
        except _Refused as error:
            words = "".join(c if c.isprintable() else " " for c in str(error))[:200]
            raise TemplateRefused(words) from error
        except _OverBudget as error:
            raise TemplateFailed("this model's chat template ran over its bounds of time or size") from error
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateFailed("this model's chat template cannot render these messages") from error
        finally:
            _budget.reset(token)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each of the names that templates look for."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **message, "reasoning_content": thought}
